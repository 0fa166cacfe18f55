"""The learning-rate range test on a throw-away state: the rate grows exponentially from step to step until training diverges.

After Smith, "Cyclical learning rates for training neural networks" (2017), with the rate growing by a factor instead of
a difference, as in fastai.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

from goodfit.config.lr_range import LrCurve, has_diverged
from goodfit.engine.contracts import Micro
from goodfit.engine.state import TrainState, copy_buffers
from goodfit.engine.step import StepContext, train_step

STEPS, LEAST_STEPS = 100, 40
SECONDS = 20.0  # for all steps, loading included, as far as the least number allows
SETTLING_STEPS = 3  # at a rate of zero: Adam's second moments, and what a step costs
DECADES = 3  # below and above the planned rate

Groups = Callable[[int], Iterator[Sequence[Micro]]]  # the updates of an epoch


def range_test(state: TrainState, context: StepContext, groups: Groups, *, timed: bool) -> LrCurve:
    """Train with a growing learning rate until the smoothed loss is four times its lowest, or not finite.

    All parameter groups keep the ratio of their planned rates; the curve names the first group's. It goes from a
    thousandth to a thousand times the planned rate, in 100 steps.

    Args:
        state: Used up.
        groups: The updates of an epoch, as the run will see them.
        timed: Take fewer steps, 40 at least, where 100 would last longer than 20 seconds. If not, the curve depends on
            nothing but the state and the data.
    """
    made = _endless(state, groups)
    start = time.monotonic()
    for _ in range(SETTLING_STEPS):
        start = time.monotonic()  # of the last one: the first ones choose kernels
        _step(state, context, next(made), 0.0)
    seconds = time.monotonic() - start
    number = max(LEAST_STEPS, min(STEPS, int(SECONDS / seconds))) if timed else STEPS
    rates: list[float] = []
    losses: list[float] = []
    for k in range(number):
        factor = 10 ** (2 * DECADES * k / (number - 1) - DECADES)
        loss, rate = _step(state, context, next(made), factor)
        if not math.isfinite(loss):
            return LrCurve(rates=tuple(rates), losses=tuple(losses), diverged=True)
        rates.append(rate)
        losses.append(loss)
        if has_diverged(losses, rates):
            return LrCurve(rates=tuple(rates), losses=tuple(losses), diverged=True)
    return LrCurve(rates=tuple(rates), losses=tuple(losses))


def _endless(state: TrainState, groups: Groups) -> Iterator[Sequence[Micro]]:
    """The updates of one epoch after another."""
    while True:
        yield from groups(state.progress.epoch)
        state.progress.epoch += 1


def _step(state: TrainState, context: StepContext, group: Sequence[Micro], factor: float) -> tuple[float, float]:
    """One update; the loss before it, and the first group's rate."""
    record = train_step(state, context, group, factor, copy_buffers(state.model))
    return float(record.loss), record.lr
