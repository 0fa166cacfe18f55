"""Measure loading and training together: what a step waits for data with more and more loader processes.

Runs in a process of its own (api/probe.py). Each way to load is tried twice, upwards and back, so that a machine whose
speed wanders favours none of them.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from goodfit.config.loading import DEEPER, WORTHWHILE, LoadCost, best_loading, more_may_help
from goodfit.core.errors import GoodfitError
from goodfit.data.loader import MicroBatch, TrainLoader
from goodfit.engine.state import TrainState, copy_buffers
from goodfit.engine.step import StepContext, StepRecord, train_step

SECONDS_PER_WAY = 1.5  # of a pass
MIN_STEPS, MAX_STEPS = 4, 80
WARM_SECONDS = 1.0  # at most, after the first batch: until every process has given one
BARE_STEPS, BARE_SECONDS = 2, 0.4  # before every pass, at least
NEAR = 0.85  # of the best rate, below which a second pass could not change the choice
BATCHES = 200  # of an epoch that is made for measuring: more than a pass can use

LoaderOf = Callable[[LoadCost], TrainLoader]


@dataclass(slots=True)
class _Tally:
    """What the passes of one way to load added up to."""

    waits: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)


class _Loading:
    """The step, and what was found about each way to load."""

    def __init__(
        self, state: TrainState, context: StepContext, loader_of: LoaderOf, num_micro: int, steps_per_epoch: int
    ) -> None:
        self._state = state
        self._context = context
        self._loader_of = loader_of
        self._num_micro = num_micro
        self._steps_per_epoch = steps_per_epoch
        self._tallies: dict[tuple[str, int, int], _Tally] = {}
        self._bare: list[float] = []
        self._group: list[MicroBatch] | None = None
        self._passes = 0

    def measure(self, way: LoadCost, seconds: float) -> LoadCost:
        """One more pass over a way to load; all passes so far."""
        try:
            loader = self._loader_of(way)
            self._time_bare(loader)
            self._passes += 1
            self._time_pass(loader, self._tallies.setdefault(way.key, _Tally()), seconds)
        except (RuntimeError, OSError, MemoryError, GoodfitError) as error:
            return replace(way, problem=(str(error).splitlines() or [type(error).__name__])[0][:200])
        return self.cost(replace(way, batch=loader.batch))

    def cost(self, way: LoadCost) -> LoadCost:
        """The figures of a way that was measured, from all that is known by now."""
        tally = self._tallies[way.key]
        wait, step, bare = statistics.fmean(tally.waits), statistics.fmean(tally.steps), statistics.median(self._bare)
        if self._context.device.kind != "cpu":  # it works on while the host waits: only what it stands still counts
            whole = wait + step
            wait = min(wait, max(0.0, whole - bare))
            step = whole - wait
        start = min(tally.starts) / self._steps_per_epoch if way.workers else 0.0
        return replace(way, wait=wait, step=step, start=start, bare=bare)

    def _time_bare(self, loader: TrainLoader) -> None:
        if self._group is None:
            self._group = loader.group(0, 0, self._num_micro)
            self._run(iter([self._group] * 2))  # warm: allocation, kernel choice
        _, steps = self._run(itertools.repeat(self._group), seconds=BARE_SECONDS, least=BARE_STEPS + 1)
        self._bare += steps[1:]

    def _time_pass(self, loader: TrainLoader, tally: _Tally, seconds: float) -> None:
        groups = loader.groups(self._passes, 0, self._num_micro)
        with contextlib.closing(groups):
            began = time.perf_counter()
            first = next(groups)
            tally.starts.append(time.perf_counter() - began)
            self._run(iter([first]))
            self._run(groups, seconds=WARM_SECONDS, least=1, most=max(1, loader.workers))
            waits, steps = self._run(groups, seconds=seconds, least=MIN_STEPS, most=MAX_STEPS)
        if not steps:
            raise RuntimeError("too few samples to measure loading")
        tally.waits += waits
        tally.steps += steps

    def _run(
        self, groups: Iterator[list[MicroBatch]], *, seconds: float = 1e9, least: int = 0, most: int = BATCHES
    ) -> tuple[list[float], list[float]]:
        """Train as the loop does, each record read one step late. Seconds waited, and seconds of the step, of each."""
        waits: list[float] = []
        steps: list[float] = []
        pending: StepRecord | None = None
        began = before = time.perf_counter()
        while len(steps) < most and (len(steps) < least or before - began < seconds):
            group = next(groups, None)
            if group is None:
                break
            given = time.perf_counter()
            record = train_step(self._state, self._context, group, 0.0, copy_buffers(self._state.model))
            if pending is not None:
                bool(pending.bad)
            pending = record
            after = time.perf_counter()
            waits.append(given - before)
            steps.append(after - given)
            before = after
        if pending is not None:
            bool(pending.bad)  # a device that works beside the host is waited for, in the last step
            if steps:
                steps[-1] += time.perf_counter() - before
        return waits, steps


def measure_loading(
    state: TrainState, context: StepContext, loader_of: LoaderOf, candidates: Sequence[LoadCost], *, num_micro: int,
    steps_per_epoch: int, seconds: float, asked: int | None = None, deeper: bool = True,
) -> Iterator[LoadCost]:  # fmt: skip
    """Train with every way to load until more loader processes cannot gain; the best ones twice.

    Each way is yielded as soon as it was tried, and again at the end with all that was found; the later counts.

    Args:
        loader_of: The loader of a way, over enough samples for `BATCHES` updates; cached pictures are warm.
        candidates: Fewest processes first.
        num_micro: Micro-batches of an update.
        steps_per_epoch: Updates over which the start of loader processes is spread.
        seconds: After this many no further pass is begun, but for one of the first way of each cache and of what was asked for.
        asked: Loader processes that were asked for, tried in any case.
        deeper: Whether more batches ahead may be tried.
    """
    start = time.monotonic()
    bench = _Loading(state, context, loader_of, num_micro, steps_per_epoch)
    each = max(0.0, min(SECONDS_PER_WAY, seconds / 6))
    found: list[LoadCost] = []

    def late() -> bool:
        return time.monotonic() - start > seconds

    for way in candidates:
        before = [c for c in found if c.cache == way.cache and c.workers < way.workers]
        if way.workers != asked and before and (late() or not more_may_help(before)):
            continue
        found.append(bench.measure(way, each))
        yield found[-1]
    best = best_loading(found, cache=candidates[-1].cache)
    if deeper and best is not None and best.workers and best.wait > WORTHWHILE * best.step and not late():
        found.append(bench.measure(replace(best, prefetch=DEEPER, problem=""), each))
        yield found[-1]
    top = max((c.rate for c in found if not c.problem), default=0.0)
    for number in range(len(found) - 1, -1, -1):
        if not late() and not found[number].problem and found[number].rate >= NEAR * top:
            found[number] = bench.measure(found[number], each)
    for cost in found:
        yield cost if cost.problem else bench.cost(cost)
