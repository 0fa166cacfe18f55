"""Measuring before the plan: a process of its own takes the steps, and what it finds is remembered per machine.

The process is api/probe_child.py. What it printed before it died counts, and the caller's model, memory and random
state are never touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from goodfit.api.probe_child import MAX_SECONDS, RUN_SHARE, START_SECONDS
from goodfit.config.execution import batch_candidates, matching, modes_to_try, pays_to_compile, ways_to_execute
from goodfit.config.facts import MachineFacts
from goodfit.config.loading import LoadCost
from goodfit.config.measured import (
    MEMORY_SHARE,
    AllocatorCost,
    BatchCost,
    Measured,
    StepCost,
    best_batch,
    best_execution,
    latest,
)
from goodfit.config.plan import Plan
from goodfit.config.request import TrainRequest
from goodfit.config.sizes import InputSizes
from goodfit.config.time_rules import WAY_STEPS, is_worth
from goodfit.core.errors import StorageError
from goodfit.core.machine import num_cores
from goodfit.core.places import cache_folder
from goodfit.core.safeio import read_json, write_json, write_text
from goodfit.data.index import DatasetIndex, write_split

LEAST_PIXELS = 2e8  # of input in a whole run, below which it is over before measuring would pay
LOADING_SECONDS = 15.0  # for loading, if that is less than a quarter of what measuring may take
LOADING_LEAST = 2.5  # where measuring was asked for, also before a short run
LOADING_STEPS = 11  # that one way to load takes at least
SAMPLES = 64  # real pictures in the batches; larger batches repeat them
LEAST_TIME = (
    600.0  # seconds of a time budget, below which a minute of measuring is not spent: what is known already is used
)
COMPILE_SECONDS = 60.0  # that trying to compile may take, start of the process included, where it was not asked for
FORMAT = "measured-2"


def wants_measuring(request: TrainRequest, plan: Plan, num_train: int, base: Plan | None) -> bool:
    """Whether to measure: not where everything was decided before, where the run is short, or where it must repeat."""
    if request.measure is not None:
        return request.measure
    if base is not None or plan.deterministic.value:
        return False
    pixels = float(num_train) * plan.epochs.value * plan.imgsz.value**2
    decided = all(getattr(plan, name).source == "asked" for name in ("batch", "precision", "channels_last"))
    return pixels >= LEAST_PIXELS and not decided


def measure(
    request: TrainRequest, plan: Plan, index: DatasetIndex, rows: npt.NDArray[np.int64], machine: MachineFacts
) -> Measured | None:
    """Time the plan's training step in every way that this machine offers, and then batch sizes in the best way.

    Args:
        plan: As the rules made it; where something thaws during the run, it is measured thawed.
        rows: Training rows; 64 of them, spread evenly, are the pictures that are used.

    Returns:
        What was found. Nothing, if no process came far enough; None if the time budget of the run is too short for it.
    """
    plan = plan.thawed()
    memory = int((request.memory or MEMORY_SHARE) * machine.free_memory)
    key = _key(plan, index, len(rows), machine)
    kept = cache_folder() / FORMAT / f"{key}.json"
    if kept.is_file() and request.measure is None:
        with contextlib.suppress(KeyError, TypeError, ValueError, StorageError):  # damaged: measured again
            earlier = Measured.from_dict(read_json(kept))
            if _still_holds(earlier, plan, len(rows), memory):
                return replace(earlier, memory=memory)
    takes = WAY_STEPS * len(ways_to_execute(plan, machine)) * plan.batch.value * plan.sample_seconds
    if request.measure is None and (0 < plan.time.value < LEAST_TIME or not is_worth(takes, plan.time.value)):
        return None
    ask = {"class_names": list(index.class_names), "counts": np.bincount(index.targets[rows]).tolist(),
           "memory": memory, "num_train": len(rows), "root": str(index.root)}  # fmt: skip
    chosen = rows[np.linspace(0, len(rows) - 1, min(SAMPLES, len(rows))).astype(np.int64)]
    with tempfile.TemporaryDirectory() as made, ProbeProcess(Path(made)) as probe:
        start = time.monotonic()
        _write_batch(Path(made), plan, index, chosen)
        write_text(Path(made) / "split.csv", write_split(index))
        found = _measure(probe, ask, request, plan, machine, start)
    if best_execution(matching(found.steps, plan.precision, plan.channels_last)) is not None:
        with contextlib.suppress(OSError, StorageError):  # a cache: what was measured serves this run without it
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, found.to_dict())
    return found


def _measure(
    probe: ProbeProcess, ask: dict[str, Any], request: TrainRequest, plan: Plan, machine: MachineFacts, start: float
) -> Measured:
    """Each question in turn, in the way that the one before it found best."""
    ways = ways_to_execute(plan, machine)
    answers = probe.ask({**ask, "what": "ways", "ways": ways, "plan": plan.to_dict(),
                         "allocator": machine.has_mallopt and machine.device == "cpu"})  # fmt: skip
    steps = tuple(StepCost(**f) for f in answers if "precision" in f)
    allocator = next((AllocatorCost(**f) for f in answers if "ratio" in f), None)
    best = best_execution(matching(steps, plan.precision, plan.channels_last))
    batches: tuple[BatchCost, ...] = ()
    if best is not None:
        way = plan.changed(precision=best.precision, channels_last=best.channels_last)
        projected = best.seconds * max(1, ask["num_train"] // plan.batch.value) * plan.epochs.value
        projected = min(projected, plan.time.value or projected)
        steps += tuple(_compiled(probe, ask, way, best, mode) for mode in modes_to_try(plan, machine, projected))
        if plan.batch.source != "asked" or request.measure or pays_to_compile(projected):
            asked = {**ask, "what": "sizes", "sizes": _sizes(plan, ask["num_train"]), "plan": way.to_dict()}
            batches = latest(BatchCost(**f) for f in probe.ask(asked))
    size = best_batch(batches, ask["memory"]) if plan.batch.source != "asked" else None
    left = MAX_SECONDS - (time.monotonic() - start)
    loading = _loading(probe, ask, plan, best, size, left, asked=request.measure is not None)
    return Measured(batch=plan.batch.value, steps=steps, batches=batches, loading=loading, memory=ask["memory"],
                    allocator=allocator, seconds=time.monotonic() - start)  # fmt: skip


def _compiled(probe: ProbeProcess, ask: dict[str, Any], way: Plan, best: StepCost, mode: str) -> StepCost:
    """The best eager way, compiled: measured in a process that is ended if it takes too long."""
    limit = 2 * MAX_SECONDS if way.compile.source == "asked" else COMPILE_SECONDS
    asked = {**ask, "what": "compile", "way": asdict(best), "mode": mode, "plan": way.to_dict()}
    found = probe.ask(asked, limit)
    if found:
        return StepCost(**found[0])
    return replace(best, compile=mode, seconds=0.0, problem=f"not compiled within {limit:.0f} s, or the process died")


def _sizes(plan: Plan, num_train: int) -> list[int]:
    """The batch sizes to try, upwards; one that was asked for among them, to be compared."""
    asked = {plan.batch.value} if plan.batch.source == "asked" else set()
    return sorted({*batch_candidates(num_train), *asked})


def _loading(
    probe: ProbeProcess, ask: dict[str, Any], plan: Plan, way: StepCost | None, size: BatchCost | None, left: float, *,
    asked: bool,
) -> tuple[LoadCost, ...]:  # fmt: skip
    """What the step waits for data, executed as it will be, within the seconds that are left for measuring."""
    if way is None:
        return ()
    plan = plan.changed(precision=way.precision, channels_last=way.channels_last)
    plan = plan if size is None else plan.changed(batch=size.batch)
    step = (size or way).seconds
    seconds = min(left, _loading_seconds(plan, ask["num_train"], step))
    if seconds < LOADING_STEPS * step and not asked:
        return ()
    seconds = max(seconds, LOADING_LEAST)
    ask = {**ask, "what": "loading", "seconds": seconds, "num_cores": num_cores(), "plan": plan.to_dict()}
    found = [LoadCost(**f) for f in probe.ask(ask)]
    return tuple({cost.key: cost for cost in found}.values()) or (  # the later counts
        LoadCost(cache=plan.cache.value, workers=0, prefetch=plan.prefetch.value, problem="could not be measured"),
    )


def _loading_seconds(plan: Plan, num_train: int, step: float) -> float:
    """For measuring loading; 0 where the run is too short to gain by knowing, or its steps too long to count enough."""
    seconds = min(LOADING_SECONDS, RUN_SHARE / 4 * num_train / plan.batch.value * plan.epochs.value * step)
    return seconds if seconds >= max(START_SECONDS / 4, LOADING_STEPS * step) else 0.0


def _still_holds(earlier: Measured, plan: Plan, num_train: int, memory: int) -> bool:
    """Whether nothing was left out then that would be measured now: larger batches for want of memory, which may be
    there by now, or loading for a run that was short."""
    ended_by_memory = any(b.problem or b.memory > earlier.memory for b in earlier.batches)
    if ended_by_memory and memory > 1.1 * earlier.memory:
        return False
    way = best_execution(matching(earlier.steps, plan.precision, plan.channels_last))
    size = best_batch(earlier.batches, memory)
    plan = plan if size is None else plan.changed(batch=size.batch)
    return bool(earlier.loading) or way is None or not _loading_seconds(plan, num_train, (size or way).seconds)


def _key(plan: Plan, index: DatasetIndex, num_train: int, machine: MachineFacts) -> str:
    """What the measurements depend on: the step, the machine and the versions."""
    names = ("model", "imgsz", "optimizer", "ema", "augment", "mixup", "cutmix", "erase", "dropout", "drop_path",
             "balance", "label_smoothing", "clip", "device", "threads", "batch", "accumulate", "pretrained", "epochs",
             "deterministic", "freeze", "layer_decay")  # fmt: skip
    parts = {name: getattr(plan, name).value for name in names}
    inputs = InputSizes.of(plan)
    versions = [metadata.version(name) for name in ("torch", "timm")]
    executed = ("precision", "channels_last", "compile")
    asked = [getattr(plan, n).value for n in executed if getattr(plan, n).source == "asked"]
    text = json.dumps([parts, inputs.largest, inputs.typical, asked, plan.batch.source, len(index.class_names),
                       batch_candidates(num_train), machine.device_name, machine.num_cores, versions, _loading_key(plan, index)])  # fmt: skip
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _loading_key(plan: Plan, index: DatasetIndex) -> list[Any]:
    """What loading depends on beside the step: its options, and what decoding costs, by size and kind of the files."""
    asked = [getattr(plan, n).value for n in ("workers", "prefetch") if getattr(plan, n).source == "asked"]
    pixels = float(np.median(index.sizes.astype(float).prod(axis=1))) if index.sizes is not None else 1.0
    kind = round(float(np.log2(max(1.0, pixels)))), index.file(0).suffix.lower()
    place = str(index.root) if plan.cache.value == "off" else ""  # a cache hides how fast the files' disk is
    return [plan.cache.value, plan.cache.source, plan.policy.value, asked, *kind, place]


def _write_batch(folder: Path, plan: Plan, index: DatasetIndex, rows: npt.NDArray[np.int64]) -> None:
    """Real pictures at the largest input of the run, from which smaller ones are cut."""
    from goodfit.runtime.images import Preprocessing

    preprocessing = Preprocessing.from_dict(plan.preprocessing.value).at(InputSizes.of(plan).largest)
    images = np.stack([preprocessing.pixels(index.file(row)).transpose(1, 2, 0) for row in rows.tolist()])
    np.savez(folder / "batch.npz", images=images, targets=index.targets[rows])


class ProbeProcess:
    """The process that measures, started once: each question is answered by a process forked from it.

    So torch is imported once (4 s), in the background while the caller prepares the questions, and still a crash, a
    limit of memory or a peak of it belongs to one answer alone. Answers go into a file: compilers that an answering
    process started would hold a pipe open after its end.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = self._start()

    def __enter__(self) -> ProbeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, question: dict[str, Any], seconds: float = 2 * MAX_SECONDS) -> list[dict[str, Any]]:
        """What was found by the answering process, also if it died or took longer than `seconds`."""
        write_json(self._folder / "ask.json", question)
        self._process = self._process or self._start()
        status = self._wait_for_answer(self._process, seconds)
        found = []
        for line in (self._folder / "found").read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):  # cut off when the process died, or a library's own words
                made = json.loads(line)
                if isinstance(made, dict) and "problem" in made:
                    found.append(made)
        left = question.get("sizes", ())[len(found) :]
        if status != "0" and left and not any(f["problem"] for f in found):
            found.append(asdict(BatchCost(batch=left[0], problem="the process died, most likely of memory")))
        return found

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", "goodfit.api.probe_child", str(self._folder)], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                start_new_session=True)  # fmt: skip

    def _wait_for_answer(self, process: subprocess.Popen[str], seconds: float) -> str:
        """The status the answering process ended with; empty if it was ended, or all of them died."""
        assert process.stdin is not None and process.stdout is not None
        (self._folder / "found").write_text("")
        watch = threading.Timer(seconds, _kill, [process])
        watch.start()
        status = ""
        with contextlib.suppress(OSError):
            process.stdin.write("answer\n")
            process.stdin.flush()
            status = process.stdout.readline().strip()
        watch.cancel()
        if not status:
            self._end()
        return status

    def _end(self) -> None:
        if self._process is None:
            return
        _kill(self._process)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not read by then
                assert pipe is not None
                pipe.close()
        self._process = None


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process with all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
