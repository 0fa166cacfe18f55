"""What a run will cost and did cost, and where its time went: the stages `projection` and `time`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from goodfit.api.assemble import Parts
from goodfit.api.folder import Run
from goodfit.core.history import bare_rate
from goodfit.core.journal import Journal
from goodfit.core.machine import num_cores
from goodfit.core.places import cache_folder, free_bytes
from goodfit.outcome.utilisation import Verdict, utilisation
from goodfit.planning.projection import Projection, check_disk, measure_outcome, project


def disk_stage(folder: Path, parts: Parts) -> None:
    """Refuse, before anything is decoded or trained, a run for which the disk is too small.

    Raises:
        StorageError: less is free than it needs.
    """
    to_write = parts.plan.cache.value == "disk" and parts.store.num_bytes > 0 and not parts.store.path.is_file()
    check_disk(project_run(parts, 0.0), folder, cache_here=to_write and _same_disk(folder, cache_folder()))


def project_run(parts: Parts, rate: float) -> Projection:
    """The projection of a run from its parts and the bare step's samples per second; 0 if that is unknown.

    Once the rehearsal gave that rate, the memory is its peak: it took the run's own steps, with its pictures in place.
    """
    model = parts.state.model
    return project(
        parts.plan, num_val=len(parts.val.rows), steps_per_epoch=parts.train.steps_per_epoch,
        num_parameters=sum(p.numel() for p in model.parameters()), num_buffers=sum(b.numel() for b in model.buffers()),
        bare_rate=rate, cache=parts.store.num_bytes,
        memory=parts.context.device.peak_memory() if rate else None,
    )  # fmt: skip


def projection_stage(run: Run, parts: Parts, journal: Journal) -> None:
    """Say once, before the first epoch, what the run will cost at most."""
    events = run.events
    if any(e["event"] == "stage" and e["name"] == "projection" for e in events):
        return
    made = project_run(parts, bare_rate(events))
    free = free_bytes(run.path)
    journal.emit("stage", name="projection", text=made.describe(free), free=free, projected=made.to_dict())


def time_stage(run: Run, parts: Parts, journal: Journal) -> None:
    """Say after training where its time went."""
    journal.emit("stage", name="time", text=judge_time(run, parts).describe())


def judge_time(run: Run, parts: Parts) -> Verdict:
    """The verdict on a run's time, from its events."""
    events = run.events
    epochs = [e for e in events if e["event"] == "epoch"]
    after = events[events.index(epochs[-1]) :] if epochs else []
    last_save = sum(float(e["saving_seconds"]) for e in after if e["event"] == "checkpoint")
    return utilisation(epochs, bare_rate(events), parts.plan, num_cores=num_cores(), last_save=last_save)


def compare_projection(run: Run) -> dict[str, Any]:
    """What was projected and what the run took, by the same names; `projected` is None if nothing was."""
    events = run.events
    made = [e["projected"] for e in events if e["event"] == "stage" and e["name"] == "projection"]
    epochs = [e for e in events if e["event"] == "epoch"]
    # os.walk does not enter links: `checkpoints/best` and `last` are counted where they point.
    size = sum(os.lstat(os.path.join(top, name)).st_size for top, _, names in os.walk(run.path) for name in names)
    return {"projected": made[-1] if made else None, "achieved": measure_outcome(epochs, size)}


def _same_disk(one: Path, other: Path) -> bool:
    while not other.exists() and other != other.parent:
        other = other.parent
    return os.stat(one).st_dev == os.stat(other).st_dev
