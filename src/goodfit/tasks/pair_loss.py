"""A loss of (output, target) as a sum and the count that makes it the mean which the loss itself would give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from goodfit.core.errors import RequestError

_CLASSES: tuple[type[nn.Module], ...] = (nn.CrossEntropyLoss, nn.NLLLoss)
_ELEMENTS: tuple[type[nn.Module], ...] = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss,
                                          nn.BCEWithLogitsLoss, nn.SoftMarginLoss, nn.PoissonNLLLoss)  # fmt: skip
_SAMPLES: tuple[type[nn.Module], ...] = (nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss)
_MODULES: dict[Any, type[nn.Module]] = {  # functions that are such modules with their defaults
    nn.functional.cross_entropy: nn.CrossEntropyLoss, nn.functional.nll_loss: nn.NLLLoss,
    nn.functional.mse_loss: nn.MSELoss, nn.functional.l1_loss: nn.L1Loss,
    nn.functional.smooth_l1_loss: nn.SmoothL1Loss, nn.functional.huber_loss: nn.HuberLoss,
    nn.functional.binary_cross_entropy: nn.BCELoss,
    nn.functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    nn.functional.soft_margin_loss: nn.SoftMarginLoss, nn.functional.poisson_nll_loss: nn.PoissonNLLLoss,
    nn.functional.multi_margin_loss: nn.MultiMarginLoss,
}  # fmt: skip


class PairLoss:
    """A loss of (output, target) that the step can add up over micro-batches and processes.

    torch's own losses are summed and divided by their own count: class weights and ignored targets, elements, or samples.
    The mean that any other function gives is weighted by the number of samples, which is the same only if it is a mean
    over samples. `exact` says which of the two it is.

    Args:
        loss: A loss of torch.nn or torch.nn.functional with reduction="mean", or any function that returns a mean.

    Raises:
        RequestError: it cannot be used so.
    """

    def __init__(self, loss: Callable[..., Any]) -> None:
        made: Any = _MODULES[loss]() if getattr(loss, "__hash__", None) is not None and loss in _MODULES else loss
        self.name = repr(loss) if isinstance(loss, nn.Module) else getattr(loss, "__qualname__", type(loss).__name__)
        if not callable(loss) or isinstance(loss, type):
            what = f"the class {loss.__name__}" if isinstance(loss, type) else f"of type {type(loss).__name__}"
            hint = (
                f"loss={loss.__name__}()"
                if isinstance(loss, type)
                else "pass a loss of torch.nn, or a function of (output, target)"
            )
            raise RequestError(f"loss= is {what}, not a loss.", next=hint)
        if isinstance(made, nn.Module) and any(True for _ in made.parameters()):
            raise RequestError(f"The loss {type(made).__name__} has parameters of its own, which would not be trained.",
                               next="make it part of the module, and pass step_loss=")  # fmt: skip
        reduction = getattr(made, "reduction", "mean")
        if reduction != "mean":
            raise RequestError(f"The loss has reduction={reduction!r}; a mean is needed, so that the learning rate does not "
                               "depend on the batch.", next="use reduction='mean'")  # fmt: skip
        self._kind = type(made) if type(made) in (*_CLASSES, *_ELEMENTS, *_SAMPLES) else None
        self.exact = self._kind is not None
        self.takes_logits = self._kind is nn.CrossEntropyLoss
        self.ignored = int(getattr(made, "ignore_index", -100))
        self._loss: Any = copy.deepcopy(made) if self.exact else made
        if self.exact:
            self._loss.reduction = "sum"

    def __call__(self, output: Any, target: Any, num: int) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Sum and count over a batch of `num` samples.

        Raises:
            RequestError: it returned something else than a mean, or would compare every output with every target.
        """
        if isinstance(self._loss, nn.Module) and isinstance(output, torch.Tensor):
            self._loss.to(output.device)  # class weights
        if self._kind in _ELEMENTS and output.shape != target.shape:
            raise RequestError(f"The loss compares outputs of shape {tuple(output.shape)} with targets of shape "
                               f"{tuple(target.shape)}: torch would compare every output with every target.",
                               next="make the shapes equal, as by target.unsqueeze(1) or output.squeeze(1)")  # fmt: skip
        value = self._loss(output, target)
        if not isinstance(value, torch.Tensor) or value.ndim:
            what = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            )
            raise RequestError(f"The loss returned {what}, not a mean over the batch.",
                               next="return a scalar tensor, or pass step_loss= for anything else")  # fmt: skip
        if not self.exact:
            return value * num, num
        return value, self._count(output, target)

    def _count(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor | int:
        if self._kind in _ELEMENTS:
            return output.numel()
        if self._kind in _SAMPLES:
            return len(output)
        if target.is_floating_point():  # shares of classes
            return output.numel() // output.shape[1]
        kept = target != self.ignored
        weight = self._loss.weight
        return kept.sum() if weight is None else (weight[torch.where(kept, target, 0)] * kept).sum()
