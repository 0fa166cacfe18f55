"""A time budget: the schedule is fitted, again and again, to the steps that are left until it is spent."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from goodfit.engine.schedule import Schedule
from goodfit.engine.state import Progress

MOST_RESERVED = 0.5  # of the budget, for what comes after training
CHECK_SHARE = 0.01  # of the budget between two looks at the clock, within an epoch ...
CHECK_SECONDS = (0.5, 30.0)  # ... but within these
SLACK = 0.01  # of the steps left, by which an estimate may move without a new schedule
FEW_STEPS = 4  # of an epoch: without its first, too few would be left to be timed
COOL_DOWN_SHARE = (
    0.2  # of the steps done, when patience or the end of the time ends a rate that does not fall by itself
)
WARMUP_SHARE = 0.05  # of the run that warm-up may take, where the budget turns out short
STRETCHED = ("wsd", "cosine", "linear")  # schedules that can be fitted to another length on the way


@dataclass(slots=True, kw_only=True)
class TimeBudget:
    """Seconds that a run may take from its first command on, and what of them is used.

    Attributes:
        seconds: In all.
        used: By earlier processes of the run.
        reserve: For what comes after training beside looks at pictures: the bundle, the report.
        served: Samples that are looked at after training (the test, the threshold), over those of a validation.
        validation: What a validation takes, as far as is known: the longest so far, as what follows is read from files too.
        rest_seconds: What an epoch takes beside its steps: validation, saving.
        began: When this process began with the run, by time.monotonic.
    """

    seconds: float
    used: float = 0.0
    reserve: float = 0.0
    served: float = 0.0
    validation: float = 0.0
    rest_seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)
    _looked: float = field(default_factory=lambda: time.monotonic())
    _mark: tuple[float, int] | None = None
    _start: tuple[float, int] = (0.0, 0)
    _wait: float | None = None
    _step_seconds: float = 0.0

    def spent(self) -> float:
        """Seconds of the run so far."""
        return self.used + time.monotonic() - self.began

    def left(self) -> float:
        """Seconds that training still has; may be below zero."""
        return self.seconds - min(self.afterwards, MOST_RESERVED * self.seconds) - self.spent()

    @property
    def afterwards(self) -> float:
        """Seconds of what comes after training, as far as is known."""
        return self.reserve + self.served * self.validation

    def begin_epoch(self, step: int) -> None:
        """What passed since the epoch before ended was not its steps'."""
        self._mark, self._start = None, (time.monotonic(), step)

    def end_epoch(self, rest_seconds: float, validation: float = 0.0) -> None:
        """Take note of what an epoch took beside its steps, and of its validation. The wait for its first step belongs to it, but for the
        first epoch's, in which kernels are compiled."""
        self.validation = max(self.validation, validation)
        if self._wait is not None:
            rest_seconds += self._wait
        self._wait = 0.0
        self.rest_seconds = 0.5 * (self.rest_seconds + rest_seconds) if self.rest_seconds else rest_seconds

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether it is time to look at the clock and the schedule again, after a step.

        Steps are timed from the first one of an epoch on, which waits for loaders and compilers; from its start where it has few.
        """
        low, high = CHECK_SECONDS
        now = time.monotonic()
        if self._mark is None:
            few = steps_per_epoch <= FEW_STEPS
            self._mark = self._start if few else (now, step)
            if self._wait is not None and not few:
                self._wait = now - self._start[0]
        if step == self._mark[1]:
            return False  # nothing is timed yet
        return now - self._looked >= min(high, max(low, CHECK_SHARE * self.seconds))

    def steps_left(self, step: int, steps_per_epoch: int) -> int | None:
        """Updates that fit into what is left, at the pace of the last ones; None before any was made."""
        now = self._looked = time.monotonic()
        if self._mark is not None and step > self._mark[1]:
            latest = (now - self._mark[0]) / (step - self._mark[1])
            self._step_seconds = 0.5 * (self._step_seconds + latest) if self._step_seconds else latest
            self._mark = now, step
        if not self._step_seconds:
            return None if self.left() > 0 else 0
        left = self.left() - self.rest_seconds  # the last validation
        return max(0, int(left / (self._step_seconds + self.rest_seconds / steps_per_epoch)))


def fit_schedule(
    progress: Progress, steps_left: int, *, most_steps: int, decay: float, close: float = 0.0, warmup: int = 0
) -> Schedule:
    """The schedule that ends when the time does, without a jump of the rate.

    Before the decay, decay and end move. Within it, what is done of it stays done: of a half-cosine over which 30 % has
    been covered, the other 70 % follow in the steps that are left. A schedule that cannot be stretched is left as it is
    while there is time for it, and cooled down over the last fifth of the steps where there is not.

    Args:
        most_steps: Never planned beyond; a cool-down is never made longer.
        decay, close: Shares of the run at its end over which wsd falls, and strong augmentation is off. Not those of the
            schedule as it is: an estimate that was far too short would leave its traces.
        warmup: Its steps as they were planned, for the same reason; those of the schedule where it is 0.
    """
    schedule, step = progress.schedule, progress.step
    most = min(most_steps, schedule.total_steps) if progress.branch == "cool-down" else most_steps
    total = max(step, min(most, step + steps_left))
    if abs(total - schedule.total_steps) <= SLACK * max(1, schedule.total_steps - step):
        return schedule
    if total == step:  # the time is over
        return replace(schedule, total_steps=total)
    if schedule.kind not in STRETCHED:
        late = total - step <= COOL_DOWN_SHARE * total
        return schedule.cool_down(step, total - step) if late and total < schedule.total_steps else schedule
    mistaken = step >= schedule.total_steps  # an end that was none: as if it had never begun to end
    closing = schedule.closing_from
    if closing > step or (mistaken and closing >= 0):
        closing = max(step, total - round(close * total))
    if step >= schedule.stable_until and not mistaken:  # in the decay
        done = (step - schedule.stable_until) / max(1, schedule.total_steps - schedule.stable_until)
        begin = schedule.stable_until if done >= 1 else round((step - done * total) / (1 - done))
        return replace(schedule, total_steps=total, stable_until=begin, closing_from=closing)
    rises = schedule.warmup_steps
    if step < rises:
        rises = min(warmup or rises, max(step + 1, round(WARMUP_SHARE * total)))
    stable = rises
    if schedule.kind == "wsd":
        stable = max(step, rises, total - round(decay * total))
    return replace(schedule, total_steps=total, warmup_steps=rises, stable_until=stable, closing_from=closing)
