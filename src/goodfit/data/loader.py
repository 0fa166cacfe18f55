"""Micro-batches in an order that is a pure function of (seed, epoch), for one process of many.

Nothing here has state to save: the position in a run is the number of samples consumed in the epoch. The training
loader gives the same micro-batches with any number of worker processes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from goodfit.config.sizes import InputSizes
from goodfit.core.random import permutation, stream, uniform
from goodfit.data.augment import AugmentPreset, Placement, crop, fit_into, mirror_into, place
from goodfit.data.index import DatasetIndex
from goodfit.data.policy import apply_operations, draw_operations
from goodfit.data.processes import made_in_processes
from goodfit.data.store import PictureStore, as_audited
from goodfit.runtime.images import Preprocessing

_ORDER = stream("order")
_BALANCE = stream("balance")

COPY = 1 << 40  # a sample is row + COPY * (how often it came before in this epoch): each copy is augmented by itself

Collate = Callable[[npt.NDArray[np.uint8], npt.NDArray[np.int64]], Any]  # images (N, 3, S, S), targets
Chunk = tuple[npt.NDArray[np.int64], int]  # the samples of a micro-batch, and the side of its input


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What fits at once: the samples (rows of the index, see `row_of`), and the task's collated data."""

    samples: npt.NDArray[np.int64]
    data: Any


def epoch_order(
    rows: npt.NDArray[np.int64], *, seed: int, epoch: int, targets: npt.NDArray[np.int64] | None = None,
    repeats: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.int64]:  # fmt: skip
    """The samples of an epoch in their order, a function of (seed, epoch) alone.

    Args:
        rows: The rows of the training split, shape (rows,).
        targets: Their classes, for balanced sampling: then every class comes equally often (to within one), rare ones
            again and again, each time as another sample (`row_of` tells its row), and of frequent ones another part in
            every epoch. None takes each row once.
        repeats: How often each row is to come in relation to the others, at least 1, shape (rows,); what is left of whole numbers is
            drawn anew in every epoch. An epoch keeps its length.
    """
    if repeats is not None:
        counts = np.floor(repeats + uniform(_BALANCE, seed, epoch, rows)).astype(np.int64)
        samples = np.concatenate([rows[counts > turn] + turn * COPY for turn in range(int(counts.max()))])
        return samples[permutation(len(samples), _ORDER, seed, epoch)][: len(rows)]
    if targets is None:
        return rows[permutation(len(rows), _ORDER, seed, epoch)]
    classes = np.unique(targets)
    start = epoch % len(classes)  # which classes get one more, where the number is no multiple
    made = []
    for number, target in enumerate(np.roll(classes, -start)):
        members = rows[targets == target]
        count = len(rows) // len(classes) + (number < len(rows) % len(classes))
        first = epoch * (len(rows) // len(classes))  # go on where the last epoch ended
        cycle, offset = divmod(first, len(members))
        for turn in range(-(-(offset + count) // len(members))):
            again = members[permutation(len(members), _BALANCE, seed, int(target), cycle + turn)] + turn * COPY
            made.append(again[offset if turn == 0 else 0 : offset + count - turn * len(members)])
    samples = np.concatenate(made)
    return samples[permutation(len(samples), _ORDER, seed, epoch)]


def row_of(samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows of samples, some of which may be further copies of one row."""
    return samples % COPY


@functools.lru_cache(maxsize=4)
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Threads to cut pictures with; each process has its own, since threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="goodfit-cut")


def each_on_threads(num: int, threads: int, work: Callable[[int], None]) -> None:
    """Do `work` for 0 to num - 1, a stretch of them on each thread, this one included."""

    def stretch(start: int, stop: int) -> None:
        for k in range(start, stop):
            work(k)

    bounds = [num * part // threads for part in range(threads + 1)]
    waiting = [_pool(threads, os.getpid()).submit(stretch, a, b) for a, b in itertools.pairwise(bounds[1:])]
    stretch(bounds[0], bounds[1])
    for part in waiting:
        part.result()


@contextlib.contextmanager
def own_threads() -> Iterator[None]:
    """Keep torch from spreading single pictures over a team of its own threads. Each such call leaves a thread that
    waits, spinning, on the core which ours need: loading fell from 12,000 pictures a second to 7,000."""
    num = torch.get_num_threads()
    if num > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if num > 1:
            torch.set_num_threads(num)


def _cut_all(
    pictures: list[npt.NDArray[np.uint8]], placed: Placement, made: npt.NDArray[np.uint8], threads: int
) -> None:
    """Cut every picture as placed, into `made` of shape (N, size, size, 3).

    What is Python comes before and after the threads: handing its lock over costs them more than the pixels.
    """
    parts = [crop(p, b) for p, b in zip(pictures, placed.boxes.tolist(), strict=True)]
    places = torch.from_numpy(made).permute(0, 3, 1, 2).split(1)
    mirrored = placed.mirrored.tolist()
    targets = [torch.empty_like(p) if m else p for p, m in zip(places, mirrored, strict=True)]
    each_on_threads(len(pictures), threads, lambda k: fit_into(parts[k], targets[k]))
    for target, out, is_mirrored in zip(targets, places, mirrored, strict=True):
        if is_mirrored:
            mirror_into(target, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSamples:
    """Makes augmented samples of any epoch: the map-style dataset behind the loader, without state of its own.

    Attributes:
        sizes: The side of each batch's input; None makes all of them as the preprocessing says.
        shares_cores: The model computes on the same cores. Cutting 32 pictures between two training steps then takes 2.4
            to 2.8 ms on two threads and 2.3 on one: after each torch operation its idle thread spins on the other core.
    """

    index: DatasetIndex
    store: PictureStore
    preset: AugmentPreset
    preprocessing: Preprocessing
    flip: float
    seed: int
    collate: Collate
    sizes: InputSizes | None = None
    shares_cores: bool = False

    def size_of(self, epoch: int, number: int, *, closing: bool = False) -> int:
        """Side of the input of an epoch's batch of this number, pixels: a function of these and the seed."""
        if self.sizes is None:
            return self.preprocessing.size
        return self.sizes.draw(seed=self.seed, epoch=epoch, number=number, closing=closing)

    def micro_batch(
        self, epoch: int, samples: npt.NDArray[np.int64], *, size: int | None = None, closing: bool = False,
        threads: int = 1,
    ) -> MicroBatch:  # fmt: skip
        """The collated, augmented samples of an epoch; with its mild form while `closing`, at the end of a run.

        Args:
            size: Side of the input, pixels; None is that of the preprocessing.
        """
        preset = self.preset.closing() if closing else self.preset
        rows = row_of(samples)
        if threads > 1 and not self.store.is_warm:  # decoding is worth a thread, reading the cache is not
            pictures = list(_pool(threads, os.getpid()).map(self.store.get, rows.tolist()))
        else:
            pictures = [self.store.get(row) for row in rows.tolist()]
        sizes = np.array([(p.shape[1], p.shape[0]) for p in pictures], np.int64)
        served = self.preprocessing
        size = served.size if size is None else size
        placed = place(preset, seed=self.seed, epoch=epoch, samples=samples, sizes=sizes, size=size,
                       share=served.size / served.resize, flip=self.flip)  # fmt: skip
        made = np.empty((len(samples), size, size, 3), np.uint8)
        with own_threads():
            _cut_all(pictures, placed, made, 1 if self.shares_cores else threads)
            if preset.policy != "off":
                operations = draw_operations(preset.policy, seed=self.seed, epoch=epoch, samples=samples)
                each_on_threads(len(samples), threads, lambda k: apply_operations(operations[k], made[k]))
        return MicroBatch(samples, self.collate(made.transpose(0, 3, 1, 2), self.index.targets[rows]))


class SampleMaker(Protocol):
    """What makes the augmented samples of any epoch: pictures of one class, or scenes of objects."""

    @property
    def index(self) -> DatasetIndex: ...

    @property
    def seed(self) -> int: ...

    @property
    def sizes(self) -> InputSizes | None: ...

    def size_of(self, epoch: int, number: int, *, closing: bool = False) -> int: ...

    def micro_batch(
        self,
        epoch: int,
        samples: npt.NDArray[np.int64],
        *,
        size: int | None = None,
        closing: bool = False,
        threads: int = 1,
    ) -> MicroBatch: ...


class TrainLoader:
    """Groups of micro-batches, one group per update.

    The remainder of an epoch that does not fill a batch is left to later epochs' orders. With several processes each
    takes its slice of every batch.

    Args:
        samples: Makes the augmented samples.
        rows: The rows of the training split, shape (rows,).
        batch: Samples per update over all processes.
        workers: Loader processes; 0 loads in this one.
        prefetch: Batches that each loader process makes ahead.
        threads: Threads that cut pictures where there is no loader process.
        balance: Every class equally often.
        repeats: As `epoch_order` takes them.
        rank, size: This process among how many.
    """

    def __init__(
        self, samples: SampleMaker, rows: npt.NDArray[np.int64], *, batch: int, workers: int, threads: int = 1,
        prefetch: int = 2, balance: bool = False, repeats: npt.NDArray[np.float64] | None = None, rank: int = 0, size: int = 1,
    ) -> None:  # fmt: skip
        self.samples = samples
        self.rows = rows
        self.batch = min(batch, len(rows))
        self.workers = workers
        self.prefetch = prefetch
        self.threads = threads
        self._targets = samples.index.targets[rows] if balance else None
        self._repeats = repeats
        self.rank = rank
        self.size = size

    @property
    def steps_per_epoch(self) -> int:
        """Updates per epoch."""
        return len(self.rows) // self.batch

    def evenly(self) -> TrainLoader:
        """For measuring: this loader with the input sizes of the whole run in an order that covers them evenly from the
        first batch on, which is the largest."""
        made = copy.copy(self)
        if self.samples.sizes is not None:
            samples: Any = self.samples
            made.samples = replace(samples, sizes=replace(self.samples.sizes, even=True))
        return made

    def step_samples(self, epoch: int, position: int) -> npt.NDArray[np.int64]:
        """This process's samples of the update that starts after `position` samples of the epoch."""
        return self._order(epoch)[position : position + self.batch][self.rank :: self.size]

    def group(self, epoch: int, position: int, num_micro: int, *, size: int | None = None) -> list[MicroBatch]:
        """The micro-batches of one update, made here and now; at another input size than the run's, if one is given."""
        size = size or self.samples.size_of(epoch, position // self.batch)
        chunks = np.array_split(self.step_samples(epoch, position), num_micro)
        return [
            self.samples.micro_batch(epoch, chunk, size=size, threads=self.threads) for chunk in chunks if len(chunk)
        ]

    def groups(
        self, epoch: int, position: int, num_micro: int, *, closing: bool = False
    ) -> Generator[list[MicroBatch]]:
        """The micro-batches of every update left in an epoch, from `position` samples on; those of one update have one
        input size, which the number of the update in the epoch gives."""
        order = self._order(epoch)
        starts = range(position, self.steps_per_epoch * self.batch, self.batch)
        sizes = [self.samples.size_of(epoch, s // self.batch, closing=closing) for s in starts]
        chunks = [
            [(c, size) for c in np.array_split(order[s : s + self.batch][self.rank :: self.size], num_micro) if len(c)]
            for s, size in zip(starts, sizes, strict=True)
        ]
        made = self._make(epoch, [chunk for group in chunks for chunk in group], closing)
        for group in chunks:
            yield [next(made) for _ in group]

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        return epoch_order(self.rows, seed=self.samples.seed, epoch=epoch, targets=self._targets, repeats=self._repeats)

    def _make(self, epoch: int, chunks: list[Chunk], closing: bool) -> Iterator[MicroBatch]:
        if self.workers == 0 or not chunks:
            for chunk, size in chunks:
                yield self.samples.micro_batch(epoch, chunk, size=size, closing=closing, threads=self.threads)
            return
        yield from made_in_processes(_EpochChunks(self.samples, epoch, chunks, closing), self.workers, self.prefetch)


@dataclass(frozen=True, slots=True)
class _EpochChunks:
    """The micro-batches of an epoch."""

    samples: SampleMaker
    epoch: int
    chunks: list[Chunk]
    closing: bool

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> MicroBatch:
        chunk, size = self.chunks[number]
        return self.samples.micro_batch(self.epoch, chunk, size=size, closing=self.closing)


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

    @property
    def bytes_to_keep(self) -> int:
        """Of pictures that will be kept and are not yet."""
        if self._kept is None:
            return 0
        return (len(self.rows) - len(self._kept)) * 3 * self._preprocessing.size**2

    def halve(self) -> bool:
        """Half as many samples at once from now on. False if there is one at a time already."""
        if self._batch <= 1:
            return False
        self._batch //= 2
        return True

    def __iter__(self) -> Iterator[MicroBatch]:
        with ThreadPoolExecutor(self._threads) as pool:
            for start in range(0, len(self.rows), self._batch):
                rows = self.rows[start : start + self._batch]
                pixels = [p.transpose(1, 2, 0) for p in pool.map(self._pixels, rows.tolist())]
                yield MicroBatch(rows, self._collate(np.stack(pixels).transpose(0, 3, 1, 2), self._index.targets[rows]))

    def _pixels(self, row: int) -> npt.NDArray[np.uint8]:
        if self._kept is not None and row in self._kept:
            return self._kept[row]
        with as_audited():
            pixels = self._preprocessing.pixels(self._index.file(row))
        if self._kept is not None:
            self._kept[row] = pixels
        return pixels
