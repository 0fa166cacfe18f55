"""The records of the epoch in progress, on their way to the events."""

from __future__ import annotations

import math
import time

from goodfit.core.errors import TrainingError
from goodfit.core.journal import Journal
from goodfit.engine.budget import TimeBudget
from goodfit.engine.clock import Clock
from goodfit.engine.device import HostCopy
from goodfit.engine.state import TrainState
from goodfit.engine.step import StepContext, StepRecord

MAX_BAD_STEPS = 20  # masked steps in a row that end the run
EVENT_SECONDS = 0.5  # between two step events


class Epoch:
    """The records of the epoch in progress: each is read one step late, so that the device is never waited for."""

    def __init__(self, state: TrainState, journal: Journal, clock: Clock, budget: TimeBudget | None = None) -> None:
        self._state = state
        self.journal = journal
        self.clock = clock
        self.time = budget
        self._pending: tuple[StepRecord, HostCopy] | None = None
        self._last_event = 0.0
        self._began = self._saved = 0.0
        self._samples = 0

    def start(self, *, again: bool = False) -> None:
        """The training part of an epoch begins; or goes on, where memory ran out in it."""
        now = self.clock.spend("host")
        if not again:
            self._began, self._saved, self._samples = now, self.clock.spent("saving"), 0
        if self.time is not None:
            self.time.begin_epoch(self._state.step)

    def is_over(self) -> bool:
        """Whether the schedule ends here, which a time budget may let it do in mid-epoch."""
        return self._state.step >= self._state.progress.schedule.total_steps

    def add(self, record: StepRecord) -> None:
        """Take a step's record, and read the one before it."""
        values = HostCopy([record.loss, record.grad_norm, record.bad])
        self.drain()
        self._pending = record, values
        self._samples += record.num_samples

    def drain(self) -> None:
        """Read the record that is waiting. A device that works beside the host shows here how long it took.

        Raises:
            TrainingError: too many steps in a row were not finite.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        record, values = pending
        progress = self._state.progress
        self.journal.step, self.journal.segment = record.step, progress.segment
        self.clock.spend("host")
        loss, grad_norm, bad = values.read()
        self.clock.spend("step")
        if bad:
            progress.bad_in_a_row += 1
            overflow = self._state.loss_scale.active and math.isfinite(loss)
            if not overflow:
                samples = record.samples.tolist()
                progress.skipped.append({"step": record.step, "samples": samples})
                self.journal.emit("step", loss=loss, grad_norm=grad_norm, lr=record.lr,
                                   skipped=True, samples=samples)  # fmt: skip
            if progress.bad_in_a_row >= MAX_BAD_STEPS:
                raise _diverged(progress.step, progress.bad_in_a_row)
            return
        progress.bad_in_a_row = 0
        progress.loss_sum += loss * record.num_samples
        progress.loss_count += record.num_samples
        if time.monotonic() - self._last_event >= EVENT_SECONDS:
            self._last_event = time.monotonic()
            self.journal.emit("step", loss=loss, grad_norm=grad_norm, lr=record.lr,
                               epoch=progress.epoch, total_steps=progress.schedule.total_steps,
                               **({} if self.time is None else {"spent": round(self.time.spent(), 3)}),
                               rate=self._samples / max(1e-9, time.monotonic() - self._began))  # fmt: skip

    def finish(self, context: StepContext) -> dict[str, float]:
        """Seconds of the epoch's training part without what was saved in it, the rate, and peak memory so far (bytes)."""
        seconds = self.clock.spend("host") - self._began - (self.clock.spent("saving") - self._saved)
        rate = self._samples / seconds if self._samples else 0.0
        return {"train_seconds": seconds, "samples_per_second": rate, "memory": context.device.peak_memory()}


def _diverged(step: int, count: int) -> TrainingError:
    return TrainingError(
        f"{count} updates in a row were not finite, up to step {step}: training has diverged.",
        kept="the last checkpoint, and the best; none of them holds a value that is not finite",
        next="use a lower lr=, or precision=fp32; the samples are named in events.jsonl",
    )
