"""The rehearsal of a module that was handed over: what can be checked without knowing what it is for.

The checks are those of image runs, as far as they are general. A module may come with weights that know something already,
so a loss far from chance is no mistake; its loss may be any function, so only falling counts. Pictures, labels and
export are not looked at.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from goodfit.engine.contracts import Micro
from goodfit.engine.schedule import Schedule
from goodfit.engine.step import StepContext
from goodfit.planning.checks import (
    Build,
    Check,
    check_evaluation,
    check_gradients,
    check_leak,
    check_learning_rate,
    check_loss,
    check_outputs,
    evaluating,
)
from goodfit.planning.rehearsal import Rehearsal, check_round_trip, stop_if_failed, trial_state
from goodfit.planning.tensors import outputs_of
from goodfit.planning.trials import PlainTransform, check_subset, overfit

WORSE = 0.2  # of its start by which the loss of the subset run may be higher at the end before that is divergence
OVERFIT_SECONDS = 10.0  # it only has to fall


def rehearse_module(
    model: nn.Module, context: StepContext, *, schedule: Schedule, build_optimizer: Build, few: Micro,
    batches: Sequence[Sequence[Micro]],
) -> Rehearsal:  # fmt: skip
    """Check that training can work, in some seconds; all on copies.

    Args:
        model: The module, on its device.
        build_optimizer: Makes the run's optimizer for such a module.
        few: Eight training samples or fewer.
        batches: The first batches of training, each as its micro-batches.

    Raises:
        RehearsalError: a check failed.
    """
    with torch.random.fork_rng():
        start, found = _check_start(model, context, few)
        checks = [found, *definite_checks(model, context, schedule, build_optimizer, few)]
        stop_if_failed(checks)
        trained = trial_state(model, context, build_optimizer)
        plain = replace(context, transform=PlainTransform(context.transform))
        losses = overfit(trained, plain, few, 0.0 if start > 0 else -math.inf, seconds=OVERFIT_SECONDS)
        checks.append(_check_falling(losses, len(few.samples)))
        stop_if_failed(checks)
        checks.append(check_round_trip(trained.model, context, lambda: copy.deepcopy(model), few))
        subset, bare_rate = check_subset(trial_state(model, context, build_optimizer), context, batches, slack=0.0)
        checks.append(_not_diverging(subset))
        stop_if_failed(checks)
    return Rehearsal(tuple(checks), bare_rate)


def definite_checks(
    model: nn.Module, context: StepContext, schedule: Schedule, build_optimizer: Build, few: Micro
) -> list[Check]:
    """The checks without training, in float32 where they compare outputs."""
    num = len(few.samples)
    precise = replace(context, device=replace(context.device, precision="fp32"))
    data = context.transform.evaluate(context.device.move(few.data))
    judged = evaluating(model)
    checks = [check_evaluation(judged, precise, data, num)]
    if context.task.describe()["output"] == "logits":
        checks.append(check_outputs(judged, precise, data))
    if checks[0].passed and _has_rows(judged, precise, data, num):
        checks.append(check_leak(judged, precise, data, num))
    checks.append(_exactness(check_loss(judged, precise, (data,), num), exact=context.task.describe()["exact"]))
    checks.append(check_gradients(model, precise, build_optimizer, data))
    if checks[-1].passed:
        checks.append(check_learning_rate(trial_state(model, context, build_optimizer), context, schedule, few))
    return checks


def _check_start(model: nn.Module, context: StepContext, few: Micro) -> tuple[float, Check]:
    """The training loss of some samples before any update is a number."""
    with torch.no_grad(), context.device.autocast():
        terms = context.task.loss(
            copy.deepcopy(model).train(), context.transform.evaluate(context.device.move(few.data))
        )
    loss = sum(float(total) / (float(count) or 1.0) for total, count in terms.values())
    return loss, Check("loss at start", math.isfinite(loss), f"loss at start {loss:.3g}",
                       "inputs or targets that hold NaN or infinite values, or a module that divides by zero")  # fmt: skip


def _has_rows(model: nn.Module, context: StepContext, data: Any, num: int) -> bool:
    """Whether every output has a row per sample, so that samples can be told apart."""
    with torch.inference_mode():
        made = outputs_of(context.task.predict(model, data))
    return bool(made) and all(len(t) == num for t in made)


def _exactness(check: Check, *, exact: bool) -> Check:
    """A mean of an own function that is no mean over samples is no mistake; it only makes accumulation inexact."""
    if check.passed or exact:
        return check
    evidence = f"{check.evidence}: no mean over samples, so that micro-batches (accumulate=) are not exact"
    return replace(check, passed=True, evidence=evidence)


def _check_falling(losses: Sequence[float], num: int) -> Check:
    first, last = losses[0], losses[-1]
    return Check(
        "overfit a few samples",
        math.isfinite(last) and (last < first or abs(last) < 1e-6),
        f"{num} samples: loss {first:.3g} → {last:.3g} in {len(losses)} steps",
        "a loss that does not fall on eight samples: a learning rate far too high or low, outputs that do not reach the loss, "
        "or targets that do not belong to the inputs",
    )


def _not_diverging(check: Check) -> Check:
    """Within some steps the loss of a module that knows something already may not fall; it must not rise much."""
    if check.passed or check.first is None or check.last is None:
        return check
    return replace(check, passed=check.last - check.first <= WORSE * abs(check.first))
