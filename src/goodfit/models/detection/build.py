"""Build the detector of a plan: family over backbone, as in fcos/mobilenetv2_100, or one that transformers builds, as in detr/FOLDER."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from goodfit.config.detect import SAMPLED
from goodfit.config.detector import split_model
from goodfit.config.plan import Plan
from goodfit.models.detection.detr import Detr, DetrNetwork
from goodfit.models.detection.detr_source import load_detr
from goodfit.models.detection.family import Family
from goodfit.models.detection.fcos import Fcos, FcosNetwork
from goodfit.models.detection.pyramid import Pyramid
from goodfit.models.detection.rcnn import Rcnn, RcnnNetwork
from goodfit.models.detection.retinanet import RetinaNet, RetinaNetwork
from goodfit.models.detection.ssdlite import Ssdlite, SsdliteNetwork
from goodfit.models.detection.transfer import load_detector, read_detector_card
from goodfit.models.weights import WeightReport, load_weights, weight_file


def family_of(plan: Plan) -> Family:
    """What belongs to the plan's network besides its weights: loss and decoding."""
    masks = plan.task.value == "segment"
    return make_family(split_model(plan.model.value)[0], plan.detector.value.get("levels", 0), masks=masks)


def make_family(name: str, num_levels: int, *, masks: bool = False) -> Family:
    """A family by its name."""
    if name == "detr":
        return Detr(has_masks=masks, exports=not masks)
    strides = tuple(8 * 2**level for level in range(num_levels))
    if name in ("retinanet", "ssdlite"):
        return (RetinaNet if name == "retinanet" else Ssdlite)(strides=strides)
    return Fcos(strides=strides) if name == "fcos" else Rcnn(has_masks=name == "maskrcnn")


def make_network(family: str, backbone: str, *, num_classes: int, masks: bool = False, **detector: Any) -> nn.Module:
    """A network with random weights; a timm backbone keeps its whole length until `Pyramid.prune`.

    Args:
        detector: As the plan has it: `config` of a detector of transformers; of the others `channels`, `convs` and `levels`, of two
            stages `sampled`, `points` and `proposals` too, which plans of earlier versions do not all have.
    """
    if family == "detr":
        return DetrNetwork(detector["config"], num_classes=num_classes, masks=masks)
    return _over_pyramid(family, backbone, num_classes, **detector)


def _over_pyramid(
    family: str, backbone: str, num_classes: int, *, channels: int, convs: int, levels: int, sampled: int = SAMPLED, points: int = 2,
    proposals: int = 500,
) -> nn.Module:  # fmt: skip
    pyramid = Pyramid(backbone, channels=channels, num_levels=levels)
    if family in ("fasterrcnn", "maskrcnn"):
        return RcnnNetwork(pyramid, num_classes=num_classes, channels=channels, num_convs=convs, sampled=sampled, points=points,
                           proposals=proposals, masks=family == "maskrcnn")  # fmt: skip
    if family == "ssdlite":
        return SsdliteNetwork(pyramid, num_classes=num_classes, channels=channels)
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
        network: Any = make_network(family, backbone, num_classes=len(class_names), masks=plan.task.value == "segment",
                                    **plan.detector.value)  # fmt: skip
    whole = family == "detr"
    if plan.pretrained.value == "false":
        if not whole:
            network.pyramid.prune()
        return network, None
    file = weight_file(plan)
    card = read_detector_card(str(file))
    if card is not None:
        if not whole:
            network.pyramid.prune()
        return network, load_detector(network, card, class_names)
    if whole:
        return network, load_detr(network, plan, class_names)
    report = load_weights(network.pyramid.body, file)
    network.pyramid.prune()
    return network, report
