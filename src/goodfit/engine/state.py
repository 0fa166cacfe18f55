"""Everything a run must remember between two steps: tensors, and `Progress`, its counters as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import nn

from goodfit.engine.ema import Ema
from goodfit.engine.schedule import Schedule

ADDED = ("without_patience",)  # fields of Progress that checkpoints of earlier versions lack
GROWTH_STEPS = 2000  # good steps before an fp16 loss scale is doubled


@dataclass(slots=True)
class Progress:
    """Where a run stands. Goes to state.json and back.

    Attributes:
        segment: Number of this segment of the run's tree.
        parent: Segment and step that it started from; None for the first.
        branch: Why it was started: "extension" or "cool-down"; "" for the first.
        branches: Segment and step of every state that a segment started from; their checkpoints are kept.
        step: Updates done, counted along the branch.
        epoch: Number of the epoch in progress, from 0.
        position: Samples consumed in it, over all processes.
        closing: Whether strong augmentation is off in it.
        num_micro: Micro-batches per update and process; doubled when memory runs out.
        schedule: The learning-rate schedule of this segment.
        best: Segment, step, epoch, value and loss of the best validation so far; None before the first.
        reference: The same of the best one on the way to this state, before the rate began to fall for good.
        counted: The watched figure when it last gained enough for patience.
        bad_epochs: Validations since then, warm-up not counted.
        losses: Validation losses on the way to this state, one an epoch.
        seconds: That the run has taken, where it has a time budget; else 0.
        loss_sum, loss_count: Training loss of the epoch so far, summed over samples.
        skipped: Steps whose update was masked, with the rows of their samples.
        bad_in_a_row: Masked steps since the last good one.
        num_averaged: Epochs whose weights are in the equal average; 0 before it begins.
        without_patience: Whether a person extended the run, who asked for all of its epochs.
        finished: Whether training is over.
        ended: Why: "schedule", "cool-down", "time budget"; "" while it goes on.
    """

    schedule: Schedule
    segment: int = 0
    parent: dict[str, int] | None = None
    branch: str = ""
    branches: list[dict[str, int]] = field(default_factory=list)
    step: int = 0
    epoch: int = 0
    position: int = 0
    closing: bool = False
    num_micro: int = 1
    best: dict[str, Any] | None = None
    reference: dict[str, Any] | None = None
    counted: float | None = None
    bad_epochs: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    bad_in_a_row: int = 0
    num_averaged: int = 0
    without_patience: bool = False
    finished: bool = False
    ended: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Progress:
        """The inverse of to_dict; raises KeyError or TypeError if it does not fit."""
        known = {
            f.name: value[f.name]
            for f in fields(cls)
            if f.name != "schedule" and (f.name in value or f.name not in ADDED)
        }
        return cls(schedule=Schedule(**value["schedule"]), **known)


class LossScale:
    """The fp16 loss scale (Micikevicius et al. 2018): halved when a step overflows, doubled after 2,000 good steps.

    For other precisions it is 1 and never changes. Lives on the device, so that nothing is read.
    """

    def __init__(self, device: torch.device, *, active: bool) -> None:
        self.active = active
        self.value = torch.tensor(2.0**14 if active else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, bad: torch.Tensor) -> None:
        """Take note of a step; `bad` is a bool scalar on the device."""
        if not self.active:
            return
        self.good_steps = torch.where(bad, 0.0, self.good_steps + 1)
        grown = torch.where(self.good_steps >= GROWTH_STEPS, 2.0, 1.0)
        self.value = (self.value * torch.where(bad, 0.5, grown)).clamp(min=1.0)
        self.good_steps = torch.where(grown > 1, 0.0, self.good_steps)


@dataclass(slots=True)
class TrainState:
    """What training changes.

    Attributes:
        swa: The network that stochastic weight averaging fills: the moving average's, where there is one.
        stage: Of freezing, as it was applied to the model; -1 before any was.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    loss_scale: LossScale
    progress: Progress
    swa: nn.Module | None = None
    stage: int = -1

    @property
    def step(self) -> int:
        """Updates done."""
        return self.progress.step

    @property
    def evaluated(self) -> nn.Module:
        """The model that is validated and kept: the average if there is one. The equal average takes over from the
        moving one as soon as a model is in it."""
        if self.swa is not None and self.progress.num_averaged > 0:
            return self.swa
        return self.model if self.ema is None else self.ema.model


def copy_buffers(model: nn.Module) -> list[torch.Tensor]:
    """Copies of a model's buffers (batch-norm statistics)."""
    return [buffer.clone() for buffer in model.buffers()]


def restore_buffers(
    model: nn.Module, copies: Sequence[torch.Tensor], bad: torch.Tensor | None = None, *, reads_are_free: bool = True
) -> None:
    """Put the copies back where `bad` is true (always, if it is None), without reading it where reading waits."""
    if reads_are_free and bad is not None and not bool(bad):
        return
    for buffer, copied in zip(model.buffers(), copies, strict=True):
        buffer.copy_(copied if bad is None or reads_are_free else torch.where(bad, copied, buffer))
