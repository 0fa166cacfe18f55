"""SSDLite (Liu et al. 2016, Sandler et al. 2018): torchvision's light heads over a feature pyramid; the fastest family on a processor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from goodfit.models.detection.family import OneStage, Shape, Terms, cut_at_edges, listed
from goodfit.models.detection.pyramid import Pyramid
from goodfit.models.detection.retinanet import decoded, level_anchors
from goodfit.models.detection.transfer import ClassLayer

ANCHOR = 3.0  # strides: side of a level's smaller anchor; the larger is half an octave above
RATIOS = (0.5, 1.0, 2.0)
MATCHED = 0.5  # IoU with an object from which an anchor answers for it, as the best one of each object always does
NEGATIVES = 3.0  # anchors of background that are learned from, the worst, for one that answers
WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the box coder, torchvision's


class SsdliteNetwork(nn.Module):
    """Images (N, 3, H, W) to `cls_logits` (N, A, 1 + C), the first of which is background, and `bbox_regression` (N, A, 4)."""

    pretrained_cfg = {"classifier": ("pyramid.fpn", "pyramid.more", "head")}  # noqa: RUF012  what is new, in timm's words
    backbone_at = "pyramid.body"

    def __init__(self, pyramid: Pyramid, *, num_classes: int, channels: int) -> None:
        super().__init__()
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.ssdlite import SSDLiteHead

        self.pyramid = pyramid
        sizes = tuple((ANCHOR * stride, ANCHOR * stride * 2**0.5) for stride in pyramid.strides)
        self.anchors = AnchorGenerator(sizes, (RATIOS,) * len(sizes))
        each = self.anchors.num_anchors_per_location()
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)  # torchvision's
        self.head = SSDLiteHead([channels] * len(sizes), each, num_classes + 1, norm)
        self.class_layers = tuple(
            ClassLayer(f"head.classification_head.module_list.{level}.1", outer=num, background=True)
            for level, num in enumerate(each)
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The dense outputs, levels one after another."""
        made: dict[str, torch.Tensor] = self.head(self.pyramid(images))
        return made


@dataclass(frozen=True, kw_only=True)
class Ssdlite(OneStage):
    """What belongs to an `SsdliteNetwork` besides its weights. The library divides by the anchors that answer for an object: times
    those it is a sum, and they are the count. As published an image without an object teaches nothing; here it teaches background by as many
    anchors as one that answers brings with it."""

    strides: tuple[int, ...]

    def terms(self, model: nn.Module, outputs: Any, boxes: torch.Tensor, classes: torch.Tensor, shape: Shape) -> Terms:
        """Cross-entropy over what answers and the worst of the background, and smooth L1 loss of the boxes, as torchvision has them."""
        from torchvision.models.detection._utils import BoxCoder, SSDMatcher
        from torchvision.models.detection.ssd import SSD
        from torchvision.ops import box_iou

        outputs = {name: made.float() for name, made in outputs.items()}
        network: Any = model
        anchors = level_anchors(network.anchors, self.strides, shape, boxes.device)
        targets, matcher = listed(boxes, classes, first_class=1), SSDMatcher(MATCHED)
        none = torch.full((len(anchors),), -1, device=boxes.device)
        matched = [matcher(box_iou(t["boxes"], anchors)) if len(t["boxes"]) else none for t in targets]
        library: Any = SimpleNamespace(box_coder=BoxCoder(WEIGHTS), neg_to_pos_ratio=NEGATIVES)
        made = SSD.compute_loss(library, targets, outputs, [anchors] * len(targets), matched)
        count = torch.stack([(m >= 0).sum() for m in matched]).sum()
        empty = outputs["cls_logits"][[number for number, m in enumerate(matched) if m is none]]
        quiet = -empty.log_softmax(dim=2)[..., 0]  # cross-entropy with background
        background = quiet.topk(min(int(NEGATIVES), quiet.shape[1]), dim=1).values.sum()
        return {
            "classes": (made["classification"] * count + background, count),
            "boxes": (made["bbox_regression"] * count, count),
        }

    def decode(self, model: nn.Module, outputs: Any, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes (N, A, 4) and scores (N, A, C)."""
        from torchvision.models.detection._utils import BoxCoder

        network: Any = model
        offsets = outputs["bbox_regression"].float()
        anchors = level_anchors(network.anchors, self.strides, shape, offsets.device)
        boxes = decoded(BoxCoder(WEIGHTS), offsets, anchors)
        return cut_at_edges(boxes, shape), outputs["cls_logits"].float().softmax(dim=-1)[..., 1:]
