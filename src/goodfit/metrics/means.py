"""Figures that are means over samples: of losses and of functions of (output, target)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from goodfit.core.errors import RequestError

Pair = tuple[torch.Tensor, torch.Tensor | int]  # sum and count
Measure = Callable[[Any, dict[str, Any]], Mapping[str, Pair]]


class MeanMeter:
    """Sums and counts of any number of figures, on their device and in float64; nothing is read until `compute`.

    Args:
        measure: From outputs and batch to the sum and count of every figure, the loss's terms by "term/NAME".
    """

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self._sums: dict[str, torch.Tensor] = {}

    def update(self, outputs: Any, batch: dict[str, Any]) -> None:
        """Add a batch."""
        for name, (total, count) in self._measure(outputs, batch).items():
            kind = torch.float32 if total.device.type == "mps" else torch.float64
            pair = torch.stack([total.detach().to(kind), torch.as_tensor(count, device=total.device).to(kind)])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def merge(self, states: list[dict[str, Any]]) -> None:
        """Replace the state by the sum of the states of several meters."""
        names = dict.fromkeys(name for state in states for name in state)
        self._sums = {
            name: torch.tensor(
                [math.fsum(s[name][k] for s in states if name in s) for k in range(2)], dtype=torch.float64
            )
            for name in names
        }

    def state(self) -> dict[str, Any]:
        """Sum and count of every figure as plain values."""
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def compute(self) -> dict[str, float]:
        """The mean of every figure; `loss` is the sum of its terms' means, told apart where there are several."""
        means = {name: total / count if count else math.nan for name, (total, count) in self.state().items()}
        terms = {n.removeprefix("term/"): means.pop(n) for n in list(means) if n.startswith("term/")}
        return {"loss": sum(terms.values()) if terms else math.nan, **(terms if len(terms) > 1 else {}), **means}

    def counts(self) -> dict[str, int]:
        """How many values every figure is the mean of."""
        return {name.removeprefix("term/"): round(count) for name, (_, count) in self.state().items()}


def mean_of(name: str, value: Any, num: int) -> Pair:
    """What a metric returned, as sum and count: a value per sample (or element), or a mean over the samples.

    Raises:
        RequestError: it is neither.
    """
    if isinstance(value, int | float):
        value = torch.tensor(float(value))
    if not isinstance(value, torch.Tensor):
        raise RequestError(f"The metric {name} returned a {type(value).__name__}.",
                           next="return a tensor with a value per sample, or their mean")  # fmt: skip
    value = value.detach()
    value = value.float() if value.dtype in (torch.bool, torch.float16, torch.bfloat16) else value
    return (value.sum(), value.numel()) if value.ndim else (value * num, num)


def accuracy(output: torch.Tensor, target: torch.Tensor, ignored: int = -100) -> torch.Tensor:
    """Whether each prediction is right, bool: the largest logit of dimension 1 against a class number, or, where shapes are
    equal, the sign of a logit against 0 or 1. Targets equal to `ignored` are left out."""
    if output.ndim == target.ndim + 1:
        right = output.argmax(dim=1) == target
    elif output.shape == target.shape:
        right = (output > 0) == (target > 0.5)
    else:
        raise _unlike("accuracy", output, target)
    return right[target != ignored]


def mae(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The absolute error of each element."""
    if output.shape != target.shape:
        raise _unlike("mae", output, target)
    return (output - target).abs()


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The squared error of each element."""
    if output.shape != target.shape:
        raise _unlike("mse", output, target)
    return (output - target) ** 2


def _unlike(name: str, output: torch.Tensor, target: torch.Tensor) -> RequestError:
    return RequestError(f"{name} does not know outputs of shape {tuple(output.shape)} and targets of shape {tuple(target.shape)}.",
                        next="pass a function of (output, target) in its place")  # fmt: skip


NAMED: dict[str, Callable[..., torch.Tensor]] = {"accuracy": accuracy, "mae": mae, "mse": mse}
