"""Build the detector of a plan: family over backbone, as in fcos/mobilenetv2_100."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from goodfit.config.detect import split_model
from goodfit.config.plan import Plan
from goodfit.models.detection.family import Family
from goodfit.models.detection.fcos import Fcos, FcosNetwork
from goodfit.models.detection.pyramid import Pyramid
from goodfit.models.detection.rcnn import Rcnn, RcnnNetwork
from goodfit.models.detection.retinanet import RetinaNet, RetinaNetwork
from goodfit.models.detection.transfer import load_detector, read_detector_card
from goodfit.models.weights import WeightReport, load_weights, weight_file


def family_of(plan: Plan) -> Family:
    """What belongs to the plan's network besides its weights: loss and decoding."""
    return make_family(split_model(plan.model.value)[0], plan.detector.value["levels"])


def make_family(name: str, num_levels: int) -> Family:
    """A family by its name."""
    strides = tuple(8 * 2**level for level in range(num_levels))
    if name == "retinanet":
        return RetinaNet(strides=strides)
    return Fcos(strides=strides) if name == "fcos" else Rcnn(has_masks=name == "maskrcnn")


def make_network(
    family: str, backbone: str, *, num_classes: int, channels: int, convs: int, levels: int, **arguments: Any
) -> nn.Module:
    """A network with random weights; its backbone keeps its whole length until `Pyramid.prune`."""
    pyramid = Pyramid(backbone, channels=channels, num_levels=levels, **arguments)
    if family in ("fasterrcnn", "maskrcnn"):
        return RcnnNetwork(pyramid, num_classes=num_classes, channels=channels, masks=family == "maskrcnn")
    kind = RetinaNetwork if family == "retinanet" else FcosNetwork
    return kind(pyramid, num_classes=num_classes, channels=channels, num_convs=convs)


def build_detector(plan: Plan, class_names: Sequence[str]) -> tuple[nn.Module, WeightReport | None]:
    """The detector of a plan, initialised from its seed, with the pretrained weights of its backbone loaded, or of a whole detector.

    Raises:
        RequestError: the backbone does not fit under a feature pyramid.
        WeightsError: the weights cannot be downloaded, or do not fit.
    """
    family, backbone = split_model(plan.model.value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed.value)
        network: Any = make_network(family, backbone, num_classes=len(class_names), **plan.detector.value)
    if plan.pretrained.value == "false":
        network.pyramid.prune()
        return network, None
    file = weight_file(plan)
    card = read_detector_card(str(file))
    if card is not None:
        network.pyramid.prune()
        return network, load_detector(network, card, class_names)
    report = load_weights(network.pyramid.body, file)
    network.pyramid.prune()
    return network, report
