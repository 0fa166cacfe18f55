"""`batch=study`: train every batch size for a while from several seeds, in a process of its own, and compare.

The rules are in config/study.py. The process (`python -m goodfit.api.batch_study FOLDER`) reads `ask.json` and `split.csv`,
which holds no test split, trains with the engine's own `fit`, and prints one line of JSON for each training: what it
printed before it died counts. All that it writes lies in a temporary folder that is removed at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from goodfit.api.assemble import NOT_COMPUTED, Parts, assemble, execution
from goodfit.config.execution import batch_candidates
from goodfit.config.facts import Facts
from goodfit.config.measured import Measured
from goodfit.config.plan import Plan
from goodfit.config.request import TrainRequest
from goodfit.config.resolve import resolve
from goodfit.config.sizes import InputSizes
from goodfit.config.study import MAX_SECONDS, StudyCost, StudyDesign, design_study, judge
from goodfit.core.errors import RequestError, StorageError, TrainingError
from goodfit.core.journal import Journal
from goodfit.core.machine import memory_limited
from goodfit.core.places import cache_folder
from goodfit.core.safeio import read_json, write_json, write_text
from goodfit.data.index import LEFT_OUT, SPLITS, DatasetIndex, data_hash, read_split, write_split
from goodfit.data.split import subset
from goodfit.engine.checkpoint import Checkpoints, Snapshot
from goodfit.engine.loop import fit
from goodfit.engine.stop import StopFlag

FORMAT = "studied-1"
MEMORY_SHARE = 0.25  # of the free memory, up to which the pictures of a study are kept decoded
LATE = 3.0  # times the projected seconds, after which a study is ended

Trial = tuple[int, int]  # batch, seed


def check_request(request: TrainRequest) -> None:
    """Refuse a study of what is decided already.

    Raises:
        RequestError: `batch=study` together with a batch or an earlier plan.
    """
    if not request.batch_study:
        return
    if request.batch is not None or request.plan is not None:
        other = f"batch={request.batch}" if request.batch is not None else f"plan={request.plan}"
        raise RequestError(f"batch=study chooses the batch, and {other} gives one.", next="leave one of them out")


def study_batches(request: TrainRequest, facts: Facts, plan: Plan, index: DatasetIndex, journal: Journal) -> Measured:
    """Train the batch sizes that fit over equal samples, and add what they reached to what was measured.

    Args:
        facts: With what was measured, if anything was; without it the sizes and samples are those of the rule.
        plan: As it is without the study.
        journal: Told the cost before it starts, and how far it is.

    Returns:
        The measurements with `study`, or with `study_problem` where nothing can be said.
    """
    plan = plan.thawed()  # a trial may be shorter than the first phase
    found = facts.measured or Measured(batch=plan.batch.value)
    rates = {} if plan.deterministic.value else found.rates()
    sizes = [(b, rates.get(b, 0.0)) for b in rates or batch_candidates(facts.data.num_train)]
    design = design_study([s for s in sizes if s[0] >= plan.accumulate.value], num_train=facts.data.num_train,
                          num_val=facts.data.num_val, num_classes=facts.data.num_classes, epochs=plan.epochs.value)  # fmt: skip
    if isinstance(design, str):
        journal.emit("stage", name="study", text=f"not done: {design}")
        return replace(found, study_problem=design)
    kept = cache_folder() / FORMAT / f"{_key(plan, design, index, facts)}.json"
    if kept.is_file() and request.measure is None:
        with contextlib.suppress(KeyError, TypeError, ValueError, StorageError):  # damaged: trained again
            earlier = tuple(StudyCost.from_dict(cost) for cost in read_json(kept)["study"])
            if judge(earlier):
                journal.emit("stage", name="study", text="as found earlier on this machine")
                return replace(found, study=earlier)
    journal.emit("stage", name="study", text=design.describe())
    start = time.monotonic()
    costs, ended = _train_all(request, facts, plan, index, design, journal)
    seconds = time.monotonic() - start
    if not judge(costs) or (ended and plan.deterministic.value):  # time may not decide how many seeds count
        why = f"it was ended after {seconds:.0f} s" if ended else "fewer than two sizes could be trained"
        return replace(found, study_problem=why)
    with contextlib.suppress(OSError, StorageError):  # a cache: the study serves this run without it
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"study": [asdict(cost) for cost in costs], "seconds": seconds})
    journal.emit("stage", name="study", text=f"{len(costs)} sizes compared in {seconds:.0f} s", seconds=seconds)
    return replace(found, study=costs)


def _train_all(
    request: TrainRequest, facts: Facts, plan: Plan, index: DatasetIndex, design: StudyDesign, journal: Journal
) -> tuple[tuple[StudyCost, ...], bool]:
    """Every size from every seed, a seed at a time; and whether the time ran out."""
    trials = [
        (size, seed) for seed in range(plan.seed.value, plan.seed.value + design.num_seeds) for size in design.sizes
    ]
    room = MEMORY_SHARE * facts.machine.free_memory
    side = InputSizes.of(plan).kept_for(plan.scale.value)
    fits = design.num_train * facts.data.pixel_bytes_at * side**2 <= room
    plans = {size: trial_plan(request, facts, size, design).changed(cache="ram" if fits else "off").to_dict()
             for size in design.sizes}  # fmt: skip
    limit = MAX_SECONDS if design.seconds is None else max(60.0, LATE * design.seconds)
    end = time.monotonic() + limit
    found: dict[Trial, dict[str, Any]] = {}
    problems: dict[int, str] = {}
    with tempfile.TemporaryDirectory(prefix="goodfit-study-") as made:
        folder = Path(made)
        write_text(folder / "split.csv", write_split(study_index(index, plan, design)))
        while trials:
            ask = {"trials": trials, "plans": {str(size): p for size, p in plans.items()}, "root": str(index.root.resolve()),
                   "parent": os.getpid(), "memory": facts.machine.free_memory}  # fmt: skip
            with contextlib.closing(_ask(folder, ask, end)) as lines:  # an interrupt here ends the process too
                for line in lines:
                    found[line["batch"], line["seed"]] = line
                    journal.emit("progress", name="study", done=len(found), total=design.num_seeds * len(design.sizes))
                    if line["problem"]:
                        problems[line["batch"]] = line["problem"]
            trials = [t for t in trials if t not in found and t[0] not in problems]
            if not trials or time.monotonic() >= end:
                break
            problems[trials[0][0]] = "the process died, most likely of memory"
            trials = [t for t in trials if t[0] not in problems]
    return _costs(design, plan.monitor.value, found, problems), bool(trials)


def _costs(
    design: StudyDesign, monitor: str, found: dict[Trial, dict[str, Any]], problems: dict[int, str]
) -> tuple[StudyCost, ...]:
    """By size, from the lines of the process; the seeds in order, as far as each size was trained."""
    made = []
    for size in design.sizes:
        lines = [line for (batch, _), line in sorted(found.items()) if batch == size and not line["problem"]]
        seconds = sum(line["seconds"] for line in lines)
        made.append(StudyCost(
            batch=size, monitor=monitor, values=tuple(line["value"] for line in lines),
            losses=tuple(line["loss"] for line in lines), samples=design.samples,
            rate=len(lines) * design.samples / seconds if seconds else 0.0, problem=problems.get(size, ""),
        ))  # fmt: skip
    return tuple(made)


def trial_plan(request: TrainRequest, facts: Facts, size: int, design: StudyDesign) -> Plan:
    """The plan of one training: the run's own rules for this batch, so that the learning rate is that of the size."""
    asked = replace(request, batch=size, batch_study=None, epochs=design.epochs, time=None, swa=None)
    whole = resolve(request, facts)
    share = design.epochs / whole.epochs.value  # of a long run: lengths are the same part of the short one
    lengths: dict[str, Any] = {"warmup": f"{share * whole.warmup.value:g}", "period": f"{share * whole.period.value:g}",
               "milestones": ",".join(f"{share * mark:g}" for mark in whole.milestones.value),
               "decay": f"{100 * whole.decay.value:g}%"}  # fmt: skip
    asked = replace(asked, **{name: text for name, text in lengths.items() if getattr(request, name) is not None})
    if request.gamma is not None and whole.schedule.value in ("exponential", "exp-range"):  # of each epoch
        asked = replace(asked, gamma=whole.gamma.value ** (1 / share))
    return resolve(asked, facts).changed(workers=0, fraction=1.0, patience=0, rehearse=False)


def study_index(index: DatasetIndex, plan: Plan, design: StudyDesign) -> DatasetIndex:
    """Stratified parts of train and val, those of smaller studies contained in larger ones; all else is left out."""
    train, val = SPLITS.index("train"), SPLITS.index("val")
    seed = plan.split_seed.value
    rows = subset(index, plan.fraction.value, seed)
    share = plan.fraction.value * design.num_train / len(rows)
    chosen = _trimmed(index, subset(index, share, seed), design.num_train)
    as_train = index.with_splits(np.where(index.splits == val, train, LEFT_OUT).astype(np.int8))
    judged = subset(as_train, design.num_val / max(1, len(as_train.rows("train"))), seed)
    splits = np.full(len(index), LEFT_OUT, np.int8)
    splits[chosen], splits[judged] = train, val
    return index.with_splits(splits)


def _trimmed(index: DatasetIndex, rows: npt.NDArray[np.int64], num: int) -> npt.NDArray[np.int64]:
    """At most so many rows, taken from the largest classes: each class was rounded up."""
    while len(rows) > num:
        counts = np.bincount(index.targets[rows])
        if counts.max() < 2:
            break
        rows = np.delete(rows, np.flatnonzero(index.targets[rows] == counts.argmax())[-1])
    return rows


def _key(plan: Plan, design: StudyDesign, index: DatasetIndex, facts: Facts) -> str:
    """What a study depends on: what the run computes, its samples, the machine and the versions."""
    derived = ("batch", "lr", "head_lr")  # but for a rate that was asked for, which follows no batch
    values = {n: d.value for n, d in plan.decisions().items()
              if n not in NOT_COMPUTED and (n not in derived or d.source == "asked")}  # fmt: skip
    samples = [data_hash(index, split) for split in ("train", "val")]
    versions = [metadata.version(name) for name in ("torch", "timm")]
    text = json.dumps(
        [values, design.sizes, design.num_seeds, samples, facts.machine.device_name, versions], sort_keys=True
    )
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _ask(folder: Path, ask: dict[str, Any], end: float) -> Generator[dict[str, Any]]:
    """Run a process on these trials, and give each line as it comes; it is ended at `end`, and with its caller."""
    write_json(folder / "ask.json", ask)
    process = subprocess.Popen([sys.executable, "-m", "goodfit.api.batch_study", str(folder)], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    assert process.stdout is not None
    timer = threading.Timer(max(0.0, end - time.monotonic()), process.kill)
    timer.start()
    try:
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # cut off when the process died, or a library's own words
                made = json.loads(line)
                if isinstance(made, dict) and "problem" in made:
                    yield made
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


# In the process of its own --------------------------------------------------------------------------------------------


class _Orphaned(StopFlag):
    """Asks for a stop when the process that wants the answer is gone."""

    def __init__(self, parent: int) -> None:
        super().__init__()
        self._parent = parent

    def __call__(self) -> bool:
        return os.getppid() != self._parent


class _Unsaved(Checkpoints):
    """Keeps no state: that of resnet10t is 80 MB, and fit would write and sync it several times in each training."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "checkpoints", {})

    def is_due(self) -> bool:
        return False

    def is_overdue(self) -> bool:
        return False

    def hold(self, snapshot: Snapshot) -> None:
        pass

    def save(self, snapshot: Snapshot) -> None:
        pass


def train_trials(
    index: DatasetIndex, plans: dict[int, Plan], trials: Sequence[Trial], folder: Path, stop: StopFlag
) -> Iterator[dict[str, Any]]:
    """Train each, one after the other; the pictures are decoded once.

    Raises:
        Stopped: `stop` asked for it.
    """
    first: Parts | None = None  # its decoded pictures serve all
    for size, seed in trials:
        line: dict[str, Any] = {"batch": size, "seed": seed, "value": 0.0, "loss": 0.0, "seconds": 0.0, "problem": ""}
        plan = plans[size].changed(seed=seed)
        with execution(plan):
            parts = assemble(plan, index)
            first = first or parts
            first.store.warm(plan.threads.value)
            samples: Any = parts.train.samples
            parts.train.samples = replace(samples, store=first.store)
            start = time.monotonic()
            try:
                fit(parts.state, parts.context, parts.train, first.val, settings=parts.settings, checkpoints=_Unsaved(folder),
                    journal=Journal(None), stop=stop)  # fmt: skip
            except (TrainingError, RuntimeError, MemoryError) as error:
                line["problem"] = (str(error) or "out of memory").splitlines()[0][:200]
        best = parts.state.progress.best
        if best is not None and math.isfinite(best["value"]) and math.isfinite(best["loss"]):
            line |= {"value": best["value"], "loss": best["loss"], "seconds": time.monotonic() - start}
        else:
            line["problem"] = line["problem"] or "no validation was finite"
        yield line


def main() -> None:
    """Answer `ask.json` of the folder given, one line of JSON per training."""
    folder = Path(sys.argv[1])
    ask = read_json(folder / "ask.json")
    plans = {int(size): Plan.from_dict(plan) for size, plan in ask["plans"].items()}
    limited = all(plan.device.value == "cpu" for plan in plans.values())
    index = read_split(folder / "split.csv", Path(ask["root"]))
    with memory_limited(ask["memory"]) if limited else contextlib.nullcontext():
        for line in train_trials(index, plans, [tuple(t) for t in ask["trials"]], folder, _Orphaned(ask["parent"])):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
