"""Muon: momentum whose update is made orthogonal, for the matrices of a network; AdamW for all else."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

BETAS = (0.9, 0.999)  # of the AdamW part, as where it is used alone
EPS = 1e-8
# Of a quintic Newton-Schulz iteration that is steepest at zero (Jordan 2024): five turns bring singular values near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TURNS = 5
SMALLEST_NORM = 1e-7
MATCH_ADAMW = 0.2  # usual root mean square of an AdamW update, over its learning rate (Liu et al. 2025)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) in the groups whose `matrix` is true, AdamW (torch's own) in the others.

    A convolution kernel is the matrix of its output channels by all the rest. Updates have the root mean square of
    AdamW's (Liu et al. 2025), so that one learning rate and one decoupled weight decay serve both.

    Args:
        rows: Parameter groups with `matrix`, `lr` and `weight_decay`.
        momentum: Of the matrices, in Nesterov's form.
        capturable: Keep AdamW's step counts on the device.
    """

    def __init__(self, rows: list[dict[str, Any]], *, momentum: float, capturable: bool) -> None:
        defaults = {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, "betas": BETAS, "matrix": False,
                    "capturable": capturable}  # fmt: skip
        super().__init__(rows, defaults)

    def step(self, closure: None = None) -> None:  # noqa: ARG002
        """Update every parameter that has a gradient. The state must be there: momentum_buffer of a matrix; step,
        exp_avg and exp_avg_sq of any other parameter."""
        with torch.no_grad():
            for group in self.param_groups:
                parameters = [p for p in group["params"] if p.grad is not None]
                if group["matrix"]:
                    for parameter in parameters:
                        self._update_matrix(parameter, group)
                elif parameters:
                    self._update_others(parameters, group)

    def _update_others(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in parameters]
        adamw(
            parameters, [p.grad for p in parameters], [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states],
            [], [s["step"] for s in states], foreach=True, capturable=group["capturable"], amsgrad=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=EPS,
            maximize=False,
        )  # fmt: skip

    def _update_matrix(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        gradient, momentum = parameter.grad, group["momentum"]
        assert gradient is not None
        buffer = self.state[parameter]["momentum_buffer"]
        buffer.lerp_(gradient, 1 - momentum)
        update = orthogonalise(gradient.lerp(buffer, momentum).reshape(len(parameter), -1))
        scale = MATCH_ADAMW * math.sqrt(max(update.shape))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.view(parameter.shape), alpha=-group["lr"] * scale)


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with the singular vectors of the given one, and singular values between about 0.7 and 1.2.

    In bfloat16, as all published figures: the iteration tolerates it. The arithmetic is that of torch.optim.Muon.

    Args:
        matrix: Floating point, shape (out, rest).

    Returns:
        bfloat16, same shape.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.size(0) > matrix.size(1)
    found = matrix.bfloat16()
    found = found.T if tall else found
    found = found / found.norm().clamp(min=SMALLEST_NORM)  # so no singular value is above 1
    for _ in range(TURNS):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T.contiguous() if tall else found


def matrix_names(network: nn.Module) -> set[str]:
    """Names of the parameters that are matrices: of linear, recurrent and attention layers, and of convolutions.

    Embeddings of tokens and positions are not, whatever their shape; nor are grouped convolutions (depthwise ones among
    them), whose rows stand for filters of different channels.
    """
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase)
    return {
        f"{path}.{name}" if path else name
        for path, module in network.named_modules()
        if isinstance(module, kinds) and getattr(module, "groups", 1) == 1
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1 and not name.startswith("bias")
    }
