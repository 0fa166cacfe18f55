"""What loading costs beside the training step, and which setting follows from it: plain values and pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WORTHWHILE = 0.05  # of the rate, within which fewer processes are as good, and of the time that may wait for data
UNWISE = 0.2  # of the rate, from which what was asked for is called a loss
DEEPER = 4  # batches ahead that are tried where two are not enough


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCost:
    """One way to load, with the training step on the same machine at the same time. Seconds are means of one update.

    Attributes:
        cache: "ram" and "disk" load from a warm cache, "off" from the files.
        workers, prefetch: As in the plan.
        batch: Samples of an update.
        wait: Seconds that the device, or the process that trains on a CPU, waits for the next batch.
        step: Seconds of the step; on a CPU loader processes share its cores, and it is longer than `bare`.
        start: Seconds until loader processes give the first batch of an epoch, divided by its updates.
        bare: Seconds of the step where the batch is there already and nothing loads.
        problem: Why it cannot be used; empty if it can.
    """

    cache: str
    workers: int
    prefetch: int
    batch: int = 0
    wait: float = 0.0
    step: float = 0.0
    start: float = 0.0
    bare: float = 0.0
    problem: str = ""

    @property
    def key(self) -> tuple[str, int, int]:
        """The setting."""
        return self.cache, self.workers, self.prefetch

    @property
    def name(self) -> str:
        """The setting as options."""
        deeper = f", prefetch={self.prefetch}" if self.workers and self.prefetch > 2 else ""
        return f"cache={self.cache}, workers={self.workers}{deeper}"

    @property
    def seconds(self) -> float:
        """Of one update, all in all."""
        return self.wait + self.step + self.start

    @property
    def rate(self) -> float:
        """Samples per second, end to end."""
        return self.batch / self.seconds if self.seconds else 0.0

    @property
    def lost(self) -> float:
        """Share of the time that loading costs: what is waited for, and what it takes from the step."""
        return max(0.0, 1 - self.bare / self.seconds) if self.seconds else 0.0


def load_candidates(
    cache: str, num_cores: int, *, prefetch: int = 2, workers: int | None = None, cache_asked: bool = False
) -> list[LoadCost]:
    """The ways to try, fewest processes first; measuring stops where more cannot gain.

    Args:
        workers: What was asked for, which is tried in any case.
        cache_asked: `cache` was asked for: without one, a warm cache in memory is tried too, to say what that costs.
    """
    numbers = [n for n in (0, 1, 2, 3, 4, 8, 16, 32, 64) if n <= num_cores]
    if num_cores > 4 and num_cores not in numbers:
        numbers.append(num_cores)
    if workers is not None and workers not in numbers:
        numbers = sorted([*numbers, workers])
    made = [LoadCost(cache=cache, workers=n, prefetch=prefetch) for n in numbers]
    if cache == "off" and cache_asked:
        made.insert(0, LoadCost(cache="ram", workers=0, prefetch=prefetch))
    return made


def more_may_help(found: Sequence[LoadCost]) -> bool:
    """Whether more loader processes could train faster than what was tried so far, fewest first, at one cache mode.

    Not where the step hardly waits: they only do away with waiting, and on a CPU they take cores from the step. Not after
    two that were slower by more than a tenth.
    """
    if not found:
        return True
    last = found[-1]
    if last.problem or last.wait <= WORTHWHILE / 2 * last.seconds:
        return False
    if last.workers == 0 and last.cache != "off":
        return last.wait > WORTHWHILE * last.step
    best = max(c.rate for c in found)
    return not all(c.rate < 0.9 * best for c in found[-2:])


def best_loading(
    costs: Sequence[LoadCost], *, cache: str, workers: int | None = None, prefetch: int | None = None
) -> LoadCost | None:
    """The smallest setting within 5 % of the best rate: fewest processes, then fewest batches ahead. None if none works.

    Args:
        cache: The plan's.
        workers, prefetch: What was asked for; None leaves them open.
    """
    fitting = [
        c
        for c in costs
        if not c.problem
        and c.rate > 0
        and c.cache == cache
        and workers in (None, c.workers)
        and (prefetch in (None, c.prefetch) or c.workers == 0)
    ]
    if not fitting:
        return None
    best = max(c.rate for c in fitting)
    return min((c for c in fitting if c.rate >= best * (1 - WORTHWHILE)), key=lambda c: (c.workers, c.prefetch))


def explain_loading(costs: Sequence[LoadCost], chosen: LoadCost, *, num_cores: int) -> str:
    """Why this setting: what an update waits, what the others give, and the lever where loading holds the step up."""
    text = f"loading waits {1e3 * chosen.wait:.1f} of {1e3 * chosen.seconds:.0f} ms a step"
    others = [c for c in costs if c.cache == chosen.cache and c.workers != chosen.workers]
    failed = [c for c in others if c.problem]
    others = [c for c in others if not c.problem and c.rate > 0]
    if others:
        other = max(others, key=lambda c: c.rate)
        gain = 100 * (other.rate / chosen.rate - 1)
        text += (
            f"; {other.workers} {'gain' if gain >= 0 else 'lose'}{'s' if other.workers == 1 else ''} {abs(gain):.0f} %"
        )
    if failed:
        text += f"; {failed[0].workers}: {failed[0].problem}"
    lever = loading_lever(costs, chosen, num_cores=num_cores)
    return f"{text}; {lever}" if lever else text


def loading_lever(costs: Sequence[LoadCost], chosen: LoadCost, *, num_cores: int) -> str:
    """What would let the step run at its own speed; "" where loading costs it no more than 5 %."""
    if chosen.lost <= WORTHWHILE:
        return ""
    text = f"{100 * chosen.lost:.0f} % of the step's own speed is lost: "
    cached = best_loading(costs, cache="ram") if chosen.cache == "off" else None
    if cached is not None and cached.rate > chosen.rate * (1 + WORTHWHILE):
        left = "would end it" if cached.lost <= WORTHWHILE else f"would leave {100 * cached.lost:.0f} %"
        return f"{text}cache=ram {left}, {cached.rate:,.0f} in place of {chosen.rate:,.0f} img/s"
    if chosen.cache == "off":
        tried = max((c.workers for c in costs if c.cache == "off"), default=0)
        return f"{text}{'more cores' if tried >= num_cores else 'a cache'}, or a smaller imgsz="
    return f"{text}augment=light, policy=off, or more cores"


def unwise_loading(costs: Sequence[LoadCost], mine: LoadCost, *, of: str) -> str:
    """What an asked-for setting costs, in a sentence, where another one is at least 20 % faster; else "".

    Args:
        mine: The setting that the run will have, as measured.
        of: The option that was asked for, "workers" or "cache"; only it is compared.
    """
    if of == "workers":
        better = best_loading(costs, cache=mine.cache)
    else:
        better = best_loading(costs, cache="ram") if mine.cache == "off" else None
    if better is None or better.rate * (1 - UNWISE) < mine.rate:
        return ""
    change = f"workers={better.workers}" if of == "workers" else f"cache={better.cache}"
    return (f"{mine.name} trains {mine.rate:,.0f} img/s; {change} would be "
            f"{better.rate / mine.rate:.1f} times as fast here")  # fmt: skip


def loading_table(costs: Sequence[LoadCost]) -> list[str]:
    """Lines for people, one for each way to load."""
    lines = []
    for cost in costs:
        speed = cost.problem or f"{cost.rate:,.0f} img/s"
        parts = f"   waits {1e3 * cost.wait:.1f}, step {1e3 * cost.step:.1f} (alone {1e3 * cost.bare:.1f}) ms"
        lines.append(f"{cost.name:<31} {speed:>11}{'' if cost.problem else parts}")
    return lines
