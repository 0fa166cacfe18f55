"""Build the detector of a plan: family over backbone, as in fcos/mobilenetv2_100."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from goodfit.config.detect import split_model
from goodfit.config.plan import Plan
from goodfit.models.detection.fcos import Fcos, build_fcos
from goodfit.models.weights import WeightReport, load_weights, weight_file


def detector_of(plan: Plan) -> Fcos:
    """What belongs to the plan's network besides its weights: loss and decoding."""
    return Fcos(strides=tuple(8 * 2**level for level in range(plan.detector.value["levels"])))


def build_detector(plan: Plan, class_names: Sequence[str]) -> tuple[nn.Module, WeightReport | None]:
    """The detector of a plan, initialised from its seed, with the pretrained weights of its backbone loaded.

    Raises:
        RequestError: the backbone does not fit under a feature pyramid.
        WeightsError: the weights cannot be downloaded, or do not fit.
    """
    _, backbone = split_model(plan.model.value)
    shape = plan.detector.value
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed.value)
        network = build_fcos(backbone, num_classes=len(class_names), channels=shape["channels"], num_convs=shape["convs"],
                             num_levels=shape["levels"])  # fmt: skip
    report = load_weights(network.pyramid.body, weight_file(plan)) if plan.pretrained.value != "false" else None
    network.pyramid.prune()
    return network, report
