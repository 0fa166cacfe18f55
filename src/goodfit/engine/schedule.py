"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

DECAY_SHARE = 0.2  # the default schedule decays over the last fifth


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A learning-rate schedule over the steps of one segment.

    `wsd` warms up linearly, stays, then falls along half a cosine (warm-up, stable, decay: Hu et al. 2024, MiniCPM;
    Hägele et al. 2024). `cosine` warms up, then falls from there on (Loshchilov and Hutter 2017).

    Attributes:
        kind: "wsd" or "cosine".
        warmup_steps: Steps of linear warm-up.
        stable_until: Step at which the decay begins (for cosine: the end of warm-up).
        total_steps: Step at which it ends.
        lrf: Last factor, a share of the peak.
        start_factor: Factor from which the decay starts.
        closing_from: Step from which strong augmentation is off; -1 if it never is.
        averaging_from: Step from which weights are averaged equally, at the rate reached by then; -1 if they never are.
    """

    kind: str
    warmup_steps: int
    stable_until: int
    total_steps: int
    lrf: float
    start_factor: float = 1.0
    closing_from: int = -1
    averaging_from: int = -1

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

    def factor(self, step: int) -> float:
        """The factor on the peak learning rate for the update that follows `step` updates."""
        if self.is_averaging(step):
            step = self.averaging_from
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step < self.stable_until:
            return self.start_factor
        length = max(1, self.total_steps - self.stable_until)
        done = min(1.0, (step - self.stable_until) / length)
        return self.lrf + (self.start_factor - self.lrf) * 0.5 * (1 + math.cos(math.pi * done))

    def cool_down(self, step: int, num_steps: int) -> Schedule:
        """The schedule of a segment that starts at `step` and decays over the next `num_steps`; its second half closes,
        if this schedule would have closed. With weight averaging they are averaged instead, at a constant rate."""
        return Schedule(kind="wsd", warmup_steps=0, stable_until=step, total_steps=step + num_steps, lrf=self.lrf,
                        start_factor=self.factor(step),
                        closing_from=-1 if self.closing_from < 0 else step + num_steps // 2,
                        averaging_from=-1 if self.averaging_from < 0 else step)  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the checkpoint."""
        return asdict(self)


def plan_schedule(
    kind: str, *, epochs: int, warmup: float, lrf: float, steps_per_epoch: int, close: float = 0.0
) -> Schedule:
    """The schedule of a first segment. `epochs` and `warmup` are lengths in epochs, `close` is the share of them at the
    end without strong augmentation, rounded to whole epochs."""
    total = epochs * steps_per_epoch
    closing = round(close * epochs)
    closing_from = total - closing * steps_per_epoch if closing else -1
    warmup_steps = min(round(warmup * steps_per_epoch), total // 2)
    if kind == "cosine":
        return Schedule(kind=kind, warmup_steps=warmup_steps, stable_until=warmup_steps, total_steps=total, lrf=lrf,
                        closing_from=closing_from)  # fmt: skip
    stable_until = max(warmup_steps, total - max(1, round(DECAY_SHARE * total)))
    return Schedule(kind=kind, warmup_steps=warmup_steps, stable_until=stable_until, total_steps=total, lrf=lrf,
                    closing_from=closing_from)  # fmt: skip
