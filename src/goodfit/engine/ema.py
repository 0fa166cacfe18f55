"""The exponential moving average of the weights (Polyak and Juditsky 1992), with a warm-up of its decay."""

from __future__ import annotations

import copy

import torch
from torch import nn

UPDATES = 10  # of the average in one horizon: each takes 1.2 % of a step of resnet18 on two cores ...
MOST_STEPS = 16  # ... and at least once in as many steps
HORIZON_SHARE = 0.05  # averages over this share of the run ...
HORIZON_EPOCHS = 5  # ... but not over more epochs than this, as most runs stop before their budget ends


def ema_decay(total_steps: int, steps_per_epoch: int) -> float:
    """The decay whose horizon, 1 / (1 - decay) steps, is 5 % of the run and at most 5 epochs; at least 10 steps."""
    horizon = max(10.0, min(HORIZON_SHARE * total_steps, float(HORIZON_EPOCHS * steps_per_epoch)))
    return 1 - 1 / horizon


class Ema:
    """A copy of a model whose weights follow the trained ones slowly; buffers of floats (batch-norm statistics) too. Other buffers are
    copied, and those that are not finite at the start: between two infinities of a mask lies no number.

    The decay of a step t is min(decay, (1 + t) / (10 + t)), so that the random start is soon forgotten. The average moves
    every `every` steps, by the decay of as many: ten times in a horizon, and at least every 16 steps. Over the first `every` steps it moves
    at each, as a run that ends within them would otherwise be judged by the weights that it began with.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.every = min(MOST_STEPS, max(1, round(1 / (1 - decay) / UPDATES)))
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._moves = [b.is_floating_point() and bool(torch.isfinite(b).all()) for b in model.buffers()]

    def update(self, model: nn.Module, step: int, bad: torch.Tensor, *, reads_are_free: bool) -> None:
        """Move towards the model's weights, except where `bad` (bool scalar on the device) is true."""
        every = self.every if step >= self.every else 1
        if (step + 1) % every:
            return
        share = 1 - min(self.decay, (1 + step) / (10 + step)) ** every
        if reads_are_free and bool(bad):
            return
        with torch.no_grad():
            averages, values = self._floats(self.model), self._floats(model)
            if reads_are_free:
                torch._foreach_lerp_(averages, values, share)
            else:  # the mask stays on the device: a skipped step moves nothing
                steps = torch._foreach_sub(values, averages)
                torch._foreach_mul_(steps, torch.where(bad, 0.0, share))
                torch._foreach_add_(averages, steps)
            for mine, other, moves in zip(self.model.buffers(), model.buffers(), self._moves, strict=True):
                if not moves:
                    mine.copy_(other)

    def _floats(self, model: nn.Module) -> list[torch.Tensor]:
        buffers = [b for b, moves in zip(model.buffers(), self._moves, strict=True) if moves]
        return [p.detach() for p in model.parameters()] + buffers
