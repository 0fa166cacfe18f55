"""`extend`: go on with a finished run for more epochs, in a new segment from the state before its rate fell."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from goodfit.api.assemble import ImageParts, execution
from goodfit.api.folder import PLAN, Run, open_run
from goodfit.api.train import recorded, reopen, resume
from goodfit.config.plan import Decision
from goodfit.config.recipe import SWA_EPOCHS
from goodfit.core.errors import RequestError, StorageError
from goodfit.core.journal import Journal
from goodfit.core.lock import run_lock
from goodfit.core.safeio import storage_errors, write_json
from goodfit.engine.checkpoint import Checkpoints, Snapshot, restore, take_snapshot
from goodfit.engine.policy import COOL_DOWN, EXTENSION, lengthened
from goodfit.engine.schedule import CYCLIC, Schedule
from goodfit.watch.terminal import Terminal

OUTCOME = ("result.json", "test.json", "report.html", "bundle")  # of a segment, kept in segments/N/
WARMUP_EPOCHS = 1  # where the rate had fallen already


def extend(run: str | Path, *, epochs: int) -> Run:
    """Train a finished run for more epochs, then test, bundle and report it anew.

    A new segment starts from the state pinned before the decay, with its optimizer state and rate, and decays at its own
    end. A run whose schedule has no stable rate goes on from its end instead, with a warm-up. What is kept is the best
    state of all segments, so the result is never worse on the validation split; the test is one more look, and counted.
    The earlier plan, result, report and bundle are kept in `segments/N/`.

    Args:
        run: Its folder.
        epochs: In all, counted from the start of the run.

    Raises:
        RequestError: the folder is not a run, or has as many epochs already.
        StorageError: the run has not finished, is held by another process, or a checkpoint is missing.
    """
    opened = open_run(run)
    journal = Journal(None, (Terminal(),))
    with run_lock(opened.path), recorded(journal, opened.path):
        if not (opened.path / "result.json").is_file():
            raise StorageError(
                "This run has not finished.", where=str(run), kept="the run", next=f"goodfit resume {run}"
            )
        with execution(opened.plan):
            _open_segment(opened, reopen(opened, journal), journal, epochs)
    return resume(opened.path)


def _open_segment(run: Run, parts: ImageParts, journal: Journal, epochs: int) -> None:
    """Write the first checkpoint of the new segment, then the plan, and set the outcome of the last one aside.

    In this order: a kill on the way leaves a run that counts as finished, for which the same command does the rest, or one
    that `resume` goes on with.
    """
    checkpoints = Checkpoints(run.path / "checkpoints", parts.hashes)
    last = checkpoints.latest()
    assert last is not None  # it has finished
    planned = last.progress["schedule"]["total_steps"] / parts.train.steps_per_epoch
    if not last.progress["finished"] and epochs != planned:  # cut off before the outcome was set aside
        raise RequestError(f"epochs={epochs}: an extension to {planned:g} was begun.", where=str(run.path), kept="the run",
                           next=f"goodfit extend {run.path} epochs={planned:g}, then once more")  # fmt: skip
    if last.progress["finished"]:
        if epochs <= planned:
            raise RequestError(f"epochs={epochs}: the run has {planned:g} already.", where=str(run.path), kept="the run",
                               next=f"goodfit extend {run.path} epochs={round(2 * planned)}")  # fmt: skip
        text = _branch(checkpoints, last, parts, epochs)
    else:
        restore(parts.state, last)
        text = "from the state before the rate fell, as it was begun"
    progress = parts.state.progress
    aside = run.path / "segments" / str(progress.segment - 1)
    with storage_errors(aside):
        aside.mkdir(parents=True, exist_ok=True)
        if not (aside / PLAN).exists():
            write_json(aside / PLAN, parts.plan.to_dict())
    reason = f"extended to {epochs}"
    plan = replace(parts.plan, epochs=Decision(epochs, reason, "asked"), most_epochs=Decision(epochs, reason, "asked"),
                   time=Decision(0.0, "spent; extended by epochs", "rule"),
                   progressive=Decision(1.0, "grown to imgsz before", "rule"))  # fmt: skip
    write_json(run.path / PLAN, plan.to_dict())
    journal.segment, journal.step = progress.segment, progress.step
    journal.emit("segment", parent=progress.parent, branch=EXTENSION, reason=text, epochs=epochs)
    _set_aside(run.path, aside)


def _branch(checkpoints: Checkpoints, last: Snapshot, parts: ImageParts, epochs: int) -> str:
    """Put the state that the new segment starts from into the parts, and onto the disk. Returns where that is from."""
    start, schedule, text = _start(checkpoints, last, parts, epochs)
    restore(parts.state, start)
    progress, before = parts.state.progress, last.progress
    place = {"segment": start.progress["segment"], "step": start.progress["step"]}
    progress.parent, progress.branches = place, [*before["branches"], place]
    progress.segment, progress.branch, progress.schedule = before["segment"] + 1, EXTENSION, schedule
    progress.best, progress.skipped = before["best"], before["skipped"]
    progress.bad_epochs, progress.finished, progress.ended, progress.seconds = 0, False, "", 0.0
    progress.num_averaged = 0
    progress.without_patience = True  # from the same state it would be spent on the same epochs again
    if schedule.begin:  # the rate had fallen: what it rises to again cannot be compared with what it had fallen to
        progress.reference, progress.counted, progress.losses = None, None, []
    checkpoints.save(take_snapshot(parts.state))
    return text


def _start(checkpoints: Checkpoints, last: Snapshot, parts: ImageParts, epochs: int) -> tuple[Snapshot, Schedule, str]:
    """The state to go on from, the schedule from there, and why."""
    progress, plan = last.progress, parts.plan
    total = epochs * parts.train.steps_per_epoch
    place: dict[str, Any] | None = progress["parent"] if progress["branch"] == COOL_DOWN else None
    place = place or checkpoints.newest_pinned(progress["segment"])
    if plan.schedule.value == "wsd" and place is not None:
        start = checkpoints.load_state(place)
        schedule = lengthened(Schedule(**start.progress["schedule"]), total)
        if schedule.stable_until > start.progress["step"]:
            return start, schedule, "from the state before the rate fell, with its optimizer state and rate"
        where = start.progress["step"]
        return (
            start,
            schedule.cool_down(where, total - where),
            "from the state before the rate fell, which falls at once",
        )
    step = int(progress["step"])
    warm = min(step + WARMUP_EPOCHS * parts.train.steps_per_epoch, total)
    falls = max(warm, total - round(plan.decay.value * total))
    closing = total - round(plan.close_augment.value * total) if plan.close_augment.value else -1
    again = Schedule(kind="wsd", begin=step, warmup_steps=warm, stable_until=falls, total_steps=total, closing_from=closing,
                     lrf=0.0 if plan.schedule.value in CYCLIC else plan.lrf.value)  # fmt: skip
    averaged = min(round(plan.swa.value * epochs) * parts.train.steps_per_epoch, total - warm)
    if averaged >= SWA_EPOCHS * parts.train.steps_per_epoch:  # after the warm-up, whose rate is none to hold
        again = again.averaging(averaged)
    return last, again, "the rate had fallen: from the end, with a warm-up of an epoch, then stable, then its decay"


def _set_aside(folder: Path, aside: Path) -> None:
    """Keep the outcome of a segment; the result goes last, since with it a run counts as finished."""
    with storage_errors(aside):
        for name in reversed(OUTCOME):
            if (folder / name).exists() and not (aside / name).exists():
                os.replace(folder / name, aside / name)
