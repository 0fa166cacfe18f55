"""What a run will cost and did cost, and where its time went: the stages `projection` and `time`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from goodfit.api.assemble import FitParts
from goodfit.api.folder import Run
from goodfit.api.prepare import stage
from goodfit.config.plan import Plan
from goodfit.config.sizes import InputSizes
from goodfit.config.time_rules import FORWARD, PASSES
from goodfit.core.errors import OutOfMemory
from goodfit.core.history import bare_rate
from goodfit.core.journal import Journal, read_lines
from goodfit.core.machine import num_cores
from goodfit.core.places import cache_folder, free_bytes
from goodfit.engine.budget import TimeBudget
from goodfit.engine.checkpoint import has_finished
from goodfit.engine.device import is_out_of_memory
from goodfit.outcome.utilisation import Verdict, utilisation
from goodfit.planning.pace import Pace, measure_pace
from goodfit.planning.projection import Projection, check_disk, describe_seconds, measure_outcome, project

OVER = 1.05  # times the time that it was given, from which a run is told to have taken too long


def disk_stage(folder: Path, parts: FitParts, *, resumed: bool = False) -> None:
    """Refuse, before anything is decoded or trained, a run for which the disk is too small.

    Args:
        folder: The run's.
        resumed: It was begun earlier: what it wrote already needs no more room.

    Raises:
        StorageError: less is free than it needs.
    """
    present = folder_bytes(folder / "checkpoints") + folder_bytes(folder / "bundle") if resumed else None
    check_disk(project_run(parts, None), folder, cache_here=parts.cache_is_missing and _same_disk(folder, cache_folder()),
               present=present, trained=resumed and has_finished(folder / "checkpoints"))  # fmt: skip


def project_run(parts: FitParts, pace: Pace | None) -> Projection:
    """The projection of a run from its parts and its measured pace; None if that is unknown.

    Memory is what was taken with all that an epoch does, and the validation pictures that will be kept besides.
    """
    model = parts.state.model
    return project(
        parts.plan, num_val=len(parts.val.rows), steps_per_epoch=parts.train.steps_per_epoch,
        num_parameters=sum(p.numel() for p in model.parameters()), num_buffers=sum(b.numel() for b in model.buffers()),
        pace=pace, cache=parts.cache_bytes,
        memory=None if pace is None else pace.memory + (parts.val.bytes_to_keep if parts.plan.device.value == "cpu" else 0),
    )  # fmt: skip


def projection_stage(run: Run, parts: FitParts, journal: Journal) -> None:
    """Say once, before the first epoch, what the run will cost at most; measured where it was rehearsed."""
    events = run.events
    if any(e["event"] == "stage" and e["name"] == "projection" for e in events):
        return
    pace = None
    if bare_rate(events):
        with stage(journal, "pace") as note:
            pace = _pace(run, parts, bare_rate(events))
            note.text = pace.describe() if pace is not None else "unknown: memory ran out beside the rehearsal's"
            if pace is not None and (sizes := InputSizes.of(parts.plan)).varies:
                note.text += f"; with inputs of {sizes.smallest} to {sizes.largest} pixels, at their mean cost"
            note.fields = None if pace is None else {"pace": pace.to_dict()}
    made = project_run(parts, pace)
    free = free_bytes(run.path)
    text = made.describe(free) + _length_note(parts.plan)
    journal.emit("stage", name="projection", text=text, free=free, projected=made.to_dict())


def _length_note(plan: Plan) -> str:
    """What may make a run longer or shorter than its epochs."""
    if plan.time.value:
        return f"; fitted to {describe_seconds(plan.time.value)} for the whole run"
    if plan.most_epochs.value > plan.epochs.value:
        return f"; extended up to {plan.most_epochs.value:,} epochs while it still improves"
    return ""


def _pace(run: Run, parts: FitParts, rate: float) -> Pace | None:
    """The run's pace; None where its copies found no room: training itself, which needs less, deals with that."""
    train, cost = parts.paced()
    try:
        return measure_pace(parts.state, parts.context, train, parts.val, folder=run.path, bare_rate=rate,
                            compiled=parts.plan.compile.value, cost=cost)  # fmt: skip
    except OutOfMemory:
        return None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def time_budget(run: Run, parts: FitParts, began: float) -> TimeBudget | None:
    """The time that the plan gives a run, with what its earlier processes used and what its end will take; None without one.

    Args:
        began: When this process began with the run, by time.monotonic.
    """
    seconds = parts.plan.time.value
    if not seconds:
        return None
    pace, num_val = _measured_pace(run), len(parts.val.rows)
    validation = num_val * (float(pace.get("validation", 0.0)) or parts.plan.sample_seconds / FORWARD)
    # A process that was killed told in its events how far it had come, also where it left no checkpoint.
    told = max((float(e["spent"]) for e in read_lines(run.path / "events.jsonl") if "spent" in e), default=0.0)
    return TimeBudget(seconds=seconds, used=max(parts.state.progress.seconds, told), reserve=parts.finish_seconds + 2 * float(pace.get("save", 0.0)),
                      served=parts.num_served / max(1, num_val), validation=validation, rest_seconds=validation, began=began)  # fmt: skip


def _measured_pace(run: Run) -> dict[str, Any]:
    """The run's pace as its events have it, the last; empty where none was measured."""
    return next((e["pace"] for e in reversed(run.events) if e["event"] == "stage" and e.get("pace")), {})


def too_little_time(run: Run, parts: FitParts, budget: TimeBudget) -> str:
    """What to say where a time leaves training less than two passes over its samples; "" otherwise, or where nothing was timed."""
    pace = _measured_pace(run)
    step = float(pace["step"] + pace["data"]) if pace else parts.plan.sample_seconds * parts.train.batch
    if not step or parts.state.progress.step:
        return ""
    epoch = parts.train.steps_per_epoch
    steps = max(0, int((budget.left() - budget.rest_seconds) / step))
    if steps >= 2 * epoch:
        return ""
    minutes = math.ceil((budget.spent() + budget.afterwards + PASSES * (epoch * step + budget.rest_seconds)) / 60)
    return (f"Of {describe_seconds(budget.seconds)} training has {describe_seconds(max(0.0, budget.left()))}, about {steps} steps, where one pass over its "
            f"samples takes {epoch}; time={minutes}m would hold {PASSES}")  # fmt: skip


def over_time(budget: TimeBudget | None) -> str:
    """What to say of a run that took clearly longer than it was given; "" otherwise."""
    if budget is None or budget.spent() <= OVER * budget.seconds:
        return ""
    return (
        f"The run took {describe_seconds(budget.spent())} of the {describe_seconds(budget.seconds)} that it was given"
    )


def time_stage(run: Run, parts: FitParts, journal: Journal) -> None:
    """Say after training where its time went."""
    journal.emit("stage", name="time", text=judge_time(run, parts).describe())


def judge_time(run: Run, parts: FitParts) -> Verdict:
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
    return {"projected": made[-1] if made else None, "achieved": measure_outcome(epochs, folder_bytes(run.path))}


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if there is none."""
    # os.walk does not enter links: `checkpoints/best` and `last` are counted where they point.
    return sum(os.lstat(os.path.join(top, name)).st_size for top, _, names in os.walk(folder) for name in names)


def _same_disk(one: Path, other: Path) -> bool:
    while not other.exists() and other != other.parent:
        other = other.parent
    return os.stat(one).st_dev == os.stat(other).st_dev
