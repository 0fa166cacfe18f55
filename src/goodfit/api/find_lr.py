"""`lr=find`: the learning-rate range test of a plan, in a process of its own (api/probe_child.py), remembered per machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from goodfit.api.assemble import NOT_COMPUTED
from goodfit.api.probe import ProbeProcess
from goodfit.config.facts import MachineFacts
from goodfit.config.lr_range import LrCurve, LrRange, judge
from goodfit.config.measured import MEMORY_SHARE
from goodfit.config.plan import Plan
from goodfit.config.request import TrainRequest
from goodfit.core.errors import StorageError
from goodfit.core.places import cache_folder
from goodfit.core.safeio import read_json, write_json, write_text
from goodfit.data.index import DatasetIndex, data_hash, write_split

RANGE_FORMAT = "lr-range-1"
RANGE_SECONDS = 600.0  # after which a range test is given up: its forty steps must come, however slow they are
# Decisions that a range test does not feel.
LATER = ("epochs", "schedule", "warmup", "decay", "milestones", "period", "gamma", "lrf", "close_augment", "ema", "swa",
         "patience", "min_delta", "monitor", "rehearse", "format", "max_bad")  # fmt: skip


def find_lr(request: TrainRequest, plan: Plan, index: DatasetIndex, machine: MachineFacts) -> LrRange:
    """Take the learning-rate range test of a plan, or remember it: a rate to suggest, or why there is none.

    It was asked for, so `measure=false` does not forbid it; `measure=true` takes it anew.
    """
    plan = plan.thawed()
    kept = cache_folder() / RANGE_FORMAT / f"{_range_key(plan, index, machine)}.json"
    curve = LrCurve(problem=f"its process died, or took more than {RANGE_SECONDS:.0f} s")
    if kept.is_file() and request.measure is not True:  # measure=true measures anew
        with contextlib.suppress(KeyError, TypeError, ValueError, StorageError):  # damaged: measured again
            return judge(LrCurve.from_dict(read_json(kept)), plan.lr.value)
    ask = {"what": "lr", "plan": plan.to_dict(), "root": str(index.root.resolve()),
           "memory": int((request.memory or MEMORY_SHARE) * machine.free_memory)}  # fmt: skip
    with tempfile.TemporaryDirectory() as made, ProbeProcess(Path(made)) as probe:
        write_text(Path(made) / "split.csv", write_split(index))
        for found in probe.ask(ask, RANGE_SECONDS):
            curve = LrCurve.from_dict(found)
            with contextlib.suppress(OSError, StorageError):
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_json(kept, asdict(curve))
    return judge(curve, plan.lr.value)


def _range_key(plan: Plan, index: DatasetIndex, machine: MachineFacts) -> str:
    """What a range test depends on: data, split, all that a step computes, the machine and the versions."""
    parts = {name: d.value for name, d in plan.decisions().items() if name not in (*NOT_COMPUTED, *LATER)}
    weights = Path(plan.weights.value)
    stamp = [weights.stat().st_size, weights.stat().st_mtime_ns] if weights.is_file() else []
    text = json.dumps([parts, stamp, data_hash(index, "train"), machine.device_name, machine.num_cores,
                       [metadata.version(name) for name in ("torch", "timm")]], sort_keys=True)  # fmt: skip
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
