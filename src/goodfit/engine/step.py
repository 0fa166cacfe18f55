"""One update of the weights from a group of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from goodfit.core.random import derive_seed, stream
from goodfit.engine.contracts import BatchTransform, Micro, Task, Terms
from goodfit.engine.device import DevicePolicy
from goodfit.engine.freezing import NOTHING, Freezing
from goodfit.engine.optimizer import mask_update, set_learning_rate, undo_update
from goodfit.engine.ranks import Ranks
from goodfit.engine.state import TrainState, restore_buffers

_MODEL = stream("model")


@dataclass(frozen=True, slots=True)
class StepContext:
    """What every step of a run shares."""

    task: Task
    transform: BatchTransform
    device: DevicePolicy
    ranks: Ranks
    seed: int
    clip: float  # largest gradient norm; 0 is off
    clip_value: float = 0.0  # largest element of the gradient; 0 is off
    freezing: Freezing = NOTHING


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did. The tensors are scalars on the device, to be read later."""

    step: int
    loss: torch.Tensor
    grad_norm: torch.Tensor
    bad: torch.Tensor  # bool: loss or gradient was not finite, so weights, optimizer and average stayed as they were
    lr: float
    num_samples: int
    samples: npt.NDArray[np.int64]


def train_step(
    state: TrainState, context: StepContext, group: Sequence[Micro], factor: float, buffers: Sequence[torch.Tensor]
) -> StepRecord:
    """Update the weights once; the gradient is that of one large batch, also where micro-batches are uneven.

    Each term of the loss is normalised by its own count over all micro-batches and processes. Batch norm and mixup see
    one micro-batch at a time, so with them accumulation is not the same as a large batch.

    Args:
        factor: The schedule's factor on the peak learning rates.
        buffers: Copies of the model's buffers from before the step, restored if it is bad.
    """
    device, ranks, model, optimizer = context.device, context.ranks, state.model, state.optimizer
    lr = set_learning_rate(optimizer, factor, state.progress.schedule.momentum(state.step))
    optimizer.zero_grad(set_to_none=True)
    num_samples = sum(len(micro.samples) for micro in group) * ranks.size
    sums = _TermSums(model, num_samples, state.loss_scale.value, alone=len(group) == 1 and ranks.size == 1)
    if (stage := context.freezing.stage(state.step)) != state.stage or not model.training:
        context.freezing.apply(model, stage)
        state.stage = stage
    for number, micro in enumerate(group):
        device.seed(derive_seed(_MODEL, context.seed, state.step, ranks.rank, number))
        batch = context.transform.train(device.move(micro.data), epoch=state.progress.epoch, step=state.step,
                                        rank=ranks.rank, micro=number, samples=micro.samples,
                                        closing=state.progress.closing)  # fmt: skip
        with device.autocast():
            terms = context.task.loss(model, batch)
        sums.backward(terms)
    loss, scale = sums.finish(ranks)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) / scale  # unscaled before it is compared with the clip
    bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
    limited = norm
    if context.clip_value > 0:
        limited, scale = _clamp(gradients, scale, context.clip_value), torch.ones_like(scale)
    shrink = torch.clamp(context.clip / (limited + 1e-6), max=1.0) if context.clip > 0 else torch.ones_like(norm)
    copies = mask_update(optimizer, scale / shrink, bad, reads_are_free=device.reads_are_free)
    optimizer.step()
    undo_update(optimizer, copies, bad)
    restore_buffers(model, buffers, bad, reads_are_free=device.reads_are_free)
    state.loss_scale.update(bad)
    if state.ema is not None and not state.progress.schedule.is_averaging(state.step):
        state.ema.update(model, state.step, bad, reads_are_free=device.reads_are_free)
    state.progress.step += 1
    samples = np.concatenate([micro.samples for micro in group])
    return StepRecord(state.step, loss, norm, bad, lr, num_samples, samples)


def _clamp(gradients: list[torch.Tensor], scale: torch.Tensor, limit: float) -> torch.Tensor:
    """Unscale the gradients and clamp their elements to ± limit, in place. Returns their norm after it."""
    torch._foreach_div_(gradients, scale)
    torch._foreach_clamp_min_(gradients, -limit)
    torch._foreach_clamp_max_(gradients, limit)
    return torch.nn.utils.get_total_norm(gradients)


class _TermSums:
    """Adds up sums and counts of each term, and their gradients.

    With one micro-batch, or one term, one backward pass is enough: counts known by then, or left for `finish`. Several
    terms over several micro-batches take one backward pass per term, because each is divided by a total of its own that
    is known only at the end.
    """

    def __init__(self, model: torch.nn.Module, num_samples: int, loss_scale: torch.Tensor, *, alone: bool) -> None:
        self._model = model
        self._num_samples = num_samples
        self._loss_scale = loss_scale
        self._alone = alone
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._apart: dict[str, list[torch.Tensor | None]] = {}

    def backward(self, terms: Terms) -> None:
        """Add the terms of one micro-batch and their gradients."""
        for name, (total, count) in terms.items():
            number = _as_number(count, total)
            self._sums[name] = self._sums.get(name, 0) + total.detach()
            self._counts[name] = self._counts.get(name, 0) + number
        if self._alone:
            parts = [total / _divisor(self._counts[name]) for name, (total, _) in terms.items()]
            (torch.stack(parts).sum() * self._loss_scale).backward()
        elif len(terms) == 1:
            ((total,),) = ((t for t, _ in terms.values()),)
            (total / self._num_samples * self._loss_scale).backward()
        else:
            parameters = self._parameters()
            for number_left, (name, (total, _)) in zip(range(len(terms) - 1, -1, -1), terms.items(), strict=True):
                made = torch.autograd.grad(total / self._num_samples * self._loss_scale, parameters,
                                           retain_graph=number_left > 0, allow_unused=True)  # fmt: skip
                held = self._apart.setdefault(name, [None] * len(parameters))
                for place, gradient in enumerate(made):
                    mine = held[place]  # never changed in place: what autograd returned may be shared
                    held[place] = gradient if mine is None else mine if gradient is None else mine + gradient

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self._model.parameters() if p.requires_grad]

    def finish(self, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the number that the gradients must be divided by; both scalars on the device."""
        counts = {name: _divisor(ranks.sum_(count)) for name, count in self._counts.items()}
        loss = torch.stack([ranks.sum_(self._sums[name]) / counts[name] for name in counts]).sum()
        scale = self._loss_scale
        if self._apart:
            weights = {name: self._num_samples / counts[name] for name in counts}
            for number, parameter in enumerate(self._parameters()):
                parts = [g * weights[name] for name in counts if (g := self._apart[name][number]) is not None]
                if parts:  # else it is no part of this loss, and the optimizer passes over it, as with one batch
                    parameter.grad = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
                elif ranks.size > 1:  # another process may have one, and all must add up
                    parameter.grad = torch.zeros_like(parameter)
        elif not self._alone:
            (count,) = counts.values()
            scale = scale * count / self._num_samples
        if ranks.size > 1:
            for parameter in self._parameters():
                if parameter.grad is not None:
                    ranks.sum_(parameter.grad)
        return loss, scale


def _as_number(count: torch.Tensor | int, like: torch.Tensor) -> torch.Tensor:
    """A count as a scalar of the terms' type on their device; a number is filled in there, where a copy would wait for the device."""
    if isinstance(count, torch.Tensor):
        return count.to(like)
    return torch.full((), count, dtype=like.dtype, device=like.device)


def _divisor(count: torch.Tensor) -> torch.Tensor:
    """A count to divide by: 1 where nothing was counted, and so the sum is zero."""
    return torch.where(count == 0, torch.ones_like(count), count)
