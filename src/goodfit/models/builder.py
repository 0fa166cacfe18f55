"""Build the network of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from goodfit.config.plan import Plan
from goodfit.core.errors import RequestError
from goodfit.models.groups import head_prefixes
from goodfit.models.stem import set_stem, split_name
from goodfit.models.weights import WeightReport, load_weights, weight_file


def create(name: str, *, num_classes: int, **arguments: Any) -> nn.Module:
    """A timm network with a new head and random weights (timm's own initialisation), its stem as the name says."""
    import timm

    parts = split_name(name)
    made = timm.create_model(parts.architecture, pretrained=False, num_classes=num_classes, **arguments)
    assert isinstance(made, nn.Module)
    if parts.stem:
        set_stem(made, parts.stem)
    return made


def build_network(plan: Plan, class_names: Sequence[str]) -> tuple[nn.Module, WeightReport | None]:
    """The network of a plan, initialised from its seed, with its pretrained weights loaded.

    Its head is new, but for the classes that the weights know by these names. The caller's random state is left as it was.

    Raises:
        RequestError: the model does not take dropout or drop_path, or this image size.
        WeightsError: the weights cannot be downloaded, or do not fit.
    """
    arguments: dict[str, Any] = {}
    if plan.dropout.value > 0:
        arguments["drop_rate"] = plan.dropout.value
    if plan.drop_path.value > 0:
        arguments["drop_path_rate"] = plan.drop_path.value
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed.value)
        network = create_at_size(plan.model.value, plan.imgsz.value, num_classes=len(class_names), **arguments)
        head = [p for n, p in network.named_parameters() if n.startswith(head_prefixes(network))]
        for parameter in head:  # near-zero logits: the loss starts at chance, ln(classes)
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.01)
            else:
                nn.init.zeros_(parameter)
    report = None
    if plan.pretrained.value != "false":
        report = load_weights(network, weight_file(plan), class_names)
    return network, report


def create_at_size(name: str, imgsz: int, *, num_classes: int, **arguments: Any) -> nn.Module:
    """A timm network for square images of `imgsz` pixels, with random weights.

    Vision transformers are built for one image size and say so by taking `img_size`; others take any.

    Raises:
        RequestError: it does not take these arguments, or this image size.
    """
    try:
        network = create(name, num_classes=num_classes, **arguments)
        config: Any = getattr(network, "pretrained_cfg", None) or {}
        if config.get("fixed_input_size") and config.get("input_size", (3, 0, 0))[-1] != imgsz:
            network = create(name, num_classes=num_classes, img_size=imgsz, **arguments)
    except (TypeError, AssertionError) as error:
        raise RequestError(f"{name} cannot be built with {arguments or imgsz}: {error}.",
                           where="model=", next="leave out dropout=, drop_path= or imgsz=") from error  # fmt: skip
    return network
