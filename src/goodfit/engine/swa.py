"""Stochastic weight averaging (Izmailov et al. 2018): the equal average of the weights at the ends of the last epochs."""

from __future__ import annotations

import copy

import torch
from torch import nn

from goodfit.engine.batch_norm import renew_statistics
from goodfit.engine.contracts import TrainingData
from goodfit.engine.ema import Ema
from goodfit.engine.state import TrainState
from goodfit.engine.step import StepContext


def build_average(model: nn.Module, ema: Ema | None) -> nn.Module:
    """The network to average into: the moving average's, which ends where this one begins, or a copy of the model."""
    return ema.model if ema is not None else copy.deepcopy(model).eval().requires_grad_(False)


def average_weights(state: TrainState, train: TrainingData, context: StepContext) -> None:
    """At the end of an epoch of the schedule's averaging part: take the weights into the average.

    After n epochs each has the share 1/n. Batch-norm statistics are then taken anew from training samples; other buffers
    are the model's own. What the state already holds is not averaged twice, so that an epoch whose validation was
    interrupted can be resumed.
    """
    progress, average = state.progress, state.swa
    if average is None:
        return
    if not progress.schedule.is_averaging(progress.step):
        progress.num_averaged = 0  # also of a segment that goes on from an averaged state
        return
    if progress.num_averaged >= (progress.step - progress.schedule.averaging_from) // train.steps_per_epoch:
        return
    progress.num_averaged += 1
    with torch.no_grad():
        for mine, other in zip(average.buffers(), state.model.buffers(), strict=True):
            mine.copy_(other)
        averages, weights = list(average.parameters()), list(state.model.parameters())
        if progress.num_averaged == 1:
            torch._foreach_copy_(averages, weights)
        else:
            torch._foreach_lerp_(averages, weights, 1 / progress.num_averaged)
    renew_statistics(average, state.model, train, context, epoch=progress.epoch, num_micro=progress.num_micro)
