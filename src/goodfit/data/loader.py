"""Micro-batches in an order that is a pure function of (seed, epoch), for one process of many.

Nothing here has state to save: the position in a run is the number of samples consumed in the epoch. The training
loader gives the same micro-batches with any number of worker processes.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from goodfit.core.random import permutation, stream
from goodfit.data.augment import AugmentPreset, crop_boxes, cut, flips
from goodfit.data.index import DatasetIndex
from goodfit.data.store import PictureStore
from goodfit.runtime.images import Preprocessing

_ORDER = stream("order")

Sample = tuple[int, npt.NDArray[np.uint8], int]  # row, pixels (3, size, size), target
Collate = Callable[[Sequence[Sample]], Any]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What fits at once: the samples' rows in the index, and the task's collated data."""

    samples: npt.NDArray[np.int64]
    data: Any


def epoch_order(rows: npt.NDArray[np.int64], *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The rows in the order of an epoch, a function of (seed, epoch) alone."""
    return rows[permutation(len(rows), _ORDER, seed, epoch)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSamples:
    """Makes augmented samples of any epoch: the map-style dataset behind the loader, without state of its own."""

    index: DatasetIndex
    store: PictureStore
    preset: AugmentPreset
    preprocessing: Preprocessing
    flip: float
    seed: int
    collate: Collate

    def micro_batch(self, epoch: int, samples: npt.NDArray[np.int64]) -> MicroBatch:
        """The collated, augmented samples of an epoch."""
        pictures = [self.store.get(int(row)) for row in samples]
        sizes = np.array([(p.shape[1], p.shape[0]) for p in pictures], np.int64)
        size = self.preprocessing.size
        boxes = crop_boxes(self.preset, seed=self.seed, epoch=epoch, samples=samples, sizes=sizes, size=size,
                           resize=self.preprocessing.resize)  # fmt: skip
        mirrored = flips(self.flip, seed=self.seed, epoch=epoch, samples=samples)
        made: list[Sample] = []
        for row, picture, box, mirror in zip(samples, pictures, boxes, mirrored, strict=True):
            pixels = cut(picture, box, size)
            made.append((int(row), pixels[:, :, ::-1] if mirror else pixels, int(self.index.targets[row])))
        return MicroBatch(samples, self.collate(made))


class TrainLoader:
    """Groups of micro-batches, one group per update.

    The remainder of an epoch that does not fill a batch is left to later epochs' orders. With several processes each
    takes its slice of every batch.

    Args:
        samples: Makes the augmented samples.
        rows: The rows of the training split, shape (rows,).
        batch: Samples per update over all processes.
        workers: Loader processes; 0 loads in this one.
        rank, size: This process among how many.
    """

    def __init__(
        self, samples: TrainSamples, rows: npt.NDArray[np.int64], *, batch: int, workers: int, rank: int = 0,
        size: int = 1,
    ) -> None:  # fmt: skip
        self.samples = samples
        self.rows = rows
        self.batch = min(batch, len(rows))
        self.workers = workers
        self.rank = rank
        self.size = size

    @property
    def steps_per_epoch(self) -> int:
        """Updates per epoch."""
        return len(self.rows) // self.batch

    def step_samples(self, epoch: int, position: int) -> npt.NDArray[np.int64]:
        """This process's rows of the update that starts after `position` samples of the epoch."""
        order = epoch_order(self.rows, seed=self.samples.seed, epoch=epoch)
        return order[position : position + self.batch][self.rank :: self.size]

    def group(self, epoch: int, position: int, num_micro: int) -> list[MicroBatch]:
        """The micro-batches of one update, made here and now."""
        chunks = np.array_split(self.step_samples(epoch, position), num_micro)
        return [self.samples.micro_batch(epoch, chunk) for chunk in chunks if len(chunk)]

    def groups(self, epoch: int, position: int, num_micro: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of every update left in an epoch, from `position` samples on."""
        order = epoch_order(self.rows, seed=self.samples.seed, epoch=epoch)
        starts = range(position, self.steps_per_epoch * self.batch, self.batch)
        chunks = [
            [c for c in np.array_split(order[s : s + self.batch][self.rank :: self.size], num_micro) if len(c)]
            for s in starts
        ]
        made = self._make(epoch, [chunk for group in chunks for chunk in group])
        for group in chunks:
            yield [next(made) for _ in group]

    def _make(self, epoch: int, chunks: list[npt.NDArray[np.int64]]) -> Iterator[MicroBatch]:
        if self.workers == 0 or not chunks:
            yield from (self.samples.micro_batch(epoch, chunk) for chunk in chunks)
            return
        import torch.utils.data

        yield from torch.utils.data.DataLoader(
            _EpochChunks(self.samples, epoch, chunks),
            batch_size=None,
            num_workers=min(self.workers, len(chunks)),
            prefetch_factor=2,
            worker_init_fn=_ignore_signals,
        )


def _ignore_signals(_worker: int) -> None:
    """Signals reach every process of a group; the main one decides what follows, and its workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@dataclass(frozen=True, slots=True)
class _EpochChunks:
    """One item per micro-batch, for torch's DataLoader, which then only starts processes and keeps the order."""

    samples: TrainSamples
    epoch: int
    chunks: list[npt.NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> MicroBatch:
        return self.samples.micro_batch(self.epoch, self.chunks[number])


class EvalLoader:
    """Micro-batches of a split through the serving path, each sample once, sliced by process without padding.

    Args:
        keep: Keep the serving path's output (uint8, size x size x 3 bytes a sample) for the next pass.
    """

    def __init__(
        self, index: DatasetIndex, rows: npt.NDArray[np.int64], *, preprocessing: Preprocessing, batch: int,
        threads: int, collate: Collate, keep: bool, rank: int = 0, size: int = 1,
    ) -> None:  # fmt: skip
        self._index = index
        self.rows = rows[rank::size]
        self._preprocessing = preprocessing
        self._batch = batch
        self._threads = threads
        self._collate = collate
        self._kept: dict[int, npt.NDArray[np.uint8]] | None = {} if keep else None

    def __iter__(self) -> Iterator[MicroBatch]:
        with ThreadPoolExecutor(self._threads) as pool:
            for start in range(0, len(self.rows), self._batch):
                rows = self.rows[start : start + self._batch]
                pixels = pool.map(self._pixels, (int(r) for r in rows))
                made = [(int(r), p, int(self._index.targets[r])) for r, p in zip(rows, pixels, strict=True)]
                yield MicroBatch(rows, self._collate(made))

    def _pixels(self, row: int) -> npt.NDArray[np.uint8]:
        if self._kept is not None and row in self._kept:
            return self._kept[row]
        pixels = self._preprocessing.pixels(self._index.file(row))
        if self._kept is not None:
            self._kept[row] = pixels
        return pixels
