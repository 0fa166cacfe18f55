"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

ONE_CYCLE_START = 1 / 25  # of the peak, as torch.optim.lr_scheduler.OneCycleLR; its momentum likewise:
ONE_CYCLE_MOMENTUM = (0.95, 0.85)  # at the ends, at the peak
CYCLIC = ("triangular", "triangular2", "exp-range")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A learning-rate schedule over the steps of one segment, equal to torch's of the same name where there is one.

    - `wsd` stays, then falls along half a cosine (warm-up, stable, decay: Hu et al. 2024, MiniCPM; Hägele et al. 2024).
    - `cosine` falls so from the end of warm-up on (Loshchilov and Hutter 2017); `linear` along a line; `exponential` by
      `gamma` at each step; `constant` does not fall.
    - `step` falls by `gamma` every `period` steps, `multistep` at `milestones`; both count from the first step.
    - `plateau` falls by `gamma` for each of its `reductions`, down to `lrf`; see `after_validation`.
    - `restarts` is `cosine` over and over, every `period` steps (SGDR, Loshchilov and Hutter 2017).
    - `triangular` rises from `lrf` to the peak in `period` steps and falls again in as many; `triangular2` halves the
      height at each cycle, `exp-range` multiplies it by `gamma` at each step (Smith 2017).
    - `onecycle` rises from 1/25 of the peak and falls to `lrf`, each along half a cosine, and momentum goes the other way
      (Smith and Topin 2019). Its rise is `warmup_steps`; before all others the rate is warmed up linearly.

    Attributes:
        kind: One of the names above.
        warmup_steps: Steps of linear warm-up, or of one-cycle's rise.
        stable_until: Step at which the decay begins; `total_steps` where none is planned.
        total_steps: Step at which it ends.
        lrf: Last factor, a share of the peak; lowest factor where the rate goes up and down.
        start_factor: Factor from which wsd's decay starts.
        begin: Step at which warm-up begins; where a run is extended whose rate had fallen, not the first.
        closing_from: Step from which strong augmentation is off; -1 if it never is.
        milestones: Steps.
        period: Steps; of plateau, validations without improvement that it waits.
        gamma: Factor on the rate, or on the height of a cycle.
        reductions: How often plateau has fallen.
        averaging_from: Step from which weights are averaged equally, at the rate reached by then; -1 if they never are.
    """

    kind: str
    warmup_steps: int
    stable_until: int
    total_steps: int
    lrf: float
    start_factor: float = 1.0
    begin: int = 0
    closing_from: int = -1
    milestones: tuple[int, ...] = ()
    period: int = 0
    gamma: float = 1.0
    reductions: int = 0
    averaging_from: int = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))  # a list, where it comes from JSON

    def is_closing(self, step: int) -> bool:
        """Whether strong augmentation is off in an epoch that begins at `step`."""
        return 0 <= self.closing_from <= step

    def is_averaging(self, step: int) -> bool:
        """Whether the update that follows `step` updates belongs to the part whose weights are averaged equally."""
        return 0 <= self.averaging_from <= step

    def averaging(self, num_steps: int) -> Schedule:
        """This schedule with stochastic weight averaging over its last `num_steps`: the rate stays as it is when they
        begin, and `wsd` has no decay, so that it is the peak."""
        start = self.total_steps - num_steps
        stable = start if self.kind == "wsd" else self.stable_until
        return replace(self, averaging_from=start, stable_until=stable)

    def is_stable(self, step: int) -> bool:
        """Whether training that no longer improves at `step` should be cooled down: not where wsd is falling anyway. All
        other schedules fall, or go up and down, from the start, and patience has the last word."""
        return self.kind != "wsd" or step < self.stable_until

    def factor(self, step: int) -> float:
        """The factor on the peak learning rate for the update that follows `step` updates."""
        if self.is_averaging(step):
            step = self.averaging_from
        if self.kind == "onecycle":
            return self._one_cycle(step, ONE_CYCLE_START, 1.0, self.lrf)
        ramp = (step + 1 - self.begin) / (self.warmup_steps - self.begin) if step < self.warmup_steps else 1.0
        return ramp * self._after_warmup(max(step, self.warmup_steps))

    def momentum(self, step: int) -> float | None:
        """SGD's momentum or Adam's beta 1 for the same update, where the schedule sets it."""
        if self.kind != "onecycle":
            return None
        if self.is_averaging(step):
            step = self.averaging_from
        ends, peak = ONE_CYCLE_MOMENTUM
        return self._one_cycle(step, ends, peak, ends)

    def after_validation(self, bad_epochs: int) -> Schedule:
        """The schedule after a validation; another one only where plateau falls: whenever as many validations as
        `period` and one more have not improved since the last improvement or fall, as in torch's ReduceLROnPlateau.

        Args:
            bad_epochs: Validations since the last improvement.
        """
        if self.kind != "plateau" or bad_epochs == 0 or bad_epochs % (self.period + 1) != 0:
            return self
        return replace(self, reductions=self.reductions + 1)

    def cool_down(self, step: int, num_steps: int) -> Schedule:
        """The schedule of a segment that starts at `step` and decays over the next `num_steps`, from the factor reached;
        its second half closes, if this schedule would have closed. With weight averaging they are averaged instead, at a
        constant rate."""
        reached = self.factor(step)
        return Schedule(kind="wsd", warmup_steps=0, stable_until=step, total_steps=step + num_steps,
                        lrf=0.0 if self.kind in CYCLIC else min(self.lrf, reached), start_factor=reached,
                        closing_from=-1 if self.closing_from < 0 else step + num_steps // 2,
                        averaging_from=-1 if self.averaging_from < 0 else step)  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the checkpoint."""
        return asdict(self)

    def _after_warmup(self, step: int) -> float:
        since = step - self.warmup_steps
        if self.kind in ("wsd", "cosine", "linear"):
            if step < self.stable_until:
                return self.start_factor
            done = min(1.0, (step - self.stable_until) / max(1, self.total_steps - self.stable_until))
            left = 1 - done if self.kind == "linear" else _half_cosine(done)
            return self.lrf + (self.start_factor - self.lrf) * left
        if self.kind == "constant":
            return 1.0
        if self.kind == "step":
            return float(self.gamma ** (step // self.period))
        if self.kind == "multistep":
            return float(self.gamma ** bisect_right(self.milestones, step))
        if self.kind == "exponential":
            return float(self.gamma**since)
        if self.kind == "plateau":
            return max(self.lrf, self.gamma**self.reductions)
        if self.kind == "restarts":
            return self.lrf + (1 - self.lrf) * _half_cosine(since % self.period / self.period)
        assert self.kind in CYCLIC, self.kind
        cycle, within = divmod(since, 2 * self.period)
        height = {"triangular": 1.0, "triangular2": 0.5**cycle, "exp-range": self.gamma**since}[self.kind]
        return self.lrf + (1 - self.lrf) * height * (1 - abs(within / self.period - 1))

    def _one_cycle(self, step: int, start: float, peak: float, end: float) -> float:
        top, last = max(0, self.warmup_steps - 1), self.total_steps - 1  # the last steps of rise and fall
        if step <= top:
            return peak + (start - peak) * _half_cosine(step / top if top > 0 else 1.0)
        return end + (peak - end) * _half_cosine(min(1.0, (step - top) / max(1, last - top)))


def _half_cosine(done: float) -> float:
    """1 at 0, 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * done))


def plan_schedule(
    kind: str, *, epochs: int, steps_per_epoch: int, warmup: float, lrf: float, decay: float,
    milestones: Sequence[float] = (), period: float = 0.0, gamma: float = 1.0, close: float = 0.0,
) -> Schedule:  # fmt: skip
    """The schedule of a first segment.

    Args:
        epochs, warmup, milestones, period: Lengths in epochs.
        lrf: Last or lowest factor, a share of the peak.
        decay: Share of the run at its end over which wsd falls.
        gamma: Factor of each fall; of exponential and exp-range, of each epoch.
        close: Share of the epochs at the end without strong augmentation, rounded to whole epochs.
    """
    total = epochs * steps_per_epoch
    closing = round(close * epochs)
    warmup_steps = min(round(warmup * steps_per_epoch), total // 2)
    # Rounded up, so that cycles that fill the run do not begin one more at its last step.
    period_steps = max(1, math.ceil(period * (1 if kind == "plateau" else steps_per_epoch) - 1e-6))
    marks = tuple(round(mark * steps_per_epoch) for mark in milestones)
    decay_begins = {
        "wsd": max(warmup_steps, total - max(1, round(decay * total))),
        "step": period_steps,
        "multistep": marks[0] if marks else total,
    } | dict.fromkeys(("cosine", "linear", "exponential", "onecycle"), warmup_steps)
    return Schedule(
        kind=kind, warmup_steps=warmup_steps, stable_until=decay_begins.get(kind, total), total_steps=total, lrf=lrf,
        closing_from=total - closing * steps_per_epoch if closing else -1, milestones=marks, period=period_steps,
        gamma=gamma ** (1 / steps_per_epoch) if kind in ("exponential", "exp-range") else gamma,
    )  # fmt: skip
