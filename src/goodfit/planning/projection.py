"""What a run will cost in time, memory and disk, before it starts; and afterwards, what it did cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from goodfit.config.plan import Plan
from goodfit.core.errors import StorageError
from goodfit.core.journal import Event
from goodfit.core.places import free_bytes
from goodfit.engine.checkpoint import KEEP
from goodfit.planning.pace import Pace

BYTES = 4  # of a weight; also under half precision the weights stay float32
# Tensors of a parameter's size in the optimizer's state; without momentum sgd and rmsprop have one less. Muon has one for
# a matrix and two for what AdamW updates: at most two.
MOMENTS = {"adamw": 2, "adam": 2, "nadam": 2, "radam": 2, "muon": 2, "rmsprop": 2, "sgd": 1}
RECORDS = 5_000_000  # bytes of plots, report and events (demo: 1.1 MB), and what a file system rounds up


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """What a run of all its epochs costs at most.

    Attributes:
        epochs: Passes, at most; early stopping may end the run before.
        epoch_seconds: Of one epoch after the first: steps, waiting for data, validation and saving; None if none of it
            was measured.
        seconds: Of all epochs; None likewise.
        memory: Peak memory of the device, bytes; None if it was not measured.
        disk: Bytes that must be free while the run goes on.
        kept: Bytes of them that its folder takes at the end, at most.
        cache: Bytes of the disk cache, kept elsewhere and for later runs; 0 without one.
    """

    epochs: int
    epoch_seconds: float | None
    seconds: float | None
    memory: int | None
    disk: int
    kept: int
    cache: int

    def describe(self, free: int) -> str:
        """One line for the terminal; `free` is the free bytes where the run is."""
        of = f"{describe_bytes(self.disk)} on disk of {describe_bytes(free)} free"
        if self.cache:
            of += f", and {describe_bytes(self.cache)} of cache"
        memory = "" if self.memory is None else f"; {describe_bytes(self.memory)} of memory"
        if self.seconds is None or self.epoch_seconds is None:
            return f"time unknown without a rehearsal: at most {self.epochs} epochs{memory}; {of}"
        return (f"at most {self.epochs} epochs of about {describe_seconds(self.epoch_seconds)}, "
                f"{describe_seconds(self.seconds)} in all{memory}; {of}")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the event and result.json."""
        return asdict(self)


def project(
    plan: Plan, *, num_val: int, steps_per_epoch: int, num_parameters: int, num_buffers: int = 0,
    pace: Pace | None = None, memory: int | None = None, cache: int = 0,
) -> Projection:  # fmt: skip
    """Project a run.

    Args:
        plan: What was decided.
        num_val: Samples of the validation split.
        steps_per_epoch: Updates in one pass.
        num_parameters: Weights of the model.
        num_buffers: Further numbers in its state (batch-norm statistics).
        pace: Measured seconds of what an epoch consists of; None if it was not measured.
        memory: Peak memory of the device, bytes.
        cache: Bytes of the decoded pictures, counted where the plan keeps them on disk.
    """
    epochs = plan.epochs.value
    epoch = None if pace is None else pace.epoch(steps_per_epoch, num_val)
    model = BYTES * (num_parameters + num_buffers)
    moments = MOMENTS[plan.optimizer.value] - (plan.optimizer.value in ("sgd", "rmsprop") and plan.momentum.value == 0)
    checkpoint = model * (2 if plan.ema.value or plan.swa.value else 1) + BYTES * moments * num_parameters
    peak, last = num_checkpoints(plan)
    bundle = 2 * model  # safetensors and ONNX
    return Projection(
        epochs=epochs,
        epoch_seconds=epoch,
        seconds=None if epoch is None else epochs * epoch,
        memory=memory,
        disk=max(peak * checkpoint, last * checkpoint + bundle) + RECORDS,
        kept=last * checkpoint + bundle + RECORDS,
        cache=cache if plan.cache.value == "disk" else 0,
    )


def num_checkpoints(plan: Plan) -> tuple[int, int]:
    """How many checkpoints may lie on the disk at once, and how many at the end, as `Checkpoints.save` keeps them.

    The newest, older ones up to KEEP in all, the best, those pinned before a decay, and after a plateau the state that
    the cool-down began from. While saving, a new best and a new last one come before the old ones go. With one or two
    epochs there are fewer states than that: one an epoch, those pinned, and KEEP from within long epochs.
    """
    epochs = plan.epochs.value
    plateau = 0 < plan.patience.value < epochs
    decays = plan.warmup.value > 0 or plan.schedule.value in (
        "step",
        "multistep",
    )  # after warm-up, or at a step of their own
    pinned = 1 if plan.schedule.value == "wsd" else decays + plateau
    while plan.schedule.value == "wsd" and epochs * 2**pinned <= plan.most_epochs.value:
        pinned += 1  # each extension starts from a state that is kept
    kept = KEEP + 1 + pinned + plateau
    return min(kept + 2, epochs + KEEP + pinned), min(kept, epochs + KEEP - 1 + pinned)


def check_disk(
    projection: Projection, folder: Path, *, cache_here: bool = False, present: int | None = None, trained: bool = False
) -> int:
    """Refuse a run for which the disk is too small. Returns the free bytes.

    Args:
        folder: The run's.
        cache_here: Whether the disk cache has still to be written, to the same file system.
        present: Bytes of checkpoints and bundle that a run which is resumed has already; None for a new one.
        trained: It has ended its training, and only the test, the bundle and the report are left.

    Raises:
        StorageError: less is free than the run needs.
    """
    free = free_bytes(folder)
    need = projection.kept if trained else projection.disk
    need = max(0, need - (present or 0)) + (projection.cache if cache_here else 0)
    if need > free and present is not None:
        raise StorageError(
            f"The rest of the run needs up to {describe_bytes(need)} of disk, and {describe_bytes(free)} are free.",
            where=str(folder), kept="the run and its checkpoints, as they are",
            next=f"free some space, then: goodfit resume {folder}",
        )  # fmt: skip
    if need > free:
        cache = ", cache=off" if cache_here and projection.cache else ""
        raise StorageError(
            f"The run needs up to {describe_bytes(need)} of disk, and {describe_bytes(free)} are free.",
            where=str(folder), kept="nothing was trained; the plan and the split are there",
            next=f"free some space, or use project= on another disk{cache}, or a smaller model=",
        )  # fmt: skip
    return free


def measure_outcome(epochs: Sequence[Event], folder_bytes: int) -> dict[str, Any]:
    """What a finished run took, under the names of a projection.

    Args:
        epochs: Its `epoch` events.
        folder_bytes: Of everything in its folder.
    """
    seconds = [float(e["seconds"]) for e in epochs]
    return {
        "epochs": len(epochs),
        "epoch_seconds": statistics.median(seconds[1:] or seconds) if seconds else None,
        "seconds": sum(seconds),
        "memory": max((int(e["memory"]) for e in epochs), default=None),
        "kept": folder_bytes,
    }


def describe_outcome(projected: dict[str, Any] | None, achieved: dict[str, Any]) -> str:
    """Projected against achieved, in one line for the report; `projected` is None if nothing was."""
    if projected is None:
        return "nothing was projected"
    found, parts = achieved, []
    if projected["epoch_seconds"] and found["epoch_seconds"]:
        ratio = found["epoch_seconds"] / projected["epoch_seconds"]
        parts.append(f"an epoch {describe_seconds(projected['epoch_seconds'])} projected, "
                     f"{describe_seconds(found['epoch_seconds'])} taken ({ratio:.2f} times)")  # fmt: skip
        parts.append(f"{found['epochs']} of at most {projected['epochs']} epochs, {describe_seconds(projected['seconds'])} projected for all, "
                     f"{describe_seconds(found['seconds'])} taken")  # fmt: skip
    elif found["epoch_seconds"]:
        parts.append(
            f"an epoch took {describe_seconds(found['epoch_seconds'])}; without a rehearsal none was projected"
        )
    if projected["memory"] and found["memory"]:
        parts.append(f"memory {describe_bytes(projected['memory'])} projected, {describe_bytes(found['memory'])} taken")
    elif found["memory"]:
        parts.append(f"peak memory {describe_bytes(found['memory'])}")
    parts.append(f"disk at most {describe_bytes(projected['kept'])} projected, {describe_bytes(found['kept'])} taken")
    return "; ".join(parts)


def describe_seconds(seconds: float) -> str:
    """A length of time for people: "0.8 s", "32 s", "5 min 20 s", "3 h 5 min", "2 d 4 h"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, smaller, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name}" + (f" {rest} {small_name}" if rest else "")
    return f"{whole} s"


def describe_bytes(count: int) -> str:
    """A number of bytes for people: "0 MB", "85 MB", "1.1 GB", "52 GB"."""
    if count < 999_500_000:
        return f"{count / 1e6:.0f} MB"
    return f"{count / 1e9:.1f} GB" if count < 9.95e9 else f"{count / 1e9:,.0f} GB"
