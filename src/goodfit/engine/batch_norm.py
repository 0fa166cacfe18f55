"""Batch-norm statistics of averaged weights, from training samples that pass through them."""

from __future__ import annotations

from contextlib import closing

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from goodfit.engine.contracts import TrainingData
from goodfit.engine.ranks import Ranks
from goodfit.engine.state import copy_buffers, restore_buffers
from goodfit.engine.step import StepContext

NUM_SAMPLES = 1024  # that statistics are taken from: Wu and Johnson 2021 (Rethinking "Batch" in BatchNorm) need no more


def renew_statistics(
    average: nn.Module, trained: nn.Module, train: TrainingData, context: StepContext, *, epoch: int, num_micro: int,
    num_samples: int = NUM_SAMPLES,
) -> None:  # fmt: skip
    """Replace the running mean and variance of every batch norm by those of the averaged weights' own activations.

    The mean over batches of each batch's mean and (unbiased) variance, as torch's `update_bn`; but all else is in
    evaluation mode, as dropout would widen them. The batches are the first of the epoch, in the form that they have at
    the end of a run, without strong augmentation: a pure function of the epoch. Each process takes its slice of them,
    and the statistics are the mean over processes. Where they come out not finite, the former ones stay.

    Args:
        average: The averaged network, in evaluation mode; only its buffers change.
        trained: The network that trains: batch norms whose weights are frozen there keep their statistics.
        num_samples: Taken in whole batches, at least so many, if the epoch has them.
    """
    norms = _norms(average, trained)
    if not norms:
        return
    before = copy_buffers(average)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.training = True  # not `train()`: timm puts dropout inside its batch norms
    try:
        _pass(average, norms, train, context, epoch, num_micro, num_samples)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.training = False
    finite = _share(norms, context.ranks)
    restore_buffers(average, before, ~finite, reads_are_free=context.device.reads_are_free)


def _norms(average: nn.Module, trained: nn.Module) -> list[_BatchNorm]:
    found = []
    for mine, other in zip(average.modules(), trained.modules(), strict=True):
        if isinstance(mine, _BatchNorm) and mine.track_running_stats:
            weights = list(other.parameters(recurse=False))
            if not weights or any(weight.requires_grad for weight in weights):
                found.append(mine)
    return found


def _pass(
    average: nn.Module, norms: list[_BatchNorm], train: TrainingData, context: StepContext, epoch: int, num_micro: int,
    num_samples: int,
) -> None:  # fmt: skip
    """Let the first batches of an epoch through; after batch k the statistics are the mean over k batches."""
    number = 0
    with torch.no_grad(), closing(train.groups(epoch, 0, num_micro, closing=True)) as groups:
        for step, group in enumerate(groups):
            for part, micro in enumerate(group):
                number += 1
                for norm in norms:
                    norm.momentum = 1 / number  # torch's own cumulative mean (None) reads its count from the device
                batch = context.transform.train(context.device.move(micro.data), epoch=epoch, step=step,
                                                rank=context.ranks.rank, micro=part, samples=micro.samples,
                                                closing=True)  # fmt: skip
                with context.device.autocast():
                    context.task.predict(average, batch)
            if (step + 1) * train.batch >= num_samples:
                break


def _share(norms: list[_BatchNorm], ranks: Ranks) -> torch.Tensor:
    """Take the mean over processes. Returns whether all is finite: a bool scalar on the device."""
    sums = []
    for norm in norms:
        for buffer in (norm.running_mean, norm.running_var):
            assert buffer is not None
            ranks.sum_(buffer).div_(ranks.size)
            sums.append(buffer.sum())
    return torch.isfinite(torch.stack(sums)).all()
