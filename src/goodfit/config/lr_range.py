"""The learning-rate range test: its curve, and what follows from it. Plain values and pure functions.

After Smith, "Cyclical learning rates for training neural networks" (2017).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SMOOTHED_DECADES = 0.27  # of the rate, over which a loss's weight in an average falls to 1/e: 4.5 of 100 steps
DIVERGED = 4.0  # times the lowest smoothed loss, at which the test ends
MIN_STEPS = 20  # of a curve that says anything
REACHED = 0.5  # of the whole fall of the smoothed loss: the rate at which it is reached is suggested


@dataclass(frozen=True, slots=True, kw_only=True)
class LrCurve:
    """What a range test saw: the rate of each step, and the training loss before it; `problem` if there is none."""

    rates: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    diverged: bool = False
    problem: str = ""

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> LrCurve:
        """From what asdict made and JSON kept; raises KeyError, TypeError or ValueError if it does not fit."""
        return cls(rates=_floats(value["rates"]), losses=_floats(value["losses"]), diverged=bool(value["diverged"]),
                   problem=str(value["problem"]))  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LrRange:
    """A range test with what follows from it.

    Attributes:
        rates: Learning rate of each step, of the backbone where it has its own.
        losses: Training loss before each step.
        smoothed: Their average (`smooth`).
        table: The rate that would be taken without the test.
        suggestion: The rate to take; 0 where the curve shows none.
        reason: How it was found, or why it was not.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    table: float
    suggestion: float
    reason: str

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> LrRange:
        """The inverse of asdict; raises KeyError, TypeError or ValueError if it does not fit."""
        return cls(rates=_floats(value["rates"]), losses=_floats(value["losses"]), smoothed=_floats(value["smoothed"]),
                   table=float(value["table"]), suggestion=float(value["suggestion"]), reason=str(value["reason"]))  # fmt: skip


def _floats(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def has_diverged(losses: Sequence[float], rates: Sequence[float]) -> bool:
    """Whether the exponential average of the losses so far, which knows nothing of later ones, ends at four times its lowest."""
    average = _average(losses, _keep(rates))
    return bool(average) and not (math.isfinite(average[-1]) and average[-1] <= DIVERGED * min(average))


def smooth(losses: Sequence[float], rates: Sequence[float]) -> list[float]:
    """The mean of the exponential averages from both ends, of losses cut at the highest of the first decade.

    One average alone lags behind: on three datasets it put the fall at two to three times its rate. The cut keeps the
    divergence at the end out of what came before it.

    Args:
        losses: One per step.
        rates: Of the same steps, growing by one factor.
    """
    keep, highest = _keep(rates), max(losses[: _first_decade(rates)], default=0.0)
    cut = [min(loss, highest) for loss in losses]
    return [(a + b) / 2 for a, b in zip(_average(cut, keep), _average(cut[::-1], keep)[::-1], strict=True)]


def _average(losses: Sequence[float], keep: float) -> list[float]:
    """The exponential average, corrected for its start at zero (as in Kingma and Ba 2015)."""
    made: list[float] = []
    average = 0.0
    for number, loss in enumerate(losses, start=1):
        average = keep * average + (1 - keep) * loss
        made.append(average / (1 - keep**number))
    return made


def _keep(rates: Sequence[float]) -> float:
    """What the average keeps at each step, so that it looks back by the same part of the curve at any number of steps."""
    if len(rates) < 2:
        return 0.0
    return math.exp(-math.log10(rates[-1] / rates[0]) / (len(rates) - 1) / SMOOTHED_DECADES)


def _first_decade(rates: Sequence[float]) -> int:
    """Steps up to ten times the first rate, in which nothing is learned yet."""
    return sum(rate <= 10 * rates[0] for rate in rates)


def judge(curve: LrCurve, table: float) -> LrRange:
    """What follows from a curve: the rate at which the smoothed loss has done half of its whole fall.

    Largest over smallest suggestion of three seeds on digits, trashnet, CIFAR-10 and face crops: 1.2, 1.4, 1.3 and 1.3. On
    the same curves the steepest fall gives 2.0, 4.2, 1.3 and 3.5, fastai's valley 1.5, 1.9, 1.1 and 1.7, a tenth of the
    rate of the lowest loss 1.5, 1.2, 1.3 and 1.3 (benchmarks/lr_find.py rules). There is no suggestion where the fall does
    not stand out from the differences between batches.

    Args:
        table: The rate that would be taken without the test.
    """
    rates, smoothed = curve.rates, smooth(curve.losses, curve.rates)

    def without(why: str) -> LrRange:
        return LrRange(rates=rates, losses=curve.losses, smoothed=tuple(smoothed), table=table, suggestion=0.0,
                       reason=f"range test without a suggestion: {why}")  # fmt: skip

    if curve.problem or len(rates) < MIN_STEPS:
        return without(curve.problem or f"it diverged after {len(rates)} steps")
    early = _first_decade(rates)
    start, noise = statistics.median(smoothed[:early]), statistics.stdev(curve.losses[:early])
    lowest = min(range(len(rates)), key=smoothed.__getitem__)
    fall = start - smoothed[lowest]
    if fall <= 2 * noise:
        return without(f"the loss falls by {max(0.0, fall):.2g}, batches differ by {noise:.2g}")
    half = max((k for k in range(lowest) if smoothed[k] > start - REACHED * fall), default=-1) + 1
    lost = next((r for r, s in zip(rates[lowest:], smoothed[lowest:], strict=True) if s >= start - REACHED * fall), 0.0)
    end = f"half lost again at {lost:.2g}" if lost else f"the test ended at {rates[-1]:.2g}"
    if curve.diverged and not lost:
        end = f"diverges at {rates[-1]:.2g}"
    taken = float(f"{rates[half]:.2g}")
    return LrRange(rates=rates, losses=curve.losses, smoothed=tuple(smoothed), table=table, suggestion=taken,
                   reason=f"range test: half of the loss's fall is reached at {taken:.2g}; lowest at {rates[lowest]:.2g}, {end}")  # fmt: skip
