"""The learning-rate schedule of a plan: its kind, its lengths and its factors; the only home of these defaults."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from goodfit.config.chooser import Chooser
from goodfit.config.durations import in_epochs
from goodfit.config.plan import Decision
from goodfit.config.request import TrainRequest
from goodfit.core.errors import RequestError

DECAY = 0.2
# What belongs to which schedule; anything else that is asked for is refused.
USES = {
    "wsd": ("decay", "lrf"), "cosine": ("lrf",), "linear": ("lrf",), "constant": (), "step": ("period", "gamma"),
    "multistep": ("milestones", "gamma"), "exponential": ("gamma", "lrf"), "plateau": ("period", "gamma", "lrf"),
    "onecycle": ("lrf",), "triangular": ("period", "lrf"), "triangular2": ("period", "lrf"),
    "exp-range": ("period", "gamma", "lrf"), "restarts": ("period", "lrf"),
}  # fmt: skip
CYCLES = {"triangular": 2, "triangular2": 2, "exp-range": 2, "restarts": 1}  # periods of a whole cycle
PLANNED = (
    "step",
    "multistep",
    "exponential",
    "onecycle",
    "triangular",
    "triangular2",
    "exp-range",
    "restarts",
)  # over the run's epochs
CYCLE_EPOCHS = 10  # Smith 2017: half a cycle of 2 to 10 epochs
END = 0.01  # of the peak, at which exponential ends


def choose_schedule(choose: Chooser, epochs: int, steps_per_epoch: int, patience: int) -> dict[str, Decision[Any]]:
    """The schedule and what belongs to it. Lengths are asked as epochs, steps or a share, and decided in epochs.

    Args:
        patience: Epochs without improvement after which the run is cooled down; 0 is off.

    Raises:
        RequestError: something is asked that this schedule does not have, or that does not fit into the run.
    """
    schedule = choose("schedule", "wsd", "warm-up, stable, decay over the last fifth: can be extended and cooled down")
    kind = schedule.value
    _refuse_unused(choose.request, kind)
    own = choose.unless_changed("schedule")
    scaled = _unless_longer(choose, own)

    def length(name: str, rule: float, reason: str) -> Decision[Any]:
        found: Decision[Any] = scaled(name)(name, rule, reason)
        return replace(found, value=_in_epochs(found.value)) if isinstance(found.value, str) else found

    def _in_epochs(text: str) -> float:
        return in_epochs(text, epochs=epochs, steps_per_epoch=steps_per_epoch)

    warmup = length("warmup", *_warmup(kind, epochs))
    if warmup.value > epochs / 2:
        warmup = replace(warmup, value=epochs / 2, reason=f"{warmup.reason}, at most half of the run")
    decay = own("decay", DECAY, "the last fifth" if kind == "wsd" else f"{kind} has none")
    if isinstance(decay.value, str):
        decay = replace(decay, value=min(1.0, _in_epochs(decay.value) / epochs))
    milestones: Decision[Any] = scaled("milestones")("milestones", *_milestones(kind, epochs))
    if isinstance(milestones.value, str):
        milestones = replace(milestones, value=[_in_epochs(part) for part in milestones.value.split(",")])
    if milestones.source == "asked":
        _check_milestones(milestones.value, warmup.value, epochs)
    period = length("period", *_period(kind, epochs, warmup.value, patience))
    if choose.request.period is not None and period.value <= 0:
        raise RequestError("period=0 is no length.", where="period=", next="use an epoch or more, as period=10")
    return {"schedule": schedule, "warmup": warmup, "decay": decay, "milestones": milestones, "period": period,
            **_factors(scaled, kind, epochs - warmup.value)}  # fmt: skip


def _unless_longer(choose: Chooser, own: Chooser) -> Callable[[str], Chooser]:
    """Who decides a length or what belongs to one: not the earlier plan, where it was its rule for another number of epochs."""
    base, epochs = own.base, choose.request.epochs
    if base is None or epochs is None or epochs == base.epochs.value:
        return lambda _: own
    return lambda name: own if getattr(base, name).source == "asked" else Chooser(choose.request, None)


def outlast_a_cycle(patience: Decision[int], schedule: dict[str, Decision[Any]]) -> Decision[int]:
    """Patience of one cycle at least, where the rate goes up and down and validation with it; what was asked stays."""
    cycle = math.ceil(CYCLES.get(schedule["schedule"].value, 0) * schedule["period"].value)
    if patience.source == "asked" or not 0 < patience.value < cycle:
        return patience
    return replace(
        patience, value=cycle, reason="a whole cycle of the learning rate, with which validation goes up and down"
    )


def _refuse_unused(request: TrainRequest, kind: str) -> None:
    unused = [name for name in ("decay", "milestones", "period", "gamma", "lrf")
              if getattr(request, name) is not None and name not in USES[kind]]  # fmt: skip
    if unused:
        takers = [other for other, used in USES.items() if set(unused) <= set(used)]
        raise RequestError(f"The schedule {kind} has no {' and no '.join(unused)}.", where=f"{unused[0]}=",
                           next=f"leave {'it' if len(unused) == 1 else 'them'} out"
                           + (f", or use schedule={' or '.join(takers)}" if takers else ""))  # fmt: skip
    if kind == "exponential" and request.gamma is not None and request.lrf is not None:
        raise RequestError("gamma and lrf both say how fast exponential falls.", where="gamma=",
                           next="leave one of them out")  # fmt: skip


def _warmup(kind: str, epochs: int) -> tuple[float, str]:
    if kind == "onecycle":
        return round(0.3 * epochs, 2), "the rise of one-cycle: 30 % of the run"
    if kind in ("triangular", "triangular2", "exp-range"):
        return 0.0, "each cycle starts low and rises"
    return min(5.0, round(0.05 * epochs, 2)), "5 % of the epochs, at most 5"


def _milestones(kind: str, epochs: int) -> tuple[list[float], str]:
    if kind != "multistep":
        return [], f"{kind} has none"
    return [0.5 * epochs, 0.75 * epochs], "a half and three quarters of the run, as He et al. 2016 on CIFAR-10"


def _check_milestones(milestones: list[float], warmup: float, epochs: int) -> None:
    edges = [warmup, *milestones, epochs]
    if any(after <= before for before, after in itertools.pairwise(edges)):
        raise RequestError(f"Milestones must rise, between warm-up ({warmup:g} epochs) and the end of the run ({epochs}).",
                           where="milestones=", next="as milestones=50%,75%")  # fmt: skip


def _period(kind: str, epochs: int, warmup: float, patience: int) -> tuple[float, str]:
    left = epochs - warmup
    if kind == "step":
        return epochs / 3, "two falls, at a third and two thirds of the run"
    if kind == "restarts":
        return left / 3, "three descents, the last of which ends with the run"
    if kind == "plateau":
        if 0 < patience < 20:
            return max(1, patience // 2), "half of patience, so that the rate falls before the run is ended"
        return 10, "epochs without improvement, as torch; the rate falls several times before patience is spent"
    if kind in CYCLES:
        cycles = max(1, round(left / CYCLE_EPOCHS))
        return left / (2 * cycles), f"{cycles} cycles, so that the run ends at the low rate"
    return 0.0, f"{kind} has none"


def _factors(of: Callable[[str], Chooser], kind: str, epochs: float) -> dict[str, Decision[Any]]:
    """`gamma` and `lrf`; `epochs` are those after warm-up, `of` says who decides what."""
    request = of("gamma").request
    if kind == "exponential":
        if request.gamma is not None:
            gamma = of("gamma")("gamma", 0.0, "")
            return {"gamma": gamma, "lrf": Decision(float(gamma.value**epochs), "what gamma leaves at the end", "rule")}
        lrf = of("lrf")("lrf", END, "a hundredth of the peak: it never reaches zero")
        if lrf.value <= 0:
            raise RequestError("exponential never reaches zero.", where="lrf=", next="use lrf=0.01, or schedule=linear")
        rule = float(f"{lrf.value ** (1 / epochs):.6g}"), "of each epoch, so that the run ends at lrf"
        return {"gamma": of("gamma")("gamma", *rule) if request.lrf is None else Decision(*rule, "rule"), "lrf": lrf}
    gammas = {
        "exp-range": (float(f"{0.1 ** (1 / epochs):.6g}"), "of each epoch: the height of cycles falls to a tenth"),
        **dict.fromkeys(("step", "multistep", "plateau"), (0.1, "the usual factor of a fall")),
    }
    lrfs = {
        "onecycle": (4e-6, "as torch: a 10,000th of the rate it starts with"),
        **dict.fromkeys(("triangular", "triangular2", "exp-range"), (0.25, "Smith 2017: a quarter of the peak is lowest")),
        **dict.fromkeys(("wsd", "cosine", "linear", "restarts"), (0.0, "decay to zero")),
        "plateau": (0.0, "no lower limit"),
    }  # fmt: skip
    return {"gamma": of("gamma")("gamma", *gammas.get(kind, (1.0, f"{kind} has none"))),
            "lrf": of("lrf")("lrf", *lrfs.get(kind, (0.0, f"{kind} has none")))}  # fmt: skip
