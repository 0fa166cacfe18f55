"""The side of the training input, batch by batch: multi-scale training and progressive resizing. Pure functions of a plan.

Multi-scale training draws the size of each batch around the size that will be served (Redmon and Farhadi 2017, YOLO9000).
Progressive resizing starts small, where steps are cheap, and grows (Howard 2018, DAWNBench; Tan and Le 2021, EfficientNetV2).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

from goodfit.config.chooser import Chooser
from goodfit.config.facts import ModelFacts
from goodfit.config.plan import Decision, Plan
from goodfit.core.errors import RequestError
from goodfit.core.random import stream, uniform

LEAST = 32  # pixels: no input is smaller, unless imgsz is
MOST_SCALE = 0.9  # of multi_scale, as the request admits it
FINEST = 0.447  # side of the smallest crop, as a share of the picture's, that kept pictures are meant for: a fifth of the area
GOLDEN = (math.sqrt(5) - 1) / 2
_SIZE = stream("input size")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSizes:
    """Which side, in pixels, the square input of each training batch has.

    Attributes:
        imgsz: The size that is served, and that sizes vary around.
        step: Pixels between two sizes.
        multi_scale: Each batch's size is drawn within ± this share of the epoch's, all sizes alike; 0 is off.
        progressive: Share of imgsz that the first epoch has; 1 is off. Sizes grow evenly, one step after another, and
            are at imgsz when two thirds of the epochs are done; they stay there, also beyond the last planned epoch.
        epochs: Planned.
        closing_epochs: Of them, so many at the end take pictures as they will be served: at imgsz.
        even: For measuring: the sizes of the whole run in an order that covers them evenly from its start, the largest first.
    """

    imgsz: int
    step: int = LEAST
    multi_scale: float = 0.0
    progressive: float = 1.0
    epochs: int = 1
    closing_epochs: int = 0
    even: bool = False

    @classmethod
    def of(cls, plan: Plan) -> InputSizes:
        """The sizes of a plan's run."""
        return cls(imgsz=plan.imgsz.value, step=plan.size_step.value, multi_scale=plan.multi_scale.value,
                   progressive=plan.progressive.value, epochs=plan.epochs.value,
                   closing_epochs=round(plan.close_augment.value * plan.epochs.value))  # fmt: skip

    def centre(self, epoch: int) -> int:
        """The size that those of an epoch vary around."""
        if self.progressive >= 1:
            return self.imgsz
        levels = min(math.floor((1 - self.progressive) * self.imgsz / self.step + 1e-9),
                     max(0, self.imgsz - LEAST) // self.step)  # fmt: skip
        growing = max(1, 2 * self.epochs // 3)
        return self.imgsz - (levels - min(levels, epoch * levels // growing)) * self.step

    def allowed(self, epoch: int, *, closing: bool = False) -> tuple[int, ...]:
        """The sizes that batches of an epoch may have, upwards; each is as likely as another."""
        if closing:
            return (self.imgsz,)
        centre = self.centre(epoch)
        if self.multi_scale <= 0:
            return (centre,)
        reach = math.floor(self.multi_scale * centre / self.step + 1e-9)
        made = (centre + k * self.step for k in range(-reach, reach + 1))
        return tuple(size for size in made if size >= LEAST or size == centre)

    def draw(self, *, seed: int, epoch: int, number: int, closing: bool = False) -> int:
        """The size of a batch: a function of (seed, epoch, number of the batch in it), alike in every process."""
        if self.even:
            return self._evenly(number) if epoch or number else self.largest
        sizes = self.allowed(epoch, closing=closing)
        return sizes[0] if len(sizes) == 1 else sizes[int(float(uniform(_SIZE, seed, epoch, number)) * len(sizes))]

    @property
    def varies(self) -> bool:
        """Whether the run has more than one size."""
        return self.smallest != self.largest

    @property
    def smallest(self) -> int:
        """Of any batch."""
        return min(self.allowed(0))

    @property
    def largest(self) -> int:
        """Of any batch: what memory is planned for."""
        return max(self.allowed(self.epochs))

    @property
    def typical(self) -> int:
        """The size of the run whose pixels are nearest to the mean over its batches: what time is planned with."""
        return min((size for size, _ in _mix(self)), key=lambda size: abs(size**2 - self._mean_pixels))

    def cost(self, size: int) -> float:
        """Of a batch of this size, over the mean of the run: the time of a step follows the number of pixels."""
        return size**2 / self._mean_pixels

    def epoch_cost(self, epoch: int) -> float:
        """The mean cost of an epoch's batches, over that of the run."""
        sizes = self.allowed(epoch, closing=self._is_closing(epoch))
        return sum(map(self.cost, sizes)) / len(sizes)

    def kept_for(self, scale: float) -> int:
        """The input size that stored pictures must be good for: the largest, and more where `scale` zooms in further than
        the presets do, so that small crops keep their detail."""
        return math.ceil(self.largest * max(1.0, FINEST / (1 - scale)))

    @property
    def _mean_pixels(self) -> float:
        return sum(size**2 * share for size, share in _mix(self))

    def _is_closing(self, epoch: int) -> bool:
        return self.epochs - self.closing_epochs <= epoch < self.epochs

    def _evenly(self, number: int) -> int:
        """The size at the quantile that multiples of the golden ratio give, which fill the range evenly (Weyl)."""
        left = max(1, number) * GOLDEN % 1
        for size, share in _mix(self):
            left -= share
            if left < 0:
                return size
        return self.largest


@functools.lru_cache(maxsize=16)
def _mix(sizes: InputSizes) -> tuple[tuple[int, float], ...]:
    """The sizes of a whole run, upwards, and which share of its batches has each."""
    shares: dict[int, float] = {}
    for epoch in range(sizes.epochs):
        allowed = sizes.allowed(epoch, closing=sizes._is_closing(epoch))
        for size in allowed:
            shares[size] = shares.get(size, 0.0) + 1 / len(allowed) / sizes.epochs
    return tuple(sorted(shares.items()))


def choose_sizes(choose: Chooser, model: ModelFacts, imgsz: int, epochs: int) -> dict[str, Decision[Any]]:
    """The decisions of this module, by their names in the plan.

    Raises:
        RequestError: the network takes one size only, or there is no other size in the range that was asked for.
    """
    step = model.size_step
    if step:
        size_step = Decision(step, f"{model.name} reduces its input {step} times or a divisor of it", "rule")
    else:
        size_step = Decision(0, f"{model.name} takes one size only", "rule")
    multi_scale = choose("multi_scale", 0.0, "every batch at the size that will be served")
    progressive = choose("progressive", 1.0, "the whole run at the size that will be served")
    if multi_scale.value > 0:
        _check_takes("multi_scale", multi_scale.value, model)
        sizes = InputSizes(imgsz=imgsz, step=step, multi_scale=multi_scale.value).allowed(0)
        if len(sizes) == 1:
            raise _no_other("multi_scale", multi_scale.value, imgsz, step, "within that share of it", step / imgsz)
        multi_scale = _explained(multi_scale, f"{_some(sizes)} pixels around imgsz={imgsz}")
    if progressive.value < 1:
        _check_takes("progressive", progressive.value, model)
        made = InputSizes(imgsz=imgsz, step=step, progressive=progressive.value, epochs=epochs)
        if made.centre(0) == imgsz:
            raise _no_other("progressive", progressive.value, imgsz, step, "from that share of it on", 1 - step / imgsz)
        if epochs < 2:
            raise RequestError(f"progressive={progressive.value:g} needs epochs to grow over, and epochs={epochs}.",
                               next="more epochs, or leave progressive out")  # fmt: skip
        grown = 2 * epochs // 3
        progressive = _explained(progressive, f"from {made.centre(0)} pixels in steps of {step} to {imgsz}, reached after "
                                 f"{grown} of {epochs} epochs")  # fmt: skip
    return {"multi_scale": multi_scale, "progressive": progressive, "size_step": size_step}


def _explained(decision: Decision[float], what: str) -> Decision[float]:
    """With what it means here, in place of what it meant in an earlier plan."""
    return replace(decision, reason=f"{decision.reason.partition(';')[0]}; {what}")


def _check_takes(name: str, value: float, model: ModelFacts) -> None:
    if not model.size_step:
        raise RequestError(
            f"{name}={value:g}: {model.name} is built for one input size, {name} needs a network that takes many.",
            where=f"{name}=", next=f"use a convolutional model=, or leave {name} out",
        )  # fmt: skip


def _no_other(name: str, value: float, imgsz: int, step: int, range_: str, least: float) -> RequestError:
    """There is one size only; `least` is the value from which on there would be another."""
    enough = math.ceil(100 * least - 1e-9) / 100 if name == "multi_scale" else math.floor(100 * least + 1e-9) / 100
    possible = enough <= MOST_SCALE if name == "multi_scale" else enough >= 0.1 and imgsz >= LEAST + step
    way = f"{name}={enough:g}" if possible else f"imgsz={max(2 * step, LEAST + step)} or larger"
    return RequestError(f"{name}={value:g}: sizes lie {step} pixels apart, and {range_} imgsz={imgsz} has no other.",
                        where=f"{name}=", next=f"use {way}, or leave {name} out")  # fmt: skip


def _some(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes)) if len(sizes) < 6 else f"{sizes[0]}, {sizes[1]}, … {sizes[-1]}"
