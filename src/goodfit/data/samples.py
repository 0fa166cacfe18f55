"""A user's own samples, tensors or a dataset of samples, as micro-batches that are a pure function of (seed, epoch).

A dataset is called with the random state of Python, NumPy and torch seeded for each sample, so that order, resume and
loader processes give the same samples. What is random from elsewhere (a generator that the dataset carries along) is not
covered.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.data

from goodfit.core.errors import DataError, RequestError
from goodfit.core.random import derive_seed, stream
from goodfit.data.loader import MicroBatch, epoch_order
from goodfit.data.nested import leaves
from goodfit.data.processes import made_in_processes

_SAMPLE = stream("sample")
MOST_SAMPLES = 100_000  # of an iterable that is read into memory ...
MOST_BYTES = 1_000_000_000  # ... and their bytes
EVALUATED = -1  # the epoch that samples are drawn for when they are not trained on: the same at every validation

Collate = Callable[[list[Any]], Any]
Chunk = npt.NDArray[np.int64]


class Samples(Protocol):
    """Samples by their numbers."""

    @property
    def format(self) -> str: ...

    def __len__(self) -> int: ...

    def batch(self, rows: Chunk, *, seed: int, epoch: int) -> Any: ...

    def digest(self) -> str: ...


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the random state of torch's CPU generator, NumPy and Python back at the end."""
    numbers, python, tensors = np.random.get_state(), random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        np.random.set_state(numbers)
        random.setstate(python)
        torch.set_rng_state(tensors)


@dataclass(frozen=True, slots=True)
class TensorSamples:
    """Nested dicts and tuples of tensors with a row per sample; a batch is the same nested structure of some rows."""

    data: Any
    num: int
    format: str = "tensors"

    def __len__(self) -> int:
        return self.num

    def batch(self, rows: Chunk, *, seed: int, epoch: int) -> Any:
        """Some rows of every tensor. Nothing here is random."""
        del seed, epoch
        index = torch.from_numpy(rows)
        return _mapped(self.data, lambda t: t.index_select(0, index.to(t.device)))

    def digest(self) -> str:
        """SHA-256 over place, type, shape and bytes of every tensor."""
        made = hashlib.sha256()
        for place, tensor in leaves(self.data).items():
            _add(made, place, tensor)
        return made.hexdigest()


@dataclass(frozen=True, slots=True)
class ItemSamples:
    """An object with `__len__` and `__getitem__`, and what makes a batch of a list of its samples."""

    dataset: Any
    collate: Collate
    format: str = "dataset"

    def __len__(self) -> int:
        return len(self.dataset)

    def samples(self, rows: Sequence[int], *, seed: int, epoch: int) -> list[Any]:
        """Some samples, each with the random state of (seed, epoch, row), which is put back afterwards.

        Raises:
            DataError: the dataset raised an error.
        """
        found = []
        with random_state_kept():
            for row in rows:
                key = derive_seed(_SAMPLE, seed, epoch, row)
                random.seed(key)
                np.random.seed(key & 0xFFFFFFFF)
                torch.default_generator.manual_seed(key)
                try:
                    found.append(self.dataset[row])
                except Exception as error:
                    raise DataError(f"Sample {row} cannot be had: {type(error).__name__}: {error}",
                                    where=f"{type(self.dataset).__name__}.__getitem__") from error  # fmt: skip
        return found

    def batch(self, rows: Chunk, *, seed: int, epoch: int) -> Any:
        """The collated samples."""
        return self.collate(self.samples(rows.tolist(), seed=seed, epoch=epoch))

    def digest(self) -> str:
        """SHA-256 over the number of samples, and over the first and the last: all that can be looked at quickly."""
        made = hashlib.sha256(f"{len(self)}".encode())
        for sample in self.samples([0, len(self) - 1], seed=0, epoch=EVALUATED):
            for place, value in leaves(sample).items():
                _add(made, place, value if isinstance(value, torch.Tensor | np.ndarray) else repr(value))
        return made.hexdigest()

    def is_repeatable(self) -> bool:
        """Whether the first sample is the same when it is asked for twice with the same random state."""
        first, again = (leaves(self.samples([0], seed=0, epoch=0)) for _ in range(2))
        return list(first) == list(again) and all(_same(first[k], again[k]) for k in first)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor | np.ndarray) and isinstance(other, torch.Tensor | np.ndarray):
        left, right = (torch.as_tensor(value) for value in (one, other))
        return left.shape == right.shape and bool(((left == right) | ((left != left) & (right != right))).all())
    return bool(type(one) is type(other) and repr(one) == repr(other))


def _add(made: Any, place: str, value: Any) -> None:
    if isinstance(value, str):
        made.update(f"{place} {value}\n".encode())
        return
    tensor = torch.as_tensor(value).detach().cpu().contiguous()
    made.update(f"{place} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    made.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")


def _mapped(data: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(data, Mapping):
        return {key: _mapped(value, change) for key, value in data.items()}
    if isinstance(data, tuple):
        return tuple(_mapped(value, change) for value in data)
    return change(data)


def read_samples(data: Any, name: str, collate: Collate, *, floats: torch.dtype = torch.float32) -> Samples:
    """What a person handed over as a split.

    Args:
        data: A tensor or array, or nested tuples and dicts of them with a row per sample; or an object with `__len__` and
            `__getitem__` that gives samples (a list, a torch Dataset); or an iterable of at most 100,000 samples, which is
            read into memory.
        name: "train", "val" or "test", for messages.
        collate: Makes a batch of a list of samples.
        floats: The module's type, which NumPy's float64 arrays are turned into; tensors stay what they are.

    Raises:
        RequestError: it is of another kind.
        DataError: its parts are of unequal length, or it is empty or too large.
    """
    if isinstance(data, torch.utils.data.DataLoader):
        raise RequestError(f"{name}= is a DataLoader; goodfit makes the batches itself, so that a run can be resumed exactly.",
                           next=f"pass its dataset, {name}=loader.dataset, with batch=, workers= and collate=")  # fmt: skip
    if type(data) is torch.utils.data.TensorDataset:
        data = tuple(data.tensors)
    if isinstance(data, torch.Tensor | np.ndarray | tuple | Mapping):
        return _tensor_samples(data, name, floats)
    streams = isinstance(data, torch.utils.data.IterableDataset) or not hasattr(data, "__getitem__")
    if streams and isinstance(data, Iterable):
        data = _materialised(data, name)
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(data, str | bytes):
        raise RequestError(f"{name}= is of type {type(data).__name__}, from which no samples can be had.",
                           next="pass tensors, as (inputs, targets), or an object with __len__ and __getitem__")  # fmt: skip
    if len(data) == 0:
        raise DataError(f"{name}= has no samples.")
    return ItemSamples(data, collate)


def _materialised(data: Iterable[Any], name: str) -> list[Any]:
    """All samples of a short iterable."""
    found: list[Any] = []
    size = 0
    for sample in data:
        found.append(sample)
        size += sum(v.nbytes for v in leaves(sample).values() if isinstance(v, torch.Tensor | np.ndarray))
        if len(found) > MOST_SAMPLES or size > MOST_BYTES:
            what = f"{MOST_SAMPLES:,} samples" if len(found) > MOST_SAMPLES else f"{MOST_BYTES / 1e9:.0f} GB"
            raise DataError(f"{name}= is an iterable of more than {what}: its samples cannot be found by number, and so "
                            "neither shuffled nor resumed.", next="give it __len__ and __getitem__")  # fmt: skip
    return found


def _tensor_samples(data: Any, name: str, floats: torch.dtype) -> TensorSamples:
    places = leaves(data)
    tensors: dict[int, torch.Tensor] = {}
    for place, value in places.items():
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RequestError(f"{name}: `{place}` is of type {type(value).__name__}, which is no tensor: {error}.",
                               next="pass tensors or arrays with a row per sample, or a list of samples") from error  # fmt: skip
        if isinstance(value, np.ndarray) and tensor.dtype == torch.float64:
            tensor = tensor.to(floats)
        tensors[id(value)] = tensor.detach()
        if tensor.ndim == 0:
            raise DataError(f"{name}: `{place}` is a single number, not a row per sample.")
    lengths = {place: len(tensors[id(value)]) for place, value in places.items()}
    if len(set(lengths.values())) != 1:
        said = ", ".join(f"`{place}` has {num:,}" for place, num in lengths.items()) or "it is empty"
        raise DataError(f"{name}: its parts are of unequal length: {said}.", next="one row per sample in every part; "
                        "a list of samples is passed as a list, not as a tuple")  # fmt: skip
    num = next(iter(lengths.values()))
    if num == 0:
        raise DataError(f"{name}= has no samples.")
    return TensorSamples(_mapped(data, lambda value: tensors[id(value)]), num)


def as_batch(data: Any, rows: Chunk) -> dict[str, Any]:
    """What reaches a task: the nested `data`, and `rows`, the numbers of its samples (int64, shape (N,))."""
    return {"data": data, "rows": torch.from_numpy(rows)}


class NoTransform:
    """The batch as the dataset made it."""

    def train(self, batch: Any, **_keys: Any) -> Any:
        """The same batch."""
        return batch

    def evaluate(self, batch: Any) -> Any:
        """The same batch."""
        return batch


@dataclass(frozen=True, slots=True)
class _Chunks:
    """One item per micro-batch."""

    samples: Samples
    chunks: list[Chunk]
    seed: int
    epoch: int

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> MicroBatch:
        rows = self.chunks[number]
        return MicroBatch(rows, as_batch(self.samples.batch(rows, seed=self.seed, epoch=self.epoch), rows))

    def stream(self, workers: int, prefetch: int) -> Iterator[MicroBatch]:
        """All of them in order, made in so many processes."""
        if workers == 0 or not self.chunks:
            yield from (self[number] for number in range(len(self)))
            return
        yield from made_in_processes(self, workers, prefetch)


class SampleLoader:
    """Groups of micro-batches of a user's samples, one group per update; as `TrainLoader` for pictures.

    Args:
        batch: Samples per update over all processes.
        workers: Loader processes; 0 loads in this one.
        prefetch: Batches that each of them makes ahead.
        rank, size: This process among how many.
    """

    def __init__(
        self, samples: Samples, *, batch: int, seed: int, workers: int = 0, prefetch: int = 2, rank: int = 0, size: int = 1
    ) -> None:  # fmt: skip
        self.samples = samples
        self.rows = np.arange(len(samples))
        self.batch = min(batch, len(samples))
        self.seed = seed
        self.workers = workers
        self.prefetch = prefetch
        self.rank = rank
        self.size = size

    @property
    def steps_per_epoch(self) -> int:
        """Updates per epoch; samples that do not fill a batch are left to later epochs' orders."""
        return len(self.rows) // self.batch

    def group(self, epoch: int, position: int, num_micro: int) -> list[MicroBatch]:
        """The micro-batches of the update after `position` samples of the epoch, made here and now."""
        order = epoch_order(self.rows, seed=self.seed, epoch=epoch)
        chunks = self._chunks(order, position, num_micro)
        return list(_Chunks(self.samples, chunks, self.seed, epoch).stream(0, 0))

    def groups(
        self, epoch: int, position: int, num_micro: int, *, closing: bool = False
    ) -> Generator[list[MicroBatch]]:
        """The micro-batches of every update left in an epoch, from `position` samples on."""
        del closing  # a user's dataset has one form
        order = epoch_order(self.rows, seed=self.seed, epoch=epoch)
        starts = range(position, self.steps_per_epoch * self.batch, self.batch)
        groups = [self._chunks(order, start, num_micro) for start in starts]
        chunks = [chunk for group in groups for chunk in group]
        made = _Chunks(self.samples, chunks, self.seed, epoch).stream(self.workers, self.prefetch)
        for group in groups:
            yield [next(made) for _ in group]

    def _chunks(self, order: Chunk, position: int, num_micro: int) -> list[Chunk]:
        mine = order[position : position + self.batch][self.rank :: self.size]
        return [chunk for chunk in np.array_split(mine, num_micro) if len(chunk)]


class SampleReader:
    """Micro-batches of a split for evaluation, each sample once, in order, sliced by process without padding."""

    bytes_to_keep = 0  # nothing is kept between two passes

    def __init__(
        self, samples: Samples, *, batch: int, seed: int, workers: int = 0, prefetch: int = 2, rank: int = 0, size: int = 1
    ) -> None:  # fmt: skip
        self.samples = samples
        self.rows = np.arange(len(samples))[rank::size]
        self._batch = batch
        self._seed = seed
        self._workers = workers
        self._prefetch = prefetch

    def halve(self) -> bool:
        """Half as many samples at once from now on. False if there is one at a time already."""
        if self._batch <= 1:
            return False
        self._batch //= 2
        return True

    def __iter__(self) -> Iterator[MicroBatch]:
        chunks = [self.rows[start : start + self._batch] for start in range(0, len(self.rows), self._batch)]
        yield from _Chunks(self.samples, chunks, self._seed, EVALUATED).stream(self._workers, self._prefetch)

    def first(self, rows: Sequence[int]) -> MicroBatch:
        """Some samples by their numbers, as evaluation sees them."""
        return _Chunks(self.samples, [np.array(rows, np.int64)], self._seed, EVALUATED)[0]
