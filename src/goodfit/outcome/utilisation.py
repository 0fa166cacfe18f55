"""Where the time of training went, what held it up most, and which option would change that."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from goodfit.config.loading import WORTHWHILE, LoadCost, best_loading
from goodfit.config.plan import Plan
from goodfit.config.sizes import InputSizes
from goodfit.core.journal import Event

PARTS = ("step", "data", "validation", "saving", "host", "other")
WORTH = 0.1  # share of the time from which a part beside the step is worth a change
CROWDED = 0.85  # share of the bare step's rate that the steps of the run reach, below which something else held them up
SMALL = 64  # pixels: smaller inputs are not proposed
MOST_WORKERS = 8


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the time of training says.

    Attributes:
        seconds: Of training, by part: the step, waiting for data, validation, saving, the loop itself, other.
        shares: The same as fractions of the whole.
        share_of_bare: Rate of training, data wait included, over that of the bare step in the rehearsal; medians, without
            the first epoch. None where nothing was rehearsed.
        bottleneck: The part that held training up most; "crowding" where the steps themselves were slower than rehearsed.
        lever: What to change, in a sentence with figures.
    """

    seconds: dict[str, float]
    shares: dict[str, float]
    share_of_bare: float | None
    bottleneck: str
    lever: str

    def describe(self) -> str:
        """One line for the terminal."""
        parts = " · ".join(f"{name} {_percent(share)}" for name, share in self.shares.items() if share >= 0.005)
        reached = "" if self.share_of_bare is None else f" · {_percent(self.share_of_bare)} of the model's own speed"
        return f"{parts}{reached} · {self.lever}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for result.json and the report."""
        return asdict(self)


def utilisation(
    epochs: Sequence[Event], bare_rate: float, plan: Plan, *, num_cores: int, last_save: float = 0.0
) -> Verdict:
    """Judge the `epoch` events of a run.

    Args:
        epochs: Each with its `seconds` since the one before, and of them those of each part.
        bare_rate: Samples per second of the bare step; 0 if unknown.
        plan: What is set so already is not proposed.
        num_cores: Processors this process may use.
        last_save: Seconds of saving after the last epoch's event.
    """
    seconds = {part: sum(float(e[f"{part}_seconds"]) for e in epochs) for part in PARTS}
    seconds["saving"] += last_save
    whole = sum(float(e["seconds"]) for e in epochs) + last_save
    seconds["other"] += max(0.0, whole - sum(seconds.values()))
    whole = max(whole, 1e-9)
    shares = {part: value / whole for part, value in seconds.items()}
    later = epochs[1:] or epochs
    sizes = InputSizes.of(plan)
    costs = [sizes.epoch_cost(int(e["epoch"])) if sizes.varies else 1.0 for e in later]  # of a sample, by its pixels
    rates = [
        float(e["samples_per_second"]) * c for e, c in zip(later, costs, strict=True) if e["samples_per_second"] > 0
    ]
    reached = statistics.median(rates) / bare_rate if rates and bare_rate > 0 else None
    held = {part: share for part, share in shares.items() if part != "step"}
    if plan.device.value != "cpu" and reached is not None:  # such a device works on while the host waits or keeps books
        training = sum(float(e["train_seconds"]) for e in epochs) / whole
        held.update({part: min(held[part], max(0.0, 1 - reached) * training) for part in ("data", "host")})
    pace = _pace(later, costs, bare_rate)
    largest = max(held, key=lambda part: held[part])
    if pace < CROWDED and (1 - pace) * shares["step"] > held[largest]:
        bottleneck, lever = "crowding", _crowding(pace, plan)
    elif held[largest] >= WORTH:
        bottleneck, lever = largest, _LEVERS[largest](shares[largest], plan, num_cores)
    else:
        bottleneck, lever = "step", _step(shares["step"], plan)
    return Verdict({p: round(s, 3) for p, s in seconds.items()}, {p: round(s, 4) for p, s in shares.items()},
                   None if reached is None else round(reached, 4), bottleneck, lever)  # fmt: skip


def _pace(epochs: Sequence[Event], costs: Sequence[float], bare_rate: float) -> float:
    """Rate of the steps alone over that of the bare step, at most 1; 1 where nothing was rehearsed."""
    paces = [
        e["samples_per_second"] * c * e["train_seconds"] / e["step_seconds"]
        for e, c in zip(epochs, costs, strict=True)
        if e["step_seconds"] > 0
    ]  # samples of this part of the epoch, over the seconds of its steps
    return min(1.0, statistics.median(paces) / bare_rate) if paces and bare_rate > 0 else 1.0


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _either(options: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(options[:-1]), options[-1]))) if options else ""


def _data(share: float, plan: Plan, num_cores: int) -> str:
    options = []
    # A rule leaves the cache off where each picture is used once, or where it fits nowhere; only a person can differ.
    may_cache = plan.cache.value == "off" and plan.cache.source == "asked" and plan.epochs.value > 1
    if may_cache and _gains(plan, best_loading(_costs(plan), cache="ram")):
        options.append("cache=ram")
    measured = best_loading(_costs(plan), cache=plan.cache.value)
    workers = measured.workers if measured is not None else min(MOST_WORKERS, num_cores)
    other = workers > plan.workers.value or (measured is not None and workers != plan.workers.value)
    if other and _gains(plan, measured):
        options.append(f"workers={workers}")
    if plan.policy.value != "off":
        options.append("policy=off")
    if plan.cache.value == "disk":
        options.append("cache=ram")
    if not options and plan.augment.value not in ("off", "light"):
        options.append("augment=light")
    if not options and (smaller := _smaller(plan)):
        options.append(smaller)
    return f"{_percent(share)} of the time waits for data: {_either(options) or 'a faster disk'}"


def _costs(plan: Plan) -> tuple[LoadCost, ...]:
    return plan.measured.loading if plan.measured is not None else ()


def _gains(plan: Plan, other: LoadCost | None) -> bool:
    """Whether another way to load was measured to be faster than the plan's, or nothing says that it is not."""
    mine = best_loading(_costs(plan), cache=plan.cache.value, workers=plan.workers.value, prefetch=plan.prefetch.value)
    return mine is None or other is None or other.rate > mine.rate * (1 + WORTHWHILE)


def _host(share: float, plan: Plan, _num_cores: int) -> str:
    why = f"{_percent(share)} of the time passes between the steps, in the loop itself"
    if plan.accumulate.value > 1:
        return f"{why}: fewer and larger micro-batches, accumulate={plan.accumulate.value // 2}"
    return f"{why}: fewer and larger steps, batch={2 * plan.batch.value}"


def _validation(share: float, plan: Plan, _num_cores: int) -> str:
    what = f"{_percent(share)} of the time is validation"
    shares = plan.split.value.split("/")
    if len(shares) == 3 and float(shares[1]) >= 2:
        train, val, test = (float(s) for s in shares)
        fewer = f"split={train + val - val // 2:g}/{val // 2:g}/{test:g}"
        return f"{what}: fewer samples for it, {fewer} (with resplit=true where the data names its splits)"
    return f"{what}: fewer samples for it, by split="


def _saving(share: float, plan: Plan, _num_cores: int) -> str:
    size = " or ema=false, which saves a copy of the weights less" if plan.ema.value else ""
    return f"{_percent(share)} of the time goes to checkpoints: project= on a faster disk{size}"


def _other(share: float, plan: Plan, _num_cores: int) -> str:
    return (f"{_percent(share)} of the time went to steps done twice or aside: if memory ran out, "
            f"accumulate={2 * plan.accumulate.value} from the start")  # fmt: skip


_LEVERS = {"data": _data, "host": _host, "validation": _validation, "saving": _saving, "other": _other}


def _crowding(pace: float, plan: Plan) -> str:
    why = f"the steps reached {_percent(pace)} of the rehearsal's rate"
    if plan.device.value == "cpu" and plan.workers.value > 0:
        return f"{why}: {plan.workers.value} loader processes share its cores{_fewer(plan)}"
    return f"{why}: something else used the {'GPU' if plan.device.value != 'cpu' else 'processor'} at that time"


def _fewer(plan: Plan) -> str:
    """Half as many loader processes, unless measuring showed that these are the best."""
    measured = best_loading(_costs(plan), cache=plan.cache.value)
    if measured is None:
        return f", workers={plan.workers.value // 2}"
    if measured.workers != plan.workers.value:
        return f", workers={measured.workers}"
    return ", and measured fewer were slower"


def _step(share: float, plan: Plan) -> str:
    options = ["a smaller model="]
    if smaller := _smaller(plan):
        options.append(smaller)
    # A rule or a measurement chose fp32 only where half precision gains nothing.
    if plan.precision.value == "fp32" and plan.precision.source == "asked":
        options.append("precision=bf16")
    if not plan.channels_last.value and plan.channels_last.source == "asked":
        options.append("channels_last=true")
    if plan.deterministic.value and plan.device.value == "cuda":
        options.append("deterministic=false")
    if plan.device.value == "cpu":
        options.append("a GPU")
    return f"{_percent(share)} of the time is the model's arithmetic: nothing to gain but by {_either(options)}"


def _smaller(plan: Plan) -> str:
    """A smaller input, three quarters of the side in multiples of 32 pixels; "" where it is small already."""
    side = plan.imgsz.value * 3 // 4 // 32 * 32
    return f"imgsz={side}" if side >= SMALL else ""
