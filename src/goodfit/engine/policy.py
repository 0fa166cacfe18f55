"""How long to train: what counts as better, when a plateau ends the stable rate, when a run is extended."""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from goodfit.engine.budget import COOL_DOWN_SHARE, TimeBudget, fit_schedule
from goodfit.engine.ranks import Ranks
from goodfit.engine.schedule import Schedule
from goodfit.engine.state import Progress

LAST_PART = 0.25  # of the validations: a best within it says that training longer pays (Tuning Playbook: best in the last quarter)
MISTAKEN = 0.25  # of the steps done: with time for so many more, the end that an estimate gave was none
EXTENSION = "extension"
COOL_DOWN = "cool-down"


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """What may stop or change training.

    Attributes:
        patience: Validations without a gain before the rate is cooled down; 0 is off.
        min_delta: Gain that counts, relative.
        monitor: The validation figure to watch.
        maximise: Whether more of it is better.
        most_epochs: Up to which a run that still improves is extended, or a time budget reaches; not more than its
            schedule's: never.
        decay, close: Shares of a run that keeps to a time, over which the rate falls and strong augmentation is off.
        warmup: Of such a run, as it was planned, epochs.
        thawed: Step from which all trains that ever will: patience counts from there, as from the end of warm-up.
        time: When training must have ended; None is whenever its schedule does.
    """

    patience: int
    min_delta: float
    monitor: str
    maximise: bool
    most_epochs: int = 0
    decay: float = 0.0
    close: float = 0.0
    warmup: float = 0.0
    thawed: int = 0
    time: TimeBudget | None = None


def take_note(progress: Progress, metrics: dict[str, float], settings: FitSettings) -> bool:
    """Compare a validation with the best so far. A figure that is not finite is never better; ties are broken by the loss.

    `best` is the best of the whole run and becomes the model. `reference` is the best on the way that led here at a rate
    that had not begun to fall: patience counts from it, and a cool-down starts from it.

    Returns:
        Whether the state is to be kept, as the best or as the reference.
    """
    value, loss = metrics[settings.monitor], metrics["loss"]
    sign = 1 if settings.maximise else -1
    progress.losses.append(loss if math.isfinite(loss) else sys.float_info.max)
    here = {"segment": progress.segment, "step": progress.step, "epoch": progress.epoch, "value": value, "loss": loss,
            "metrics": {name: figure for name, figure in metrics.items() if math.isfinite(figure)}}  # fmt: skip
    if progress.reference is not None and progress.reference["step"] <= settings.thawed < progress.step:
        progress.reference = progress.counted = None  # what more of the network can do is compared with itself

    def better(than: dict[str, Any] | None) -> bool:
        if not (math.isfinite(value) and math.isfinite(loss)):
            return False
        return than is None or (sign * value, -loss) > (sign * than["value"], -than["loss"])

    counted = progress.counted
    gain = math.inf if counted is None else sign * (value - counted) - settings.min_delta * abs(counted)
    counts = gain > 0 and math.isfinite(value) and math.isfinite(loss)
    waiting = progress.step > max(progress.schedule.warmup_steps, settings.thawed)
    progress.bad_epochs = 0 if counts or not waiting else progress.bad_epochs + 1
    if counts:
        progress.counted = value
    renewed = better(progress.reference)
    if renewed:
        progress.reference = here
    if better(progress.best):
        progress.best = here
        return True
    return renewed


def is_plateau(progress: Progress, settings: FitSettings) -> bool:
    """Patience is spent, at a rate that has not begun to fall for good."""
    schedule = progress.schedule
    stable = schedule.is_stable(progress.step) and not schedule.is_averaging(progress.step)
    allowed = settings.patience > 0 and progress.branch != COOL_DOWN and progress.reference is not None
    allowed = allowed and not progress.without_patience
    return allowed and stable and progress.bad_epochs >= settings.patience


def cool_down(progress: Progress, steps_per_epoch: int) -> tuple[Schedule, int]:
    """The schedule of a cool-down from a state, over a fifth of the steps done but at least an epoch; and its epochs."""
    least = 1 if progress.schedule.averaging_from < 0 else 2  # one model is no average
    epochs = max(least, math.ceil(COOL_DOWN_SHARE * progress.step / steps_per_epoch))
    return progress.schedule.cool_down(progress.step, epochs * steps_per_epoch), epochs


def reason_to_extend(progress: Progress, settings: FitSettings, steps_per_epoch: int) -> str:
    """Why a run whose rate would fall in the next epoch is extended instead; "" if it is not.

    It is if the best validation lies in the last quarter of those so far, and the validation loss is not rising: the
    median of its last quarter is not above that of the quarter before. Judged before the rate falls, since then nearly
    every run improves, also one that has learned what it can.
    """
    schedule = progress.schedule
    before_decay = progress.step <= schedule.stable_until < progress.step + steps_per_epoch
    longer = settings.most_epochs * steps_per_epoch > schedule.total_steps
    if schedule.kind != "wsd" or not before_decay or not longer or settings.time is not None:
        return ""
    if progress.branch == COOL_DOWN or progress.reference is None or len(progress.losses) < 8:
        return ""
    part = max(1, round(LAST_PART * len(progress.losses)))
    last, before = (statistics.median(part_of) for part_of in
                    (progress.losses[-part:], progress.losses[-2 * part : -part]))  # fmt: skip
    since = progress.epoch - progress.reference["epoch"]
    if since > part or last > before:
        return ""
    return (f"still improving: best {since} epochs ago of {len(progress.losses)}, "
            f"validation loss {before:.3g} → {last:.3g} over the last half")  # fmt: skip


def reason_of_end(progress: Progress, settings: FitSettings, steps_per_epoch: int) -> str:
    """What ended a run at the last step of its schedule."""
    if progress.branch == COOL_DOWN:
        return COOL_DOWN
    shortened = progress.schedule.total_steps < settings.most_epochs * steps_per_epoch
    return "time budget" if settings.time is not None and shortened else "schedule"


def keep_to_time(progress: Progress, settings: FitSettings, steps_per_epoch: int, ranks: Ranks) -> None:
    """Fit the schedule to what is left of a time budget, now and then; all processes by the same number of steps."""
    budget = settings.time
    if budget is None:
        return
    ends = progress.step >= progress.schedule.total_steps  # by an estimate, which may have been wrong by far
    if not ranks.any(budget.is_due(progress.step, steps_per_epoch) or ends):
        return
    left = budget.steps_left(progress.step, steps_per_epoch)
    if ranks.size > 1:  # all processes decide alike
        unknown = ranks.any(left is None)
        mean = int(ranks.sum_(torch.tensor(float(left or 0))) / ranks.size)
        left = None if unknown else mean
    if left is None or (ends and left < MISTAKEN * progress.step):
        return
    progress.schedule = fit_schedule(progress, left, most_steps=settings.most_epochs * steps_per_epoch,
                                     decay=settings.decay, close=settings.close,
                                     warmup=round(settings.warmup * steps_per_epoch))  # fmt: skip


def lengthened(schedule: Schedule, total_steps: int) -> Schedule:
    """The same schedule over more steps, from the first on: warm-up stays, decay and closing grow with the whole."""
    ratio = total_steps / schedule.total_steps
    decay = round(ratio * (schedule.total_steps - schedule.stable_until))
    closing = -1
    if schedule.closing_from >= 0:
        closing = total_steps - round(ratio * (schedule.total_steps - schedule.closing_from))
    made = replace(schedule, total_steps=total_steps, stable_until=total_steps - decay, closing_from=closing)
    if schedule.averaging_from >= 0:
        made = made.averaging(round(ratio * (schedule.total_steps - schedule.averaging_from)))
    return made
