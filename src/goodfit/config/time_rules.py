"""What a time for the whole run holds, by what a first step took, and what is left out to keep it. Pure functions, and the only home of these
shares."""

from __future__ import annotations

import math

from goodfit.config.chooser import Chooser
from goodfit.config.facts import Facts, FirstStep
from goodfit.config.plan import Decision, Plan

PASSES = 15  # over the training samples that a time should hold: a detector's input is smaller for fewer, and longer times are proposed for it
FEW_PASSES = 5  # of a detector, below which a person is told that little will be learned
STEPS_SHARE = 0.5  # of a time that is the steps'; the rest goes to audit, plan, rehearsal, validation, test and bundle
REHEARSAL_STEPS = 36  # that a rehearsal takes at least, about ...
REHEARSAL_SHARE = 0.25  # ... and the share of a time beyond which it is left out
ASIDE_SHARE = 0.1  # of a time, for what only stands beside the result: wrong labels, the linear probe, ways to compute
WAY_STEPS = 8  # that a way to compute is timed for, at least
KEPT_PASSES = 2.0  # below which decoded pictures are not kept for the next
FORWARD = 3.0  # forward passes that a step takes as long as


def passes_in(time: float, first: FirstStep, imgsz: int, num_train: int) -> float:
    """Passes over the training samples that so many seconds hold, about."""
    return STEPS_SHARE * time / (first.at(imgsz) * num_train)


def few_passes(plan: Plan, facts: Facts) -> str:
    """What to say of a time that holds too few passes for a detector to learn much, or not one pass for a classifier; "" otherwise."""
    first, time = facts.first_step, plan.time.value
    detects = plan.task.value != "classify"
    if (
        first is None
        or not time
        or (passes := passes_in(time, first, plan.imgsz.value, facts.data.num_train))
        >= (FEW_PASSES if detects else 1.0)
    ):
        return ""
    little = ", from which little is learned" if detects else ""
    return (f"{time:.0f} s hold about {passes:.2g} passes over the training pictures{little}; "
            f"time={math.ceil(PASSES * time / passes / 60)}m would hold {PASSES}")  # fmt: skip


def choose_rehearse(choose: Chooser, facts: Facts, batch: int, imgsz: int) -> Decision[bool]:
    """Whether training is tried out before it begins."""
    first, time = facts.first_step, choose.request.time
    takes = 0.0 if first is None else REHEARSAL_STEPS * batch * first.at(imgsz)
    if time and takes > REHEARSAL_SHARE * time:
        return choose("rehearse", False, f"it would take about {takes:.0f} of the {time:.0f} s", "measured")
    return choose("rehearse", True, "a minute now against a night lost")


def is_worth(seconds: float, time: float) -> bool:
    """Whether so many seconds may be spent on what only stands beside the result; without a `time` (0) always."""
    return not time or seconds <= ASIDE_SHARE * time
