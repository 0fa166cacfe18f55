"""The layers of a network, from its input to its head, and the groups of parameters that an optimizer is given."""

from __future__ import annotations

import fnmatch
import itertools
from dataclasses import dataclass
from typing import Any

from torch import nn

from goodfit.config.plan import Plan

UNDECAYED = "without weight decay"


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that share a peak learning rate and a weight decay.

    `head` marks those of the classifier, which are new more often than not.
    """

    name: str
    names: tuple[str, ...]
    lr: float
    weight_decay: float
    head: bool = False


@dataclass(frozen=True, slots=True)
class Layer:
    """Parameters at one depth of a network.

    Attributes:
        title: What their names begin with.
        names: Of the parameters, in the network's order.
        distance: From the last layer, which is the head's: the exponent of `layer_decay`.
        head: Whether it is the classifier.
    """

    title: str
    names: tuple[str, ...]
    distance: int
    head: bool


def head_prefixes(network: nn.Module) -> tuple[str, ...]:
    """Names that the parameters of the classifier begin with: from timm's own record of it, or of the last child that has
    parameters where there is no record."""
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    classifier = config.get("classifier")
    if not classifier:
        classifier = [name for name, child in network.named_children() if next(child.parameters(), None) is not None][
            -1:
        ]
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return tuple(f"{name}." for name in names)


def layers_of(network: nn.Module) -> tuple[Layer, ...]:
    """The layers of a network from its input to its head, each parameter in one of them.

    By timm's own `group_matcher`, as its layer-wise learning rates take it (Bao et al. 2021, BEiT), with the head apart
    where timm has a last norm beside it. Other networks are cut at their children, in the order in which they were made;
    parameters of the network itself belong to the first.
    """
    depths = _depths(network)
    head, last = head_prefixes(network), max(depths.values(), default=0)
    members: dict[tuple[bool, int], list[str]] = {}
    for name, _ in network.named_parameters():
        is_head = name.startswith(head)
        members.setdefault((is_head, last if is_head else depths[name]), []).append(name)
    return tuple(Layer(_title(names), tuple(names), last - depth, is_head)
                 for (is_head, depth), names in sorted(members.items()))  # fmt: skip


def _depths(network: nn.Module) -> dict[str, int]:
    """The number of each parameter's layer, by its name, from 0 at the input."""
    inner = str(getattr(network, "backbone_at", ""))
    if inner:  # a detector over a backbone: that one's layers, and after them all that is new
        depths = {f"{inner}.{name}": depth for name, depth in _depths(network.get_submodule(inner)).items()}
        last = max(depths.values(), default=0) + 1
        return {name: depths.get(name, last) for name, _ in network.named_parameters()}
    matcher = getattr(network, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        return dict(group_parameters(network, matcher(coarse=False), reverse=True))
    children = [name for name, child in network.named_children() if next(child.parameters(), None) is not None]
    numbers = {name: number for number, name in enumerate(children)}
    return {name: numbers.get(name.split(".")[0], 0) for name, _ in network.named_parameters()}


def _title(names: list[str]) -> str:
    """What the names of a layer begin with, as "conv1, bn1" or "layer2.0"."""
    parts: dict[str, list[list[str]]] = {}
    for name in names:
        first, *rest = name.split(".")
        parts.setdefault(first, []).append(rest[:-1])
    shared = (
        [p[0] for p in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*rests, strict=False))]
        for rests in parts.values()
    )
    return ", ".join(".".join([first, *rest]) for first, rest in zip(parts, shared, strict=True))


def parameter_groups(network: nn.Module, plan: Plan) -> list[ParameterGroup]:
    """Backbone and head, or with `layer_decay` each layer, every one with and without weight decay.

    Vectors (norms, biases) are not decayed, nor what the network itself names in `no_weight_decay`. The head has a rate
    of its own; a layer has the backbone's times `layer_decay` to the power of its distance. Layers come from the last to
    the first, so that the first group's rate is the largest of the backbone, and the head comes at the end.
    """
    layers, share = layers_of(network), plan.layer_decay.value
    head = [
        (layer.title if share < 1 else "head", layer.names, plan.head_lr.value, True) for layer in layers if layer.head
    ]
    body = [layer for layer in layers if not layer.head]
    if share < 1:
        parts = [(b.title, b.names, plan.lr.value * share**b.distance, False) for b in reversed(body)]
    else:
        parts = [("backbone", tuple(name for layer in body for name in layer.names), plan.lr.value, False)]
    exempt = _undecayed(network)
    groups = []
    for title, names, lr, is_head in [*parts, *head]:
        for decayed in (True, False):
            chosen = tuple(name for name in names if (name not in exempt) is decayed)
            if chosen:
                groups.append(ParameterGroup(title if decayed else f"{title} {UNDECAYED}", chosen, lr,
                                             plan.weight_decay.value if decayed else 0.0, is_head))  # fmt: skip
    return groups


def _undecayed(network: nn.Module) -> set[str]:
    """Names of parameters that weight decay leaves alone."""
    inner = str(getattr(network, "backbone_at", ""))
    named: Any = getattr(network.get_submodule(inner), "no_weight_decay", None)
    patterns = [f"{inner}.{name}" if inner else name for name in named()] if callable(named) else []
    return {
        name
        for name, parameter in network.named_parameters()
        if parameter.ndim <= 1 or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    }
