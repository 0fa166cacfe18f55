"""What the engine asks of a task, of a batch transform and of loaders; it imports none of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Terms = dict[str, tuple[torch.Tensor, torch.Tensor | int]]


class Micro(Protocol):
    """Samples that fit at once."""

    @property
    def samples(self) -> npt.NDArray[np.int64]: ...

    @property
    def data(self) -> Any: ...


class Meter(Protocol):
    """Accumulates outputs; its state can be merged with those of other processes."""

    def update(self, outputs: Any, batch: Any) -> None: ...

    def merge(self, states: list[dict[str, Any]]) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def compute(self) -> dict[str, float]: ...


class Task(Protocol):
    """What is learned, in five methods."""

    def collate(self, inputs: Any, targets: Any, /) -> Any:
        """The inputs and targets of some samples, as one batch."""

    def loss(self, model: nn.Module, batch: Any) -> Terms:
        """Each term of the loss as a sum over the batch and the count that normalises it; one call of the model."""

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """The model's outputs on a batch that went through the serving path."""

    def meter(self) -> Meter:
        """An empty meter."""

    def describe(self) -> dict[str, Any]:
        """Labels and card for the bundle."""


class BatchTransform(Protocol):
    """What is done to a batch on the device: a pure function of the batch and its keys."""

    def train(
        self, batch: Any, *, epoch: int, step: int, rank: int, micro: int, samples: npt.NDArray[np.int64], closing: bool
    ) -> Any: ...

    def evaluate(self, batch: Any) -> Any: ...


class TrainingData(Protocol):
    """Groups of micro-batches in the order of an epoch."""

    @property
    def batch(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    def groups(self, epoch: int, position: int, num_micro: int, *, closing: bool) -> Generator[Any]: ...


class EvaluationData(Protocol):
    """Micro-batches of a split, each sample once."""

    def __iter__(self) -> Iterator[Any]: ...

    def halve(self) -> bool:
        """Half as many samples at once from now on. False if there is one at a time already."""
