"""The rehearsal's short trainings, on copies: a few samples overfitted, with and without their pictures, and a subset."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from goodfit.engine.contracts import BatchTransform, Micro
from goodfit.engine.device import is_out_of_memory
from goodfit.engine.state import TrainState, copy_buffers
from goodfit.engine.step import StepContext, train_step
from goodfit.planning.checks import Check
from goodfit.planning.tensors import changed, is_input, is_picture, tensors_of

MAX_OVERFIT_STEPS = 100
MIN_OVERFIT_STEPS = 16
REACHED = 0.1  # of the way from the start to the lowest possible loss that may be left
FALLING = 0.75  # a loss below this share of the start after all steps still counts as learning
FALLING_FROZEN = 0.95  # where something is frozen to the end
BLIND_STEPS = 30  # of the overfit that are done again without the pictures
AHEAD = 0.02  # of the way down by which the real training must be ahead of the one without pictures
WARM_STEPS = 5  # of the subset run, in which the learning rate rises
SUBSET_STEPS = 24
MIN_SUBSET_STEPS = 12  # three passes over four batches; 2 to warm up and 10 to measure the rate
SUBSET_SECONDS = 6.0
AGAIN = 3  # times as many steps, once, before a loss that has not fallen yet is called one


class PlainTransform:
    """The evaluation transform in place of the training one: no augmentation while a few samples are overfitted."""

    def __init__(self, transform: BatchTransform) -> None:
        self._transform = transform

    def train(self, batch: Any, **_keys: Any) -> Any:
        """The batch as evaluation sees it."""
        return self._transform.evaluate(batch)

    def evaluate(self, batch: Any) -> Any:
        """The batch as evaluation sees it."""
        return self._transform.evaluate(batch)


class _Blind(PlainTransform):
    """The same mean picture for every sample: what is left to learn is how often each label comes."""

    def train(self, batch: Any, **_keys: Any) -> Any:
        return changed(self.evaluate(batch), lambda t: t.mean(0, keepdim=True).expand_as(t) if is_input(t) else t)


def overfit(
    state: TrainState, context: StepContext, few: Micro, lowest: float, *, seconds: float = math.inf
) -> list[float]:
    """Train on a few samples alone until nearly all of their loss is gone, or for 100 steps; the losses before each.

    Args:
        seconds: After which it ends too, with 16 steps at least: enough to see the loss fall.
    """
    losses: list[float] = []
    began = time.perf_counter()
    for _ in range(MAX_OVERFIT_STEPS):
        losses.append(_step(state, context, [few], 1.0))
        if len(losses) >= MIN_OVERFIT_STEPS and time.perf_counter() - began > seconds:
            break
        if not math.isfinite(losses[-1]) or losses[-1] <= lowest + REACHED * (losses[0] - lowest):
            break
    return losses


def check_overfit(losses: Sequence[float], num: int, lowest: float, start: float, *, frozen: bool) -> Check:
    """A few samples can be learned by heart.

    Args:
        start: The loss that the way down is measured from: the first, or that of chance where the head knows some already.
        frozen: Whether something is frozen to the end: what is left learns slowly, and perhaps not by heart.
    """
    first, last, steps = losses[0], losses[-1], len(losses)
    reached = math.isfinite(last) and last <= lowest + REACHED * (start - lowest)
    falling = math.isfinite(last) and last - lowest <= (FALLING_FROZEN if frozen else FALLING) * (start - lowest)
    evidence = (
        f"{num} images overfitted in {steps} steps"
        if reached
        else f"{num} images: loss {first:.2f} → {last:.2f} in {steps} steps"
    )
    return Check(
        "overfit a few samples",
        reached or falling,
        evidence,
        "a model that cannot fit eight samples has a learning rate of zero or far too high or low, frozen weights, or "
        "labels that do not belong to the images",
    )


def check_blind(state: TrainState, context: StepContext, few: Micro, losses: Sequence[float], lowest: float) -> Check:
    """A model that sees the same mean picture for every sample learns less in as many steps.

    Args:
        state: A copy of the run's, which is used up.
        losses: Those of `overfit`, with the same labels and, up to there, the same steps.
    """
    meaning = "the pictures do not reach the outputs: blank pictures, a layer that multiplies by zero, a dead network"
    if not any(is_picture(t) for t in tensors_of(few.data).values()):
        return Check("better than blind", True, "no pictures to leave out", meaning)
    steps = min(BLIND_STEPS, len(losses))
    blind = replace(context, transform=_Blind(context.transform))
    losses_blind = [_step(state, blind, [few], 1.0) for _ in range(steps)]
    ahead = min(losses_blind) - min(losses[:steps])
    return Check(
        "better than blind",
        not ahead < AHEAD * (losses[0] - lowest),
        f"loss {min(losses[:steps]):.2f} with pictures and {min(losses_blind):.2f} without, after {steps} steps",
        meaning,
    )


def check_subset(
    state: TrainState, context: StepContext, batches: Sequence[Sequence[Micro]], *, slack: float
) -> tuple[Check, float]:
    """Some steps as the run will do them, over and over a few batches: their loss falls.

    The first pass over the batches is at a learning rate of zero and gives their loss at the start, with dropout and
    mixing as in training. 24 steps are taken in all, fewer where they last longer than 6 seconds; three times as many
    where the loss has not fallen by then.

    Args:
        state: A copy of the run's, which is used up.
        slack: By how much the loss may have risen.

    Returns:
        The check, and the samples per second of the step alone, on batches in memory: the median of all but two steps.
    """
    losses: list[float] = []
    seconds: list[float] = []
    num = len(batches)
    planned = SUBSET_STEPS
    while len(losses) < planned and (not losses or math.isfinite(losses[-1])):
        start = time.perf_counter()
        factor = min(1.0, max(0, len(losses) - num + 1) / WARM_STEPS)
        losses.append(_step(state, context, batches[len(losses) % num], factor))
        seconds.append(time.perf_counter() - start)
        if planned == SUBSET_STEPS and sum(seconds) > SUBSET_SECONDS:
            planned = max(MIN_SUBSET_STEPS, len(losses))
        if len(losses) == planned <= SUBSET_STEPS and not _last(losses, num) < _first(losses, num):
            planned *= AGAIN
    first, last = _first(losses, num), _last(losses, num)
    check = Check(
        "subset run",
        last < first + slack,
        f"loss {first:.2f} → {last:.2f} in {len(losses)} steps over {num} training batches",
        "a learning rate that is too high or far too low, augmentation that destroys what tells the classes apart, or "
        "targets that are mixed wrongly",
        first,
        last,
    )
    return check, sum(len(micro.samples) for micro in batches[0]) / statistics.median(seconds[2:] or seconds)


def check_sizes(state: TrainState, context: StepContext, extremes: Sequence[Sequence[Micro]]) -> Check:
    """One step at the smallest and one at the largest input of the run, at a learning rate of zero: the network takes
    both, and there is memory for them.

    Args:
        state: A copy of the run's, which is used up.
        extremes: A batch of each size.

    Raises:
        RuntimeError: memory ran out.
    """
    sides, problem = [], ""
    for group in extremes:
        sides.append(str(max(t.shape[-1] for t in tensors_of(group[0].data).values() if is_picture(t))))
        try:
            _step(state, context, group, 0.0)
        except (RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            problem = f"inputs of {sides[-1]} pixels cannot be taken: {str(error).splitlines()[0]}"
            break
    return Check(
        "input sizes",
        not problem,
        problem or f"a step with inputs of {' and of '.join(sides)} pixels",
        "multi_scale= or progressive= give sizes that this network, or its batch norm on few samples, cannot take",
    )


def _first(losses: Sequence[float], num: int) -> float:
    """The mean loss of the first pass over the batches."""
    return statistics.fmean(losses[:num])


def _last(losses: Sequence[float], num: int) -> float:
    """The mean loss of the last passes over the batches, as many as fit into a third of the steps."""
    return statistics.fmean(losses[-max(1, len(losses) // 3 // num) * num :])


def _step(state: TrainState, context: StepContext, group: Sequence[Micro], factor: float) -> float:
    """One update of a copy; the loss before it. Reading it waits for the device."""
    record = train_step(state, context, group, factor, copy_buffers(state.model))
    return float(record.loss)
