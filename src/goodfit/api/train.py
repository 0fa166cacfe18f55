"""`train`, `resume` and their shorter siblings `audit`, `plan` and `test`."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from goodfit.api.assemble import FitParts, ImageParts, execution
from goodfit.api.decide import decide
from goodfit.api.finish import load_best
from goodfit.api.folder import (
    AUDIT,
    OBJECTS,
    PLAN,
    SPLIT,
    Run,
    check_name,
    create_folder,
    data_name,
    open_run,
    save_request,
)
from goodfit.api.inspect import page_stage, suspect_stage
from goodfit.api.kinds import finish_run, kind_of
from goodfit.api.prepare import base_plan, progress_of, read_and_audit, stage
from goodfit.api.transfer import transfer_stage
from goodfit.api.verdict import disk_stage, projection_stage, time_budget, time_stage, too_little_time
from goodfit.config.parse import read_request
from goodfit.config.plan import Decision, Plan
from goodfit.config.request import TrainRequest, options
from goodfit.core.errors import DataError, GoodfitError, RequestError, Stopped, StorageError
from goodfit.core.journal import Event, Journal, read_events, read_lines
from goodfit.core.lock import run_lock
from goodfit.core.safeio import read_json, remove_temporaries, write_bytes, write_json, write_text
from goodfit.data.index import read_split, write_split
from goodfit.data.objects_file import with_objects, write_objects
from goodfit.engine.checkpoint import Checkpoints, has_finished, restore, versions
from goodfit.engine.device import find_machine
from goodfit.engine.loop import fit
from goodfit.engine.policy import FitSettings
from goodfit.engine.state import Progress
from goodfit.engine.stop import StopFlag
from goodfit.planning.rehearsal import RehearsalError
from goodfit.watch.metrics_file import MetricsFile
from goodfit.watch.terminal import Terminal


def train(data: str | Path | None = None, **asked: Any) -> Run:
    """Take a dataset through the whole workflow: audit, split, plan, rehearse, train, test once, export, report.

    Args:
        data: A folder of images by class or with annotations, or a CSV list.
        **asked: Any option of `goodfit train`, by the same names; what is not asked is decided, with a reason.

    Returns:
        The finished run: `metrics`, `plan`, `findings`, `predict`, `path`.

    Raises:
        GoodfitError: see goodfit.core.errors; a run that was stopped can be resumed.
    """
    began = time.monotonic()
    request = read_request({"data": data, **asked} if data is not None else asked)
    check_name(request)
    base = base_plan(request)
    journal = Journal(None, (Terminal(),))
    audited = read_and_audit(request, journal, base)
    plan = decide(request, audited, journal, base)
    audited, suspects = suspect_stage(request, audited, journal, plan)
    folder = create_folder(request, data_name(request.data))
    with run_lock(folder), recorded(journal, folder):
        save_request(folder, request)
        write_json(folder / AUDIT, audited.to_dict())
        write_text(folder / SPLIT, write_split(audited.index))
        if audited.index.objects is not None:
            write_bytes(folder / OBJECTS, write_objects(audited.index))
        write_json(folder / "run.json", {"root": str(audited.index.root.resolve())})
        write_json(folder / PLAN, plan.to_dict())
        journal.emit("run", path=str(folder))
        page_stage(request, folder, folder.name, audited, suspects, journal)
        with execution(plan):
            kind = kind_of(plan)
            parts = kind.assemble(plan, audited.index)
            transfer_stage(parts, journal)
            disk_stage(folder, parts)
            cache_stage(parts, journal)
            kind.pictures(Run(folder), parts, journal)
            if plan.rehearse.value:
                kind.rehearse(parts, journal, folder)
            with training(Run(folder), parts, journal, began) as (settings, checkpoints, stop):
                fit(parts.state, parts.context, parts.train, parts.val, settings=settings,
                    checkpoints=checkpoints, journal=journal, stop=stop)  # fmt: skip
            return finish_run(Run(folder), parts, checkpoints, journal, settings.time)


@contextmanager
def training(
    run: Run, parts: FitParts, journal: Journal, began: float
) -> Iterator[tuple[FitSettings, Checkpoints, StopFlag]]:
    """Around `fit`: the newest checkpoint is put into the state, the cost is projected, metrics.csv is kept,
    signals become a flag; after it, where the time went.

    Args:
        began: When this process began with the run, by time.monotonic.
    """
    remove_temporaries(run.path)  # of a pace or a bundle that a kill left half-made
    checkpoints = Checkpoints(run.path / "checkpoints", parts.hashes)
    continue_from(parts, checkpoints, journal, run.path / "events.jsonl")
    journal.listen(MetricsFile(run.path))
    projection_stage(run, parts, journal)
    with stage(journal, "train") as note:
        budget = time_budget(run, parts, began)
        if budget is not None and (text := too_little_time(run, parts, budget)):
            journal.emit("warning", text=text)
        with StopFlag() as stop:
            yield replace(parts.settings, time=budget), checkpoints, stop
        progress = parts.state.progress
        best = progress.best or {}
        note.text = f"ended by its {progress.ended} after {progress.step} steps; best epoch {best.get('epoch', 0) + 1}"
    time_stage(run, parts, journal)


def cache_stage(parts: ImageParts, journal: Journal) -> None:
    """Stage `cache`: decode the training pictures once, where the plan keeps them."""
    with stage(journal, "cache") as note, progress_of(journal, "cache") as progress:
        note.text = parts.store.warm(parts.plan.threads.value, progress)


def continue_from(parts: FitParts, checkpoints: Checkpoints, journal: Journal, events: Path) -> None:
    """Put the newest valid checkpoint into the state, if there is one, and say so."""
    snapshot = checkpoints.latest()
    for damaged in checkpoints.damaged:
        journal.emit("stage", name="resume", text=f"passed over a damaged checkpoint: {damaged}")
    if snapshot is None:
        if any(e["event"] in ("step", "epoch") for e in read_lines(events)):  # killed before its first checkpoint
            journal.emit("run", resumed_from={"segment": 0, "step": 0})
        return
    restore(parts.state, snapshot)
    progress = parts.state.progress
    journal.segment, journal.step = progress.segment, progress.step
    journal.emit("run", resumed_from={"segment": progress.segment, "step": progress.step})
    for text in _forget_damaged(progress, checkpoints, _place_of(progress, read_events(events), parts.settings)):
        journal.emit("stage", name="resume", text=text)
    gone = f"; removed an incomplete attempt: {', '.join(checkpoints.removed)}" if checkpoints.removed else ""
    now = versions()
    other = [f"{name} {was}, now {now[name]}" for name, was in snapshot.versions.items() if now.get(name, was) != was]
    differs = (
        f"; not bit for bit as it would have been, as the state was written with {'; '.join(other)}" if other else ""
    )
    journal.emit("stage", name="resume", text=f"from step {progress.step}, epoch {progress.epoch + 1}{gone}{differs}")


def _forget_damaged(progress: Progress, checkpoints: Checkpoints, newest: dict[str, Any] | None) -> list[str]:
    """Put the newest state in the place of a best state, or of one to cool down from, that is damaged on disk: the run could never be
    finished with it. Where the newest was not validated, there is none until the next validation. Returns what to say of it."""
    said = []
    for name, what in (("best", "the best state"), ("reference", "the state to cool down from")):
        place = getattr(progress, name)
        if place is None:
            continue
        if problem := checkpoints.problem_of(place):
            setattr(progress, name, newest)
            instead = "the newest takes its place" if newest else "the next validation finds another"
            said.append(f"{what}, of step {place['step']}, is damaged ({problem}): {instead}")
    if progress.best is None:
        progress.finished = False  # with no step left: it is validated once more
    return said


def _place_of(progress: Progress, events: Sequence[Event], settings: FitSettings) -> dict[str, Any] | None:
    """The state at this progress with the figures of its validation, as `best` has them; None where it was not validated."""
    for event in reversed(events):
        if (
            event["event"] == "epoch"
            and (event["segment"], event["step"]) == (progress.segment, progress.step)
            and not progress.position
        ):
            val = {name: float(figure) for name, figure in event["val"].items()}
            if not (math.isfinite(val[settings.monitor]) and math.isfinite(val["loss"])):
                return None
            return {"segment": progress.segment, "step": progress.step, "epoch": event["epoch"], "value": val[settings.monitor],
                    "loss": val["loss"], "metrics": {name: figure for name, figure in val.items() if math.isfinite(figure)}}  # fmt: skip
    return None


def resume(run: str | Path, *, workers: int | None = None, latency: str | float | None = None) -> Run:
    """Go on with a run that was stopped, exactly as if it had not been; a finished run is returned unchanged.

    Args:
        run: Its folder.
        workers: Other number of loader processes; the result is the same with any.
        latency: Another limit for the bundle, as "20ms", where it was over the one of the plan.

    Raises:
        RequestError: the folder is not a run.
        DataError: files of the dataset changed since the run began.
        StorageError: the run is held by another process, its records are damaged, or the disk is too small for the rest.
    """
    began = time.monotonic()
    opened = open_run(run)
    if (opened.path / "result.json").is_file():
        return opened
    journal = Journal(None, (Terminal(),))
    with run_lock(opened.path), recorded(journal, opened.path):
        parts = reopen(opened, journal, workers=workers)
        if latency is not None:
            limit = read_request({"latency": latency}, allowed=("latency",)).latency or 0.0
            decision = Decision(limit, "asked for when the run was resumed", "asked")
            parts = replace(parts, plan=replace(parts.plan, latency=decision))
        disk_stage(opened.path, parts, resumed=True)
        with execution(parts.plan):
            if not has_finished(opened.path / "checkpoints"):  # nothing after training reads it
                cache_stage(parts, journal)
            rehearsed = any(e["event"] == "stage" and e["name"] == "rehearse" for e in opened.events)
            if parts.plan.rehearse.value and not rehearsed:
                kind_of(parts.plan).rehearse(parts, journal, opened.path)
            with training(opened, parts, journal, began) as (settings, checkpoints, stop):
                fit(parts.state, parts.context, parts.train, parts.val, settings=settings,
                    checkpoints=checkpoints, journal=journal, stop=stop)  # fmt: skip
            return finish_run(opened, parts, checkpoints, journal, settings.time)


def reopen(run: Run, journal: Journal, *, workers: int | None = None) -> ImageParts:
    """Build a run's parts from its folder; raises DataError if its files changed."""
    from goodfit.data.checks.audit import changed_files

    plan = run.plan
    if plan.task.value == "module":
        raise RequestError("This run trains a module that was handed over in Python; its folder alone cannot build it again.",
                           where=str(run.path), kept="the run and its checkpoints",
                           next=f"goodfit.fit(module, train, val, ..., resume={str(run.path)!r}), as it was called at first")  # fmt: skip
    try:
        find_machine(plan.device.value)
    except RequestError as error:
        raise RequestError(f"This run was planned for {plan.device.value}, which is not to be had here: {error.message}", where=str(run.path),
                           kept="the run and its checkpoints", next="resume it where there is one") from error  # fmt: skip
    index = read_split(run.path / SPLIT, Path(read_json(run.path / "run.json")["root"]))
    if (run.path / OBJECTS).is_file():
        index = with_objects(index, run.path / OBJECTS)
    with stage(journal, "data") as note:
        changed = changed_files(index)
        if changed:
            raise DataError(f"{len(changed)} files changed since the run began (first: {changed[0]}).",
                            where=str(index.root), kept="the run and its checkpoints",
                            next="put the files back, or start a new run")  # fmt: skip
        note.text = f"{len(index):,} files unchanged"
    with execution(plan):
        return kind_of(plan).assemble(plan, index, workers=workers)


def test(run: str | Path) -> dict[str, Any]:
    """Test a finished run's best weights once more on its sealed split: one more look, and it is counted.

    Returns:
        The result of the run, as json=true prints it, with the new look's figures.
    """
    opened = open_run(run)
    journal = Journal(None, (Terminal(),))
    with run_lock(opened.path), recorded(journal, opened.path):
        if not (opened.path / "result.json").is_file():  # before a look at the test split is counted
            raise StorageError(
                "This run has not finished: it has no result yet.", where=str(run), next=f"goodfit resume {run}"
            )
        parts = reopen(opened, journal)
        checkpoints = Checkpoints(opened.path / "checkpoints", parts.hashes)
        snapshot = checkpoints.latest()
        if snapshot is None or not snapshot.progress["finished"]:
            raise StorageError("This run has not finished training.", where=str(run), next=f"goodfit resume {run}")
        with execution(parts.plan):
            restore(parts.state, snapshot)
            bundle, best = opened.bundle / "model.safetensors", parts.state.progress.best
            if not bundle.is_file():  # before a look is counted
                raise StorageError("This run has no bundle yet.", where=str(run), next=f"goodfit resume {run}")
            if best is None or checkpoints.problem_of(best):  # the bundle's weights are the same
                parts.state.model.load_state_dict(load_file(str(bundle)))
            else:
                load_best(parts, checkpoints)
            found = kind_of(parts.plan).test(opened, parts, journal)
            return kind_of(parts.plan).write_result(opened, parts, checkpoints, found)


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan that was made and not run, with the audit that it stands on."""

    plan: Plan
    audit: dict[str, Any]


def audit(data: str | Path | None = None, **asked: Any) -> dict[str, Any]:
    """Read, audit and split a dataset, and stop there.

    Writes `audit.json` and the page `audit.html` into a new folder of `project`. With `pretrained=`, likely wrong labels
    are judged by the features of that network; otherwise by simpler ones.

    Returns:
        The content of audit.json, with the page's path as `page`.
    """
    allowed = [name for name, option in options().items() if option.group == "Data"]
    allowed += ["data", "plan", "project", "name", "exist_ok", "model", "pretrained", "imgsz", "device", "threads"]
    request = read_request({"data": data, **asked} if data is not None else asked, allowed=allowed)
    check_name(request)
    journal, base = Journal(None, (Terminal(),)), base_plan(request)
    audited = read_and_audit(request, journal, base)
    plan = None
    if (request.pretrained or "false") != "false" and audited.index.task == "classify":
        plan = decide(request, audited, Journal(None, ()), base, measuring=False)
    audited, suspects = suspect_stage(request, audited, journal, plan)
    name = data_name(request.data)
    folder = create_folder(request, f"{name}-audit")
    page = page_stage(request, folder, name, audited, suspects, journal)
    found = audited.to_dict()
    write_json(folder / AUDIT, found)
    write_text(folder / SPLIT, write_split(audited.index))
    return {**found, "page": str(page)}


def plan(data: str | Path | None = None, **asked: Any) -> Planned:
    """As `train`, but stops after the plan; nothing is written."""
    request: TrainRequest = read_request({"data": data, **asked} if data is not None else asked)
    base = base_plan(request)
    journal = Journal(None, (Terminal(),) if request.batch_study else ())  # minutes: said before they are spent
    audited = read_and_audit(request, journal, base)
    return Planned(decide(request, audited, journal, base), audited.to_dict())


@contextmanager
def recorded(journal: Journal, folder: Path, *, resume: str = "goodfit resume RUN") -> Iterator[None]:
    """Write the journal into a run's folder, and the reason if the run ends early.

    Args:
        resume: How this run is gone on with, in place of the command.
    """
    journal.open(folder / "events.jsonl")
    try:
        yield
    except GoodfitError as error:
        error.next = re.sub(r"\bRUN\b", lambda _: str(folder), error.next.replace("goodfit resume RUN", resume))
        if not error.where and isinstance(error, Stopped):
            error.where = str(folder)
        checks = [c.to_dict() for c in error.checks] if isinstance(error, RehearsalError) else []
        with suppress(StorageError):  # a full disk, of which the error itself tells
            journal.emit("failed", **error.describe(), **({"checks": checks} if checks else {}))
        raise
    except BaseException as error:
        with suppress(StorageError):
            journal.emit("failed", status="failed", error=f"{type(error).__name__}: {error}")
        raise
    finally:
        journal.close()
