"""What does not train, and from which step on it does: a pure function of the step."""

from __future__ import annotations

import fnmatch
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import nn

from goodfit.config.recipe import ALL_BUT_HEAD
from goodfit.core.errors import RequestError
from goodfit.models.groups import Layer, layers_of


@dataclass(frozen=True, slots=True)
class Freezing:
    """Stages of a training, in each of which other parameters are frozen.

    What is frozen gets no gradient, so that an optimizer passes over it, and its moments start when it thaws. A batch norm
    whose own parameters are all frozen computes as in evaluation, and its running statistics stay as they are: with
    another mean and variance the frozen weights would no longer be the pretrained ones. Dropout stays as it is.

    Attributes:
        starts: Steps at which the stages begin, ascending, the first at 0.
        frozen: Names of the parameters that are frozen in each; later stages only thaw.
    """

    starts: tuple[int, ...] = (0,)
    frozen: tuple[frozenset[str], ...] = (frozenset(),)

    def stage(self, step: int) -> int:
        """The number of the stage that a step belongs to."""
        return bisect_right(self.starts, step) - 1

    def thawed(self) -> Freezing:
        """The last stage alone: when all trains that ever will, a step is the dearest."""
        return Freezing((0,), self.frozen[-1:])

    def apply(self, model: nn.Module, stage: int) -> None:
        """Put a model into training mode, with the parameters and batch norms of this stage frozen.

        Parameters that no stage names are left as they are, also where their owner froze them.
        """
        model.train()
        if self.frozen[0]:
            for name, parameter in model.named_parameters():
                if name in self.frozen[0]:
                    parameter.requires_grad_(name not in self.frozen[stage])
        for module in frozen_norms(model).values():
            module.training = False  # not `eval()`: timm puts dropout inside its batch norms


NOTHING = Freezing()


def frozen_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The batch norms of a model in training all of whose own parameters are frozen, by name: their statistics must not
    move, whoever computes them."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                found[name] = module
    return found


def plan_freezing(network: nn.Module, *, freeze: str, unfreeze: str, steps_per_epoch: int) -> Freezing:
    """The stages of a plan for a network.

    Gradual unfreezing thaws from the head down, one layer an epoch (Howard and Ruder 2018, ULMFiT).

    Args:
        freeze: "" for nothing, a number of layers from the input, "all-but-head", or patterns of parameter names joined by
            commas, in which * and ? stand for anything; the name of a module means all below it.
        unfreeze: "never", "gradual", or after how many epochs all trains.

    Raises:
        RequestError: there are fewer layers, a pattern names nothing, or nothing would be left to train.
    """
    if not freeze:
        return NOTHING
    layers = layers_of(network)
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    frozen = frozenset(_names_to_freeze(layers, freeze) & trainable)
    if frozen == trainable:
        raise RequestError(f"freeze={freeze} leaves nothing to train.", where="freeze=", next=_existing(layers))
    if unfreeze == "never":
        return Freezing((0,), (frozen,))
    if unfreeze != "gradual":
        return Freezing((0, max(1, round(float(unfreeze) * steps_per_epoch))), (frozen, frozenset()))
    stages = [frozen]
    for layer in reversed(layers):
        left = stages[-1].difference(layer.names)
        if left != stages[-1]:
            stages.append(left)
    return Freezing(tuple(epoch * steps_per_epoch for epoch in range(len(stages))), tuple(stages))


def _names_to_freeze(layers: tuple[Layer, ...], freeze: str) -> set[str]:
    body = [layer for layer in layers if not layer.head]
    if freeze == ALL_BUT_HEAD:
        if len(body) == len(layers):
            raise RequestError("This network has no head that is known.", where="freeze=", next=_existing(layers))
        return {name for layer in body for name in layer.names}
    if freeze.isdigit():
        if int(freeze) > len(body):
            raise RequestError(f"freeze={freeze}: there are {len(body)} layers before the head.", where="freeze=",
                               next=_existing(layers))  # fmt: skip
        return {name for layer in body[: int(freeze)] for name in layer.names}
    names = [name for layer in layers for name in layer.names]
    found: set[str] = set()
    for pattern in (part.strip() for part in freeze.split(",")):
        matched = {n for n in names if fnmatch.fnmatchcase(n, pattern) or n.startswith(f"{pattern}.")}
        if not matched:
            raise RequestError(f"freeze={pattern} matches no parameter.", where="freeze=", next=_existing(layers))
        found |= matched
    return found


def _existing(layers: tuple[Layer, ...]) -> str:
    titles = (f"{number} {layer.title}" for number, layer in enumerate(layers, start=1) if not layer.head)
    head = "".join(f"; the head is {layer.title}" for layer in layers if layer.head)
    return f"there are these layers, from the input: {', '.join(titles)}{head}"
