"""`fit`: steps, validation, early stopping, segments and checkpoints, in the order in which they happen."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import Any, NoReturn

import torch

from goodfit.core.errors import GoodfitError, OutOfMemory, Stopped, StorageError, TrainingError
from goodfit.core.journal import Journal
from goodfit.engine.checkpoint import Checkpoints, Snapshot, restore, take_snapshot
from goodfit.engine.clock import Clock
from goodfit.engine.contracts import EvaluationData, TrainingData
from goodfit.engine.device import is_out_of_memory
from goodfit.engine.epoch import Epoch
from goodfit.engine.evaluate import evaluate
from goodfit.engine.policy import (
    COOL_DOWN,
    EXTENSION,
    FitSettings,
    cool_down,
    is_plateau,
    keep_to_time,
    lengthened,
    reason_of_end,
    reason_to_extend,
    take_note,
)
from goodfit.engine.schedule import Schedule
from goodfit.engine.state import TrainState, copy_buffers, restore_buffers
from goodfit.engine.step import StepContext, train_step
from goodfit.engine.stop import StopFlag
from goodfit.engine.swa import average_weights

TRIES, RETRY_SECONDS = 3, 5.0  # of a save that cannot wait, and the pause between two
LASTING = (errno.EACCES, errno.EPERM, errno.EROFS)  # what no pause mends
NEVER_FINITE = 10  # validations without a finite loss, from the first on, that end the run


def fit(
    state: TrainState, context: StepContext, train: TrainingData, val: EvaluationData, *, settings: FitSettings,
    checkpoints: Checkpoints, journal: Journal, stop: StopFlag,
) -> None:  # fmt: skip
    """Train until the schedule ends or patience has cooled the run down, and leave the best state on disk.
    Can be entered from any checkpoint: everything that matters is in `state`.

    Raises:
        Stopped: a signal asked for it; a checkpoint was written.
        TrainingError: 20 updates in a row were not finite.
        OutOfMemory: the smallest micro-batch does not fit.
        StorageError: a checkpoint could not be written.
    """
    epoch, clock, settings = _enter(state, context, settings, checkpoints, journal, train)
    out_of_memory = False
    while not state.progress.finished:
        progress = state.progress
        progress.closing = progress.schedule.is_closing(progress.step - progress.position // train.batch)
        remaining = train.groups(progress.epoch, progress.position, progress.num_micro, closing=progress.closing)
        with closing(remaining) as groups:  # whatever ends the epoch, loader processes end with it
            epoch.start(again=out_of_memory)
            out_of_memory = False
            while (
                not out_of_memory
                and not epoch.is_over()
                and (group := _next(groups, state, checkpoints, epoch)) is not None
            ):
                clock.spend("data")
                if progress.step == progress.schedule.stable_until and progress.step > 0:
                    _save(state, checkpoints, epoch, pinned=True)  # extensions and cool-downs start here
                buffers = copy_buffers(state.model)
                try:
                    record = train_step(state, context, group, progress.schedule.factor(progress.step), buffers)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    del group
                    restore_buffers(state.model, buffers)
                    halve_micro_batch(state, train, journal, context)
                    out_of_memory = True
                    continue
                clock.spend("step")
                progress.position += train.batch
                epoch.add(record)
                keep_to_time(progress, settings, train.steps_per_epoch, context.ranks)
                if context.ranks.any(stop()):
                    _save_and_stop(state, checkpoints, epoch, stop)
                if context.ranks.any(checkpoints.is_overdue()):
                    _try_save(state, checkpoints, epoch)
                clock.spend("host")
        clock.spend("other" if out_of_memory else "data")  # loader processes have ended
        if out_of_memory:
            continue  # the same batch again, in smaller parts
        epoch.drain()
        measured = epoch.finish(context)
        metrics = _validate(state, context, train, val, checkpoints=checkpoints, epoch=epoch, stop=stop)
        _close_epoch(state, metrics, measured, settings=settings, checkpoints=checkpoints, journal=journal,
                     train=train, epoch=epoch)  # fmt: skip
        if not state.progress.finished and context.ranks.any(stop()):
            _save_and_stop(state, checkpoints, epoch, stop)


def _enter(
    state: TrainState, context: StepContext, settings: FitSettings, checkpoints: Checkpoints, journal: Journal,
    train: TrainingData,
) -> tuple[Epoch, Clock, FitSettings]:  # fmt: skip
    """The clock and records, and the settings with what the context knows; an extension is made where a kill came between its two
    checkpoints."""
    epoch = Epoch(state, journal, Clock(), settings.time)
    settings = replace(settings, thawed=context.freezing.starts[-1])
    if state.step and state.progress.position == 0 and not state.progress.finished:
        _go_on_longer(state, settings, checkpoints, journal, train, epoch)
    return epoch, epoch.clock, settings


def _validate(
    state: TrainState, context: StepContext, train: TrainingData, val: EvaluationData, *, checkpoints: Checkpoints, epoch: Epoch,
    stop: StopFlag,
) -> dict[str, float]:  # fmt: skip
    """The figures of validation, on the average where there is one. Raises Stopped, with a checkpoint, if that was asked for half-way."""
    average_weights(state, train, context)
    with _saved_if_it_fails(state, checkpoints, epoch):
        meter = evaluate(state.evaluated, val, task=context.task, transform=context.transform, device=context.device,
                         ranks=context.ranks, stop=stop)  # fmt: skip
    if meter is None:
        _save_and_stop(state, checkpoints, epoch, stop)
    return meter.compute()


def _close_epoch(
    state: TrainState, metrics: dict[str, float], measured: dict[str, float], *, settings: FitSettings,
    checkpoints: Checkpoints, journal: Journal, train: TrainingData, epoch: Epoch,
) -> None:  # fmt: skip
    """Take note of a validation, and decide what follows: the next epoch, a cool-down, or the end.

    The event's seconds reach back to the event before it, so that what is saved here counts in the next epoch; what
    follows the last epoch is told by its checkpoint.
    """
    progress, clock = state.progress, epoch.clock
    clock.spend("validation")
    kept = take_note(progress, metrics, settings)
    if not progress.schedule.is_averaging(progress.step):  # whose rate is held
        progress.schedule = progress.schedule.after_validation(progress.bad_epochs)
    improved = progress.best is not None and progress.best["step"] == progress.step and kept
    train_loss = progress.loss_sum / max(1, progress.loss_count)
    journal.step, journal.segment = progress.step, progress.segment
    clock.spend("host")
    laps = clock.lap()
    journal.emit("epoch", epoch=progress.epoch, train_loss=train_loss, val=metrics, improved=improved,
                 lr=state.optimizer.param_groups[0]["lr"], samples=progress.position,
                 skipped=len(progress.skipped), total_steps=progress.schedule.total_steps, **measured, **laps)  # fmt: skip
    if settings.time is not None:
        settings.time.end_epoch(laps["seconds"] - measured["train_seconds"], laps["validation_seconds"])
    progress.epoch += 1
    progress.position, progress.loss_sum, progress.loss_count = 0, 0.0, 0
    if kept:
        clock.spend("host")
        checkpoints.hold(take_snapshot(state))
        clock.spend("saving")
    _go_on(state, settings, checkpoints, journal, train, epoch)
    if state.progress.finished:
        _save(state, checkpoints, epoch)
    elif not checkpoints.is_due() or not _try_save(state, checkpoints, epoch):
        return
    journal.emit("checkpoint", name=take_name(state), saving_seconds=clock.spent("saving"))


def _go_on(
    state: TrainState, settings: FitSettings, checkpoints: Checkpoints, journal: Journal, train: TrainingData,
    epoch: Epoch,
) -> None:  # fmt: skip
    """What follows an epoch: the end, a cool-down, an extension, or just the next one."""
    progress = state.progress
    if progress.step >= progress.schedule.total_steps:
        if progress.best is None:
            raise TrainingError("No validation gave a finite loss.", kept="the last checkpoint",
                                next="use precision=fp32, or a lower lr=")  # fmt: skip
        progress.finished, progress.ended = True, reason_of_end(progress, settings, train.steps_per_epoch)
    elif progress.best is None and len(progress.losses) >= NEVER_FINITE and min(progress.losses) == sys.float_info.max:
        raise TrainingError(f"None of {len(progress.losses)} validations gave a finite loss.", kept="the last checkpoint",
                            next="use precision=fp32, or a lower lr=")  # fmt: skip
    elif is_plateau(progress, settings):
        _cool_down(state, checkpoints, journal, train)
        epoch.clock.spend("other")
        _save(state, checkpoints, epoch)  # a kill before it repeats the epoch, and branches again
    else:
        _go_on_longer(state, settings, checkpoints, journal, train, epoch)


def _go_on_longer(
    state: TrainState, settings: FitSettings, checkpoints: Checkpoints, journal: Journal, train: TrainingData,
    epoch: Epoch,
) -> None:  # fmt: skip
    """Extend a run that still improves and whose rate would fall in the next epoch."""
    if why := reason_to_extend(state.progress, settings, train.steps_per_epoch):
        _extend(state, settings, checkpoints, journal, epoch, train, why)
        _save(state, checkpoints, epoch)


def _save(
    state: TrainState, checkpoints: Checkpoints, epoch: Epoch, *, pinned: bool = False, tries: int = TRIES
) -> None:
    """Save what cannot wait for the next epoch; some more times, where a disk is full for the moment."""
    snapshot = _snapshot(state, epoch, pinned=pinned)
    for number in range(1, tries + 1):
        try:
            checkpoints.save(snapshot)
            break
        except StorageError as error:
            if number == tries or getattr(error.__cause__, "errno", None) in LASTING:
                raise
            _tell_unsaved(state, epoch, error.message)
            time.sleep(RETRY_SECONDS)
    epoch.clock.spend("saving")


def _tell_unsaved(state: TrainState, epoch: Epoch, problem: str) -> None:
    epoch.journal.emit(
        "stage", name="saving", text=f"no checkpoint at step {state.step}: {problem} The next try follows."
    )


def _try_save(state: TrainState, checkpoints: Checkpoints, epoch: Epoch) -> bool:
    """Save where that can wait, and say if it failed. Returns whether it did not."""
    problem = checkpoints.try_save(_snapshot(state, epoch))
    epoch.clock.spend("saving")
    if problem:
        _tell_unsaved(state, epoch, problem)
    return not problem


def _snapshot(state: TrainState, epoch: Epoch, *, pinned: bool = False) -> Snapshot:
    epoch.drain()
    epoch.clock.spend("host")
    if epoch.time is not None:
        state.progress.seconds = epoch.time.spent()
    return take_snapshot(state, pinned=pinned)


@contextmanager
def _saved_if_it_fails(state: TrainState, checkpoints: Checkpoints, epoch: Epoch) -> Iterator[None]:
    """Around what reads files and runs in loader processes: if it fails, nothing that was learned is lost."""
    try:
        yield
    except Exception as error:
        kept = "the last checkpoint"
        with suppress(Exception):  # as where the disk is full, or the device is lost: the error itself counts
            _save(state, checkpoints, epoch, tries=1)
            kept = f"checkpoint {take_name(state)}"
        if isinstance(error, GoodfitError):
            error.kept = kept
            if "resume" not in error.next and not isinstance(error, OutOfMemory):
                error.next = f"{error.next}, then goodfit resume RUN" if error.next else "goodfit resume RUN"
        elif str(error).startswith("DataLoader worker"):
            raise TrainingError(f"A loader process died: {str(error).strip().splitlines()[-1]}", kept=kept,
                                next="goodfit resume RUN workers=0, if memory or /dev/shm was too small for them") from error  # fmt: skip
        raise


def _next(groups: Iterator[Any], state: TrainState, checkpoints: Checkpoints, epoch: Epoch) -> Any:
    """The next batch's micro-batches; None after the last."""
    with _saved_if_it_fails(state, checkpoints, epoch):
        return next(groups, None)


def take_name(state: TrainState) -> str:
    """The directory name of a checkpoint of this state."""
    segment = state.progress.segment
    return f"step-{state.progress.step:08d}" + (f"-segment-{segment}" if segment else "")


def _branch(
    state: TrainState, journal: Journal, parent: dict[str, Any], schedule: Schedule, *, why: str, reason: str, epochs: int
) -> None:  # fmt: skip
    """Start a new segment at the state as it is now, which is the one at `parent`."""
    progress = state.progress
    progress.parent = {"segment": parent["segment"], "step": parent["step"]}
    progress.branches = [*progress.branches, progress.parent]
    progress.segment += 1
    progress.branch, progress.schedule, progress.num_averaged = why, schedule, 0
    journal.segment, journal.step = progress.segment, progress.step
    journal.emit("segment", parent=progress.parent, branch=why, reason=reason, epochs=epochs)


def _cool_down(state: TrainState, checkpoints: Checkpoints, journal: Journal, train: TrainingData) -> None:
    """Go back to the best state at the stable rate, from where the rate falls to its end over a fifth of the steps done."""
    last = state.progress
    place = last.reference
    assert place is not None
    restore(state, checkpoints.load_state(place))
    progress = state.progress  # of that state, but for what the run as a whole knows
    progress.segment, progress.skipped, progress.branches = last.segment, last.skipped, last.branches
    progress.best, progress.bad_epochs, progress.seconds = last.best, 0, last.seconds
    progress.num_micro = max(progress.num_micro, last.num_micro)  # memory that ran out since would run out again
    schedule, epochs = cool_down(progress, train.steps_per_epoch)
    _branch(state, journal, place, schedule, why=COOL_DOWN, epochs=epochs,
            reason="no improvement: cool down from the best state")  # fmt: skip


def _extend(
    state: TrainState, settings: FitSettings, checkpoints: Checkpoints, journal: Journal, epoch: Epoch,
    train: TrainingData, why: str,
) -> None:  # fmt: skip
    """Twice as long, with the same optimizer state and rate; the state before it is pinned."""
    _save(state, checkpoints, epoch, pinned=True)
    progress = state.progress
    longest = settings.most_epochs * train.steps_per_epoch
    schedule = lengthened(progress.schedule, min(longest, 2 * progress.schedule.total_steps))
    epochs = schedule.total_steps // train.steps_per_epoch
    _branch(state, journal, {"segment": progress.segment, "step": progress.step}, schedule, why=EXTENSION, epochs=epochs,
            reason=f"{why}: extended to {epochs} epochs")  # fmt: skip


def _save_and_stop(state: TrainState, checkpoints: Checkpoints, epoch: Epoch, stop: StopFlag) -> NoReturn:
    _save(state, checkpoints, epoch, tries=1)
    raise Stopped(f"Stopped at step {state.step}, in epoch {state.progress.epoch + 1}.", exit_code=stop.exit_code,
                  kept=f"checkpoint {take_name(state)}", next="goodfit resume RUN")  # fmt: skip


def halve_micro_batch(state: TrainState, train: TrainingData, journal: Journal, context: StepContext) -> None:
    """Twice as many micro-batches of half the size: the batch and its mathematics stay.

    Raises:
        OutOfMemory: the micro-batch is as small as it can be.
    """
    progress = state.progress
    has_norm = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in state.model.modules())
    smallest = 2 if has_norm else 1  # batch norm cannot normalise over one sample
    most = max(1, train.batch // context.ranks.size // smallest)
    if progress.num_micro >= most:
        raise OutOfMemory(f"Memory ran out with {smallest} samples at a time.", kept="the last checkpoint",
                          next="use a smaller imgsz= or model=, or precision=bf16")  # fmt: skip
    state.optimizer.zero_grad(set_to_none=True)
    progress.num_micro = min(2 * progress.num_micro, most)
    context.device.hand_back()
    journal.step = progress.step
    journal.emit("decision", name="accumulate", value=progress.num_micro, source="measured",
                 reason="memory ran out: smaller micro-batches, same batch")  # fmt: skip
