"""Measuring before the plan: a process of its own takes the steps, and what it finds is remembered per machine.

`python -m goodfit.api.probe FOLDER` is that process: it reads `ask.json` and `batch.npz` from the folder and prints one
JSON object per finding. What it printed before it died counts, and the caller's model, memory and random state are
never touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from goodfit.config.execution import batch_candidates, matching
from goodfit.config.facts import MachineFacts
from goodfit.config.measured import MEMORY_SHARE, BatchCost, Measured, StepCost, best_execution
from goodfit.config.plan import Decision, Plan
from goodfit.config.request import TrainRequest
from goodfit.core.errors import StorageError
from goodfit.core.places import cache_folder
from goodfit.core.safeio import read_json, write_json
from goodfit.data.index import DatasetIndex
from goodfit.data.loader import MicroBatch

MAX_SECONDS = 60.0
RUN_SHARE = 0.05  # of the projected run that measuring may take, if that is less than a minute
START_SECONDS = 6.0  # of a new process: imports and the network
LEAST_PIXELS = 2e8  # of input in a whole run, below which it is over before measuring would pay
SAMPLES = 64  # real pictures in the batches; larger batches repeat them
FORMAT = "measured-1"


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
) -> Measured:
    """Time the plan's training step in every way that this machine offers, and then batch sizes in the best way.

    Args:
        plan: As the rules made it.
        rows: Training rows; 64 of them, spread evenly, are the pictures that are used.

    Returns:
        What was found. Nothing, if no process came far enough.
    """
    memory = int((request.memory or MEMORY_SHARE) * machine.free_memory)
    key = _key(plan, index, len(rows), machine)
    kept = cache_folder() / FORMAT / f"{key}.json"
    if kept.is_file() and request.measure is None:
        with contextlib.suppress(KeyError, TypeError, ValueError, StorageError):  # damaged: measured again
            earlier = Measured.from_dict(read_json(kept))
            if not _ended_by_memory(earlier) or memory <= 1.1 * earlier.memory:
                return replace(earlier, memory=memory)
    start = time.monotonic()
    ask = {"class_names": list(index.class_names), "counts": np.bincount(index.targets[rows]).tolist(),
           "memory": memory, "num_train": len(rows)}  # fmt: skip
    chosen = rows[np.linspace(0, len(rows) - 1, min(SAMPLES, len(rows))).astype(np.int64)]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        _write_batch(folder, plan, index, chosen)
        ways = ways_to_execute(plan, machine)
        steps = tuple(StepCost(**f) for f in _ask(folder, {**ask, "ways": ways, "plan": plan.to_dict()}))
        best = best_execution(matching(steps, plan.precision, plan.channels_last))
        batches: tuple[BatchCost, ...] = ()
        if best is not None and plan.batch.source != "asked":
            way = _executed(plan, best.precision, best.channels_last)
            asked = {**ask, "sizes": batch_candidates(len(rows)), "plan": way.to_dict()}
            batches = tuple(BatchCost(**f) for f in _ask(folder, asked))
    found = Measured(batch=plan.batch.value, steps=steps, batches=batches, memory=memory,
                     seconds=time.monotonic() - start)  # fmt: skip
    if best is not None:
        with contextlib.suppress(OSError, StorageError):  # a cache: what was measured serves this run without it
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, found.to_dict())
    return found


def ways_to_execute(plan: Plan, machine: MachineFacts) -> list[tuple[str, bool]]:
    """Precision and memory format, plain fp32 first; half precision only where the hardware has it."""
    half = ["bf16"] if machine.native_bf16 else ["fp16"] if machine.device == "cuda" else []
    ways = [("fp32", False), ("fp32", True), *((p, last) for p in half for last in (True, False))]
    asked = (plan.precision.value, plan.channels_last.value)
    return ways if asked in ways else [*ways, asked]


def _executed(plan: Plan, precision: str, channels_last: bool) -> Plan:
    """The plan in another way of execution."""
    return replace(plan, precision=Decision(precision, "", "rule"), channels_last=Decision(channels_last, "", "rule"))


def _ended_by_memory(found: Measured) -> bool:
    """Whether larger batches were left out for want of memory, which may be there now."""
    return any(b.problem or b.memory > found.memory for b in found.batches)


def _key(plan: Plan, index: DatasetIndex, num_train: int, machine: MachineFacts) -> str:
    """What the measurements depend on: the step, the machine and the versions."""
    names = ("model", "imgsz", "optimizer", "ema", "augment", "mixup", "cutmix", "erase", "dropout", "drop_path",
             "balance", "label_smoothing", "clip", "device", "threads", "batch", "accumulate", "pretrained")  # fmt: skip
    parts = {name: getattr(plan, name).value for name in names}
    versions = [metadata.version(name) for name in ("torch", "timm")]
    asked = [getattr(plan, n).value for n in ("precision", "channels_last") if getattr(plan, n).source == "asked"]
    text = json.dumps([parts, asked, plan.batch.source, len(index.class_names), batch_candidates(num_train),
                       machine.device_name, machine.num_cores, versions])  # fmt: skip
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _write_batch(folder: Path, plan: Plan, index: DatasetIndex, rows: npt.NDArray[np.int64]) -> None:
    from goodfit.runtime.images import Preprocessing

    preprocessing = Preprocessing.from_dict(plan.preprocessing.value)
    images = np.stack([preprocessing.pixels(index.file(row)).transpose(1, 2, 0) for row in rows.tolist()])
    np.savez(folder / "batch.npz", images=images, targets=index.targets[rows])


def _ask(folder: Path, ask: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a process on what is asked; its findings, also if it died or took far too long."""
    write_json(folder / "ask.json", ask)
    process = subprocess.Popen([sys.executable, "-m", "goodfit.api.probe", str(folder)], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    try:
        output, _ = process.communicate(timeout=2 * MAX_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    finally:
        process.kill()
    found = []
    for line in output.splitlines():
        with contextlib.suppress(ValueError):  # cut off when the process died, or a library's own words
            made = json.loads(line)
            if isinstance(made, dict) and "problem" in made:
                found.append(made)
    left = ask.get("sizes", ())[len(found) :]
    if process.returncode and left and not any(f["problem"] for f in found):
        found.append(asdict(BatchCost(batch=left[0], problem="the process died, most likely of memory")))
    return found


def answer(folder: Path, ask: dict[str, Any]) -> Iterator[StepCost | BatchCost]:
    """What the process of its own does: build the training step of the plan, and time it."""
    from goodfit.api.assemble import assemble_step, assemble_task, execution
    from goodfit.engine.device import DevicePolicy
    from goodfit.engine.ranks import Ranks
    from goodfit.planning.measure import measure_batches, measure_executions, timed_step

    plan = Plan.from_dict(ask["plan"])
    if plan.device.value == "cpu":
        _limit_memory(ask["memory"])
    with np.load(folder / "batch.npz") as stored:  # arrays of numbers only: allow_pickle is off
        images, targets = stored["images"], stored["targets"]
    task = assemble_task(plan, ask["class_names"], np.array(ask["counts"]))
    steps_per_epoch = max(1, ask["num_train"] // plan.batch.value)

    def group_of(size: int) -> Sequence[MicroBatch]:
        rows = np.arange(size) % len(targets)
        parts = np.array_split(rows, plan.accumulate.value)
        return [MicroBatch(part, task.collate(images[part].transpose(0, 3, 1, 2), targets[part])) for part in parts]

    def build(precision: str, channels_last: bool) -> Any:
        return assemble_step(_executed(plan, precision, channels_last), task, steps_per_epoch, Ranks())[:2]

    with execution(plan):
        held = DevicePolicy(kind=plan.device.value, precision="fp32", channels_last=False).peak_memory()
        if "ways" in ask:
            group = group_of(plan.batch.value)
            state, context = build(plan.precision.value, plan.channels_last.value)
            for _ in range(2):
                second = timed_step(state, context, group)
            del state
            seconds = budget(second * steps_per_epoch * plan.epochs.value)
            yield from measure_executions(build, group, ask["ways"], seconds)
        else:
            state, context = build(plan.precision.value, plan.channels_last.value)
            yield from measure_batches(state, context, group_of, ask["sizes"], ask["memory"], MAX_SECONDS / 2, held)


def _limit_memory(num_bytes: int) -> None:
    """Let this process fail by itself before the machine runs out of memory and ends somebody else's."""
    with contextlib.suppress(ImportError, ValueError, OSError, AttributeError):
        import resource

        import psutil

        held = psutil.Process().memory_info().data  # address space with libraries' own buffers; not resident memory
        resource.setrlimit(resource.RLIMIT_DATA, (held + num_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def budget(projected: float) -> float:
    """Seconds for timing the ways: half of a minute, or of 5 % of the projected run, less what the process takes to start."""
    return max(0.0, min(MAX_SECONDS, RUN_SHARE * projected) / 2 - START_SECONDS)


def main() -> None:
    """Answer `ask.json` of the folder given, one line of JSON per finding."""
    folder = Path(sys.argv[1])
    for cost in answer(folder, read_json(folder / "ask.json")):
        print(json.dumps(asdict(cost)), flush=True)


if __name__ == "__main__":
    main()
