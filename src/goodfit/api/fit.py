"""`fit`: any module of a user's, any data, with the plan, engine, checkpoints, events and report of an image run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from goodfit.api.assemble import execution
from goodfit.api.folder import AUDIT, PLAN, RUN_FACTS, Run, check_name, create_folder, open_run, save_request
from goodfit.api.module_finish import finish_module, load_finished
from goodfit.api.module_parts import (
    ModuleParts,
    Splits,
    assemble_module,
    check_module,
    decide_module,
    describe_module,
    read_splits,
)
from goodfit.api.prepare import base_plan, stage
from goodfit.api.rehearse import LOADING_SECONDS, NUM_BATCHES, write_checks
from goodfit.api.train import recorded, training
from goodfit.api.verdict import disk_stage
from goodfit.config.module import read_module_request
from goodfit.config.plan import Plan
from goodfit.core.errors import RequestError
from goodfit.core.journal import Journal
from goodfit.core.lock import run_lock
from goodfit.core.safeio import read_json, write_json
from goodfit.data.loader import MicroBatch
from goodfit.data.samples import Collate, random_state_kept
from goodfit.engine import loop
from goodfit.engine.checkpoint import take_snapshot
from goodfit.engine.device import is_out_of_memory
from goodfit.planning.module_rehearsal import rehearse_module
from goodfit.planning.rehearsal import Rehearsal, RehearsalError
from goodfit.tasks.module import ModuleTask
from goodfit.watch.terminal import Terminal

RESUME = "goodfit.fit(module, train, val, ..., resume='RUN'), as it was called at first"


def fit(
    module: nn.Module, train: Any = None, val: Any = None, test: Any = None, *, loss: Callable[..., Any] | None = None,
    step_loss: Callable[..., Any] | None = None, metrics: Mapping[str, Any] | Sequence[str] = (),
    collate: Collate | None = None, resume: str | Path | None = None, **asked: Any,
) -> Run:  # fmt: skip
    """Train a module: plan, rehearse, train with early stopping, load the best weights into it, test once, report.

    Data is nested tuples and dicts of tensors with a row per sample, or an object with `__len__` and `__getitem__` (a list
    of samples, a torch Dataset), which is called with the random state of Python, NumPy and torch seeded for each sample;
    a short iterable is read into memory. With `loss`, a sample is a pair (inputs, target): inputs that are a dict go into
    the module as keyword arguments, a tuple as positional ones, anything else as the only one.

    A copy of the module is trained. When all is done, the best weights are loaded into the module itself, which is then in
    evaluation mode; whatever ends a run before, leaves it as it was.

    Accumulation (`accumulate=`) is exact for the losses of torch.nn and torch.nn.functional, and for every mean over
    samples; a function that gives another mean (over pairs, over kept tokens) is exact only by `step_loss` with its counts.
    What the module draws from other generators than torch's, or keeps outside its parameters and buffers, is not resumed.

    Args:
        module: Its weights are where training starts. Parameters without requires_grad stay as they are.
        train, val: The samples to learn from, and those that say when to stop and which state is best.
        test: Samples that are looked at once, at the end.
        loss: A loss of torch.nn or torch.nn.functional with its mean, or a function (output, target) that returns a mean.
        step_loss: In place of `loss`, for everything else: a function (module, batch) that returns a mean over the samples,
            or {name: (sum, count)}.
        metrics: Names of "accuracy", "mae" and "mse", or {name: function(output, target)} that returns a value per sample, or
            a mean over samples; with `step_loss`, {name: function(module, batch)}.
        collate: Makes a batch of a list of samples, to pad them, say; by default they are stacked.
        resume: The folder of a run that was stopped: it goes on exactly as if it had not been. All else is given as at
            first; of options only `workers` and `prefetch` may change.
        **asked: Options of `goodfit train` that make sense for a module, by the same names; what is not asked is decided, with
            a reason. `monitor` is "loss" or any metric: those that end in loss, error, mae, mse or rmse are better
            when smaller, others when larger, unless "-name" or "+name" says so.

    Returns:
        The finished run: `metrics`, `plan`, `events`, `path`; the weights are in `model.safetensors` of its folder.

    Raises:
        GoodfitError: see goodfit.core.errors; a run that was stopped can be resumed.
    """
    began = time.monotonic()
    request = read_module_request(asked)
    check_module(module)
    task = ModuleTask(loss=loss, step_loss=step_loss, metrics=metrics, collate=collate)
    journal = Journal(None, (Terminal(unit="samples"),))
    with random_state_kept(), torch.random.fork_rng():
        if resume is not None:
            return _resume(open_run(resume), module, task, (train, val, test, collate), journal, asked, began)
        check_name(request)
        base = base_plan(request)
        splits = read_splits(module, train, val, test, collate, journal)
        facts = _facts(module, task, splits)
        plan = decide_module(request, module, task, splits, facts["data"], journal, base)
        folder = create_folder(request, type(module).__name__.lower())
        with run_lock(folder), recorded(journal, folder, resume=RESUME):
            save_request(folder, request)
            _save_facts(folder, plan, facts)
            journal.emit("run", path=str(folder))
            return _train(Run(folder), module, plan, task, splits, facts, journal, began)


def _train(
    run: Run, module: nn.Module, plan: Plan, task: ModuleTask, splits: Splits, facts: dict[str, Any], journal: Journal,
    began: float, *, resumed: bool = False,
) -> Run:  # fmt: skip
    """From a plan to a finished run, from whatever checkpoint there is."""
    with execution(plan):
        parts = assemble_module(plan, module, task, splits, facts["data"])
        disk_stage(run.path, parts, resumed=resumed)
        rehearsed = any(e["event"] == "stage" and e["name"] == "rehearse" for e in run.events)
        if plan.rehearse.value and not rehearsed:
            _rehearsal_stage(parts, journal, run.path)
        with training(run, parts, journal, began) as (settings, checkpoints, stop):
            if checkpoints.latest() is None:
                checkpoints.save(take_snapshot(parts.state))  # the weights as they were handed over
            loop.fit(parts.state, parts.context, parts.train, parts.val, settings=settings,
                     checkpoints=checkpoints, journal=journal, stop=stop)  # fmt: skip
        return finish_module(run, module, parts, checkpoints, journal)


def _facts(module: nn.Module, task: ModuleTask, splits: Splits) -> dict[str, Any]:
    """What a resumed run must agree in, as run.json holds it."""
    return {"module": {"class": type(module).__name__, "state": describe_module(module)}, "data": splits.digests(),
            "loss": task.loss_name, "metrics": list(task.metrics)}  # fmt: skip


def _save_facts(folder: Path, plan: Plan, facts: Mapping[str, Any]) -> None:
    write_json(folder / AUDIT, {"data": {"task": "module", "splits": facts["data"]}, "findings": []})
    write_json(folder / RUN_FACTS, facts)
    write_json(folder / PLAN, plan.to_dict())


def _resume(
    run: Run, module: nn.Module, task: ModuleTask, given: tuple[Any, Any, Any, Collate | None], journal: Journal,
    asked: Mapping[str, Any], began: float,
) -> Run:  # fmt: skip
    """Go on with a run; a finished one only gives its weights to the module."""
    plan = run.plan
    if plan.task.value != "module":
        raise RequestError("This is not a run of goodfit.fit.", where=str(run.path), next=f"goodfit resume {run.path}")
    request = read_module_request(asked)
    free = {name: value for name in ("workers", "prefetch") if (value := getattr(request, name)) is not None}
    other = [
        name
        for name, value in asked.items()
        if value is not None and name not in ("workers", "num_workers", "prefetch", "prefetch_factor")
    ]
    if other:
        raise RequestError(f"resume= goes on as that run was planned: {', '.join(other)} cannot change.", where=str(run.path),
                           next="leave it out, or start a new run without resume=")  # fmt: skip
    splits = read_splits(module, *given, journal)
    facts, before = _facts(module, task, splits), read_json(run.path / RUN_FACTS)
    changed = _differences(before, facts)
    if changed:
        raise RequestError(f"This is not what the run began with: {'; '.join(changed)}.", where=str(run.path),
                           kept="the run and its checkpoints", next="give all as at first, or start a new run")  # fmt: skip
    if (run.path / "result.json").is_file():
        load_finished(run, module)
        return run
    with run_lock(run.path), recorded(journal, run.path, resume=RESUME):
        plan = plan.changed(**free) if free else plan
        return _train(run, module, plan, task, splits, facts, journal, began, resumed=True)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the facts of a run and those given to resume it, in words."""
    found = []
    old, new = before["module"]["state"], now["module"]["state"]
    for name in [*old, *(n for n in new if n not in old)]:
        if old.get(name) != new.get(name):
            had, has = (" ".join(map(str, state[name])) if name in state else "absent" for state in (old, new))
            found.append(f"the module's {name} was {had}, now {has}")
            break
    for split in dict.fromkeys([*before["data"], *now["data"]]):
        one, other = before["data"].get(split), now["data"].get(split)
        if one is None or other is None:
            found.append(f"{split}= was {'not given' if one is None else 'given'}")
        elif one["num"] != other["num"]:
            found.append(f"{split}= had {one['num']:,} samples, now {other['num']:,}")
        elif one["sha256"] != other["sha256"]:
            found.append(f"the samples of {split}= are other ones")
    for name in ("loss", "metrics"):
        if before[name] != now[name]:
            found.append(f"{name} was {before[name]}, now {now[name]}")
    return found


def _rehearsal_stage(parts: ModuleParts, journal: Journal, folder: Path) -> None:
    """Stage `rehearse`: raises RehearsalError if the module would not learn."""
    with stage(journal, "rehearse") as note:
        found = None
        while found is None:
            try:
                found = _rehearse(parts)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                loop.halve_micro_batch(parts.state, parts.train, journal, parts.context)
            except RehearsalError as error:
                error.where = write_checks(folder, error.checks)
                raise
        write_checks(folder, found.checks)
        note.text = f"{found.describe()} · {found.bare_rate:,.0f} samples/s bare step"
        note.fields = {"bare_rate": found.bare_rate, "checks": [check.to_dict() for check in found.checks]}


def _rehearse(parts: ModuleParts) -> Rehearsal:
    start = time.monotonic()
    batches: list[Sequence[MicroBatch]] = []
    for number in range(min(NUM_BATCHES, parts.train.steps_per_epoch)):
        if batches and time.monotonic() - start > LOADING_SECONDS:
            break
        batches.append(parts.train.group(0, number * parts.train.batch, parts.state.progress.num_micro))
    return rehearse_module(parts.state.model, parts.context, schedule=parts.state.progress.schedule,
                           build_optimizer=parts.optimizer_for, few=parts.few_samples(), batches=batches)  # fmt: skip
