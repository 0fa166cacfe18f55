"""RetinaNet (Lin et al. 2017): torchvision's heads and anchors over a feature pyramid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from goodfit.models.detection.family import OneStage, Shape, Terms, cut_at_edges, listed
from goodfit.models.detection.pyramid import Pyramid
from goodfit.models.detection.transfer import ClassLayer

ANCHOR = 4.0  # strides: side of a level's smallest anchor; two more lie a third and two thirds of an octave above
RATIOS = (0.5, 1.0, 2.0)
FOREGROUND, BACKGROUND = 0.5, 0.4  # IoU with an object from which an anchor answers for it, and below which for none


class RetinaNetwork(nn.Module):
    """Images (N, 3, H, W) to `classes` (N, A, C), logits, and `boxes` (N, A, 4), offsets from the anchors."""

    pretrained_cfg = {"classifier": ("pyramid.fpn", "pyramid.more", "head")}  # noqa: RUF012  what is new, in timm's words
    backbone_at = "pyramid.body"

    def __init__(self, pyramid: Pyramid, *, num_classes: int, channels: int, num_convs: int) -> None:
        super().__init__()
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.retinanet import RetinaNetHead

        self.pyramid = pyramid
        sizes = tuple(tuple(ANCHOR * stride * 2 ** (third / 3) for third in range(3)) for stride in pyramid.strides)
        self.anchors = AnchorGenerator(sizes, (RATIOS,) * len(sizes))
        self.head = RetinaNetHead(channels, self.anchors.num_anchors_per_location()[0], num_classes)
        self.class_layers = (
            ClassLayer("head.classification_head.cls_logits", outer=self.anchors.num_anchors_per_location()[0]),
        )
        for part in (self.head.classification_head, self.head.regression_head):
            part.conv = part.conv[:num_convs]

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The dense outputs, levels one after another."""
        made = self.head(self.pyramid(images))
        return {"cls_logits": made["cls_logits"], "bbox_regression": made["bbox_regression"]}


def level_anchors(anchors: Any, strides: tuple[int, ...], shape: Shape, device: torch.device) -> torch.Tensor:
    """The anchors of an input from torchvision's generator, levels one after another, shape (A, 4).

    They are a stride apart, as a convolution's places are. The generator itself divides the input by the places, which is less than the
    stride where that does not divide the input: 60 pixels for a stride of 64 over 480.
    """
    anchors.set_cell_anchors(torch.float32, device)
    places = [[-(-side // stride) for side in shape] for stride in strides]
    made: torch.Tensor = torch.cat(anchors.grid_anchors(places, [[stride] * 2 for stride in strides]))
    return made


def decoded(coder: Any, offsets: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Boxes (N, A, 4) from offsets (N, A, 4): as one list, as a loop over images would be exported for so many only."""
    made: torch.Tensor = coder.decode_single(offsets.reshape(-1, 4), anchors.repeat(offsets.shape[0], 1))
    return made.view(offsets.shape)


@dataclass(frozen=True, kw_only=True)
class RetinaNet(OneStage):
    """What belongs to a `RetinaNetwork` besides its weights. The library's loss is a mean over images, each divided by the anchors
    that answer for its objects: times the images it is a sum, and they are its count."""

    strides: tuple[int, ...]

    def terms(self, model: nn.Module, outputs: Any, boxes: torch.Tensor, classes: torch.Tensor, shape: Shape) -> Terms:
        """Focal loss of the classes and L1 loss of the boxes, as torchvision has them."""
        from torchvision.models.detection._utils import Matcher
        from torchvision.ops import box_iou

        network: Any = model
        outputs = {name: made.float() for name, made in outputs.items()}
        anchors = level_anchors(network.anchors, self.strides, shape, boxes.device)
        matcher, targets = Matcher(FOREGROUND, BACKGROUND, allow_low_quality_matches=True), listed(boxes, classes)
        matched = [
            matcher(box_iou(t["boxes"], anchors))
            if len(t["boxes"])
            else torch.full((len(anchors),), -1, device=boxes.device)
            for t in targets
        ]
        made = network.head.compute_loss(targets, outputs, [anchors] * len(targets), matched)
        num = len(targets)
        return {"classes": (made["classification"] * num, num), "boxes": (made["bbox_regression"] * num, num)}

    def decode(self, model: nn.Module, outputs: Any, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes (N, A, 4) and scores (N, A, C)."""
        from torchvision.models.detection._utils import BoxCoder

        offsets, logits = outputs["bbox_regression"].float(), outputs["cls_logits"].float()
        network: Any = model
        anchors = level_anchors(network.anchors, self.strides, shape, offsets.device)
        boxes = decoded(BoxCoder(weights=(1.0, 1.0, 1.0, 1.0)), offsets, anchors)
        return cut_at_edges(boxes, shape), torch.sigmoid(logits)
