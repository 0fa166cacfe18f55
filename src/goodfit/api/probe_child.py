"""The process of its own that measures: `python -m goodfit.api.probe_child FOLDER` answers `ask.json` at every line it reads.

Each answer is given by a process forked from it, which writes one JSON object per finding into the file `found`, as soon as
it is known: what was written before it died counts. Its exit status is printed at its end.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from goodfit.api.assemble import (
    assemble,
    assemble_step,
    assemble_task,
    execution,
    picture_store,
    train_loader,
    train_samples,
)
from goodfit.config.loading import LoadCost, load_candidates
from goodfit.config.lr_range import LrCurve
from goodfit.config.measured import AllocatorCost, BatchCost, StepCost, best_execution
from goodfit.config.plan import Plan
from goodfit.config.sizes import InputSizes
from goodfit.core.machine import memory_limited
from goodfit.core.safeio import read_json
from goodfit.data.index import read_split
from goodfit.data.loader import MicroBatch, TrainLoader
from goodfit.data.split import subset
from goodfit.engine.device import DevicePolicy, compiler_problem
from goodfit.engine.ranks import Ranks
from goodfit.engine.state import TrainState
from goodfit.engine.step import StepContext
from goodfit.planning.loading import BATCHES, measure_loading
from goodfit.planning.lr_range import STEPS, range_test
from goodfit.planning.measure import (
    measure_allocator,
    measure_batches,
    measure_compiling,
    measure_executions,
    timed_step,
)
from goodfit.tasks.classify import ClassifyTask

MAX_SECONDS = 60.0
RUN_SHARE = 0.05  # of the projected run that measuring may take, if that is less than a minute
START_SECONDS = 6.0  # of a new process: imports and the network
WARM_BATCHES = 8  # kept in memory, to measure what loading from a warm cache costs


def answer(folder: Path, ask: dict[str, Any]) -> Iterator[Any]:
    """Measure what is asked about the plan: `ask["what"]` names it."""
    plan = Plan.from_dict(ask["plan"])
    limit = memory_limited(ask["memory"]) if plan.device.value == "cpu" else contextlib.nullcontext()
    with limit, execution(plan):
        yield from ANSWERS[ask["what"]](plan, folder, ask)


def _ways(plan: Plan, folder: Path, ask: dict[str, Any]) -> Iterator[StepCost | AllocatorCost]:
    """The training step, executed in several ways; then, in the fastest of them, with freed memory kept or not."""
    plan = plan.changed(compile="off")
    task, group_of = _batches(plan, folder, ask)
    group, steps = group_of(plan.batch.value), _steps_per_epoch(plan, ask)

    def build(precision: str, channels_last: bool) -> tuple[TrainState, StepContext]:
        return assemble_step(plan.changed(precision=precision, channels_last=channels_last), task, steps, Ranks())[:2]

    state, context = build(plan.precision.value, plan.channels_last.value)
    for _ in range(2):
        second = timed_step(state, context, group)
    del state
    found = []
    for cost in measure_executions(
        build, group, ask["ways"], budget(min(second * steps * plan.epochs.value, plan.time.value or math.inf))
    ):
        found.append(cost)
        yield cost
    best = best_execution(found)
    if best is not None and ask.get("allocator"):
        yield measure_allocator(*build(best.precision, best.channels_last), group)


def _compiling(plan: Plan, folder: Path, ask: dict[str, Any]) -> Iterator[StepCost]:
    """One eager way, compiled: a process of its own, because compiling cannot be ended in any other way."""
    way = StepCost(**ask["way"])
    if problem := compiler_problem():
        yield replace(way, compile=ask["mode"], seconds=0.0, problem=problem)
        return
    task, group_of = _batches(plan, folder, ask)
    steps = _steps_per_epoch(plan, ask)

    def build(precision: str, channels_last: bool, mode: str) -> tuple[TrainState, StepContext]:
        tried = plan.changed(precision=precision, channels_last=channels_last, compile=mode)
        return assemble_step(tried, task, steps, Ranks())[:2]

    yield measure_compiling(build, group_of(plan.batch.value), way, ask["mode"])


def _sizes(plan: Plan, folder: Path, ask: dict[str, Any]) -> Iterator[BatchCost]:
    """The training step at growing batch sizes; its memory with the largest input, its time with one of mean cost."""
    held = DevicePolicy(kind=plan.device.value, precision="fp32", channels_last=False).peak_memory()
    task, group_of = _batches(plan, folder, ask)
    eager = plan.changed(compile="off")  # every size would be compiled anew
    state, context, _ = assemble_step(eager, task, _steps_per_epoch(plan, ask), Ranks())
    inputs = InputSizes.of(plan)
    sides = [inputs.largest, inputs.typical] if inputs.varies else [inputs.typical]
    yield from measure_batches(state, context, lambda num: [group_of(num, side) for side in sides], ask["sizes"],
                               ask["memory"], MAX_SECONDS / 2, held)  # fmt: skip


def _loading(plan: Plan, folder: Path, ask: dict[str, Any]) -> Iterator[LoadCost]:
    """Loading and the training step together, with more and more loader processes."""
    index = read_split(folder / "split.csv", Path(ask["root"]))
    rows = subset(index, plan.fraction.value, plan.split_seed.value)
    batch = plan.batch.value
    many = np.tile(rows[np.linspace(0, len(rows) - 1, min(len(rows), BATCHES * batch)).astype(np.int64)],
                   -(-BATCHES * batch // len(rows)))  # fmt: skip
    few = many[np.linspace(0, len(many) - 1, WARM_BATCHES * batch).astype(np.int64)]
    warm = picture_store(plan, index, np.unique(few), cache="ram")  # never the file of a whole cache
    cold = picture_store(plan, index, rows, cache="off")
    task = assemble_task(plan, ask["class_names"], np.array(ask["counts"]))
    typical = InputSizes(imgsz=InputSizes.of(plan).typical)  # one pass is too short for all sizes

    def loader_of(way: LoadCost) -> TrainLoader:
        if way.cache != "off":
            warm.warm(plan.threads.value)
        used = many if way.cache == "off" else np.tile(few, BATCHES // WARM_BATCHES)
        samples = replace(train_samples(plan, index, task, cold if way.cache == "off" else warm), sizes=typical)
        return train_loader(plan.changed(workers=way.workers, prefetch=way.prefetch), samples, used, Ranks())

    steps = _steps_per_epoch(plan, ask)
    state, context, _ = assemble_step(plan, task, steps, Ranks())
    asked = plan.workers.value if plan.workers.source == "asked" else None
    ways = load_candidates(plan.cache.value, ask["num_cores"], prefetch=plan.prefetch.value, workers=asked,
                           cache_asked=plan.cache.source == "asked" and plan.epochs.value > 1)  # fmt: skip
    yield from measure_loading(state, context, loader_of, ways, num_micro=plan.accumulate.value, steps_per_epoch=steps,
                               seconds=ask["seconds"], asked=asked, deeper=plan.prefetch.source != "asked")  # fmt: skip


def _lr(plan: Plan, folder: Path, ask: dict[str, Any]) -> Iterator[LrCurve]:
    """The range test on the run's own augmented batches, as they are once progressive resizing has come to its end."""
    plan = plan.changed(progressive=1.0)
    index = read_split(folder / "split.csv", Path(ask["root"]))
    parts = assemble(plan.changed(cache="ram", ema=False), index, workers=0)
    often = STEPS * parts.train.batch >= len(parts.train.rows)  # else no picture is seen twice
    if not often or plan.cache.value == "off" or parts.store.num_bytes > ask["memory"] // 4:
        parts = assemble(plan.changed(cache="off", ema=False), index, workers=0)
    parts.store.warm(plan.threads.value)
    ratio = plan.lr.value / float(parts.state.optimizer.param_groups[0]["peak_lr"])  # not 1 with layer_decay
    curve = range_test(parts.state, parts.context, lambda epoch: parts.train.groups(epoch, 0, plan.accumulate.value),
                       timed=not plan.deterministic.value)  # fmt: skip
    yield replace(curve, rates=tuple(rate * ratio for rate in curve.rates))


ANSWERS: dict[str, Callable[[Plan, Path, dict[str, Any]], Iterator[Any]]] = {
    "ways": _ways, "sizes": _sizes, "compile": _compiling, "loading": _loading, "lr": _lr
}  # fmt: skip


class _GroupOf(Protocol):
    def __call__(self, num: int, side: int = ...) -> Sequence[MicroBatch]: ...


def _batches(plan: Plan, folder: Path, ask: dict[str, Any]) -> tuple[ClassifyTask, _GroupOf]:
    """The plan's task, and what makes a batch of so many of the few real pictures; of the run's typical size, or cut to
    another one."""
    with np.load(folder / "batch.npz") as stored:  # arrays of numbers only: allow_pickle is off
        images, targets = stored["images"], stored["targets"]
    task = assemble_task(plan, ask["class_names"], np.array(ask["counts"]))

    def group_of(num: int, side: int = InputSizes.of(plan).typical) -> Sequence[MicroBatch]:
        parts = np.array_split(np.arange(num) % len(targets), plan.accumulate.value)
        cut = images[:, :side, :side]
        return [MicroBatch(part, task.collate(cut[part].transpose(0, 3, 1, 2), targets[part])) for part in parts]

    return task, group_of


def _steps_per_epoch(plan: Plan, ask: dict[str, Any]) -> int:
    return max(1, int(ask["num_train"]) // plan.batch.value)


def budget(projected: float) -> float:
    """Seconds for timing the ways: half of a minute, or of 5 % of the projected run, less what the process takes to start."""
    return max(0.0, min(MAX_SECONDS, RUN_SHARE * projected) / 2 - START_SECONDS)


def main() -> None:
    """Answer at every line of standard input until it ends; with `--now`, once."""
    folder = Path(sys.argv[1])
    if "--now" in sys.argv:
        _write_answer(folder)
        return
    for _ in sys.stdin:
        print(_answer_apart(folder), flush=True)


def _write_answer(folder: Path) -> None:
    for cost in answer(folder, read_json(folder / "ask.json")):
        print(json.dumps(asdict(cost)), flush=True)


def _answer_apart(folder: Path) -> int:
    """Answer in a process of its own. Returns its exit status, or the signal it died of as a negative number."""
    with open(folder / "found", "w", encoding="utf-8") as found:
        if sys.platform != "linux":  # a fork of a process that has loaded Apple's libraries may crash
            command = [sys.executable, "-m", "goodfit.api.probe_child", str(folder), "--now"]
            return subprocess.run(command, stdout=found, stdin=subprocess.DEVNULL).returncode
        child = os.fork()  # so far there are no threads but OpenBLAS's, which survives it, and no device was touched
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        status = 1
        try:
            os.dup2(found.fileno(), 1)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            _write_answer(folder)
            status = 0
        finally:  # never back into the loop that reads the questions
            os._exit(status)


if __name__ == "__main__":
    main()
