"""FCOS (Tian et al. 2019): torchvision's head over a feature pyramid; one guess per place, no anchors to choose.

Matching, losses and decoding are torchvision's (models/detection/fcos.py), with sums and counts in place of means, so that
batches in parts add up; tests hold them equal to the library's. One thing is added: long thin objects are learned (`Fcos.thin`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from goodfit.models.detection.family import OneStage, Shape, Terms, cut_at_edges
from goodfit.models.detection.pyramid import Pyramid
from goodfit.models.detection.transfer import ClassLayer

RADIUS = 1.5  # strides around an object's centre within which places answer for it
EPSILON = 1e-7  # of torchvision
FAR = 8.0  # strides: the largest distance to a side that a level answers for; half of it is the smallest, but for the first


class FcosNetwork(nn.Module):
    """Images (N, 3, H, W) to `classes` (N, A, C), logits; `sides` (N, A, 4), distances in strides; `centre` (N, A), logits."""

    pretrained_cfg = {"classifier": ("pyramid.fpn", "pyramid.more", "head")}  # noqa: RUF012  what is new, in timm's words
    backbone_at = "pyramid.body"

    def __init__(self, pyramid: Pyramid, *, num_classes: int, channels: int, num_convs: int) -> None:
        super().__init__()
        from torchvision.models.detection.fcos import FCOSHead

        self.pyramid = pyramid
        self.class_layers = (ClassLayer("head.classification_head.cls_logits"),)
        self.head = FCOSHead(channels, 1, num_classes, num_convs)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The dense outputs, levels one after another."""
        made = self.head(self.pyramid(images))
        return {
            "classes": made["cls_logits"],
            "sides": made["bbox_regression"],
            "centre": made["bbox_ctrness"].squeeze(2),
        }


@dataclass(frozen=True, kw_only=True)
class Fcos(OneStage):
    """What belongs to an `FcosNetwork` besides its weights.

    Attributes:
        strides: Of its levels, pixels.
        radius: See `RADIUS`.
        thin: An object that no place of its level falls into, as happens to every second one of 16 to 1, whose level is that of its
            longer side, is answered for by the next finer level that has a place in it. The library leaves it out.
    """

    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    radius: float = RADIUS
    thin: bool = True

    def places(self, shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where the outputs stand: x and y (A, 2), the stride (A,) and the level (A,) of each.

        A place lies at a corner of its cell, as torchvision has it, and not in the middle. Places are a stride apart, as a convolution's
        are, also where the input is no multiple of it: the library spreads them evenly then, 60 pixels apart for a stride of 64 over 480.
        """
        points, strides, levels = [], [], []
        height, width = shape
        for number, stride in enumerate(self.strides):
            rows, columns = -(-height // stride), -(-width // stride)
            y, x = (torch.arange(count, device=device) * stride for count in (rows, columns))
            y, x = torch.meshgrid(y, x, indexing="ij")
            points.append(torch.stack([x.flatten(), y.flatten()], dim=1))
            strides.append(torch.full((rows * columns,), stride, device=device))
            levels.append(torch.full((rows * columns,), number, device=device))
        return torch.cat(points).float(), torch.cat(strides).float(), torch.cat(levels)

    def terms(
        self,
        model: nn.Module,
        outputs: dict[str, torch.Tensor],
        boxes: torch.Tensor,
        classes: torch.Tensor,
        shape: Shape,
    ) -> Terms:
        """Focal loss over all places; GIoU loss and centredness over those that answer for an object. Each counts by those."""
        del model
        from torchvision.ops import sigmoid_focal_loss

        logits, sides, centre = (outputs[k].float() for k in ("classes", "sides", "centre"))
        points, strides, levels = self.places(shape, logits.device)
        boxes, classes = _at_least_one(boxes.to(logits.dtype), classes)
        matched = torch.stack([self._match(points, strides, levels, b, c) for b, c in zip(boxes, classes, strict=True)])
        answers = (
            matched >= 0
        )  # all places are computed and the others left out after: to pick them would wait for the device
        chosen = matched.clamp(min=0)
        kinds = classes.gather(1, chosen).clamp(min=0)
        targets = nn.functional.one_hot(kinds, logits.shape[2]) * answers.unsqueeze(2)
        focal = sigmoid_focal_loss(logits, targets.to(logits.dtype), reduction="sum")
        size = strides.unsqueeze(1)
        wanted = boxes.gather(1, chosen.unsqueeze(2).expand(-1, -1, 4))
        wanted = torch.where(
            answers.unsqueeze(2), wanted, _as_boxes(points, size.expand(-1, 4))
        )  # any box around the place
        away = torch.cat([points - wanted[..., :2], wanted[..., 2:] - points], dim=2) / size
        overlap = generalized_iou(_as_boxes(points, size * sides), wanted)
        x, y = away[..., [0, 2]], away[..., [1, 3]]
        middle = torch.sqrt((x.amin(2) / x.amax(2)) * (y.amin(2) / y.amax(2)))
        centred = nn.functional.binary_cross_entropy_with_logits(centre, middle, reduction="none")
        # Where nothing is to be found, the library divides by 1. A batch in parts has one count, so 1 would be one too many in
        # each part: the step takes 1 for a count of 0 over all parts.
        count = answers.sum()
        return {
            "classes": (focal, count),
            "boxes": (((1 - overlap) * answers).sum(), count),
            "centre": ((centred * answers).sum(), count),
        }

    def _match(
        self,
        points: torch.Tensor,
        strides: torch.Tensor,
        levels: torch.Tensor,
        boxes: torch.Tensor,
        classes: torch.Tensor,
    ) -> torch.Tensor:
        """The object that each place answers for, -1 for none: the smallest of those whose middle is near and whose sides lie
        at a distance that its level is for. Shape: (A,)."""
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        near = (points[:, None] - middle[None]).abs().amax(2) < self.radius * strides[:, None]
        distances = torch.cat([points[:, None] - boxes[None, :, :2], boxes[None, :, 2:] - points[:, None]], dim=2)
        furthest = distances.amax(2)
        low = torch.where(levels > 0, strides * FAR / 2, torch.zeros_like(strides))
        high = torch.where(levels < len(self.strides) - 1, strides * FAR, torch.full_like(strides, torch.inf))
        near &= (distances.amin(2) > 0) & (furthest > low[:, None]) & (classes >= 0)[None]
        chosen = near & (furthest < high[:, None])
        if self.thin:
            coarsest = torch.where(near, levels[:, None], -1).amax(0)  # each object's, of those up to its own
            chosen |= near & ~chosen.any(0) & (levels[:, None] == coarsest)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        worth = chosen * (1e8 - areas[None])
        best, number = worth.max(dim=1)
        return torch.where(best < 1e-5, -1, number)

    def decode(
        self, model: nn.Module, outputs: dict[str, torch.Tensor], shape: Shape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes in the input (N, A, 4), cut at its edges, and scores (N, A, C): the root of class times centredness."""
        del model
        logits, sides, centre = (outputs[k].float() for k in ("classes", "sides", "centre"))
        points, strides, _ = self.places(shape, logits.device)
        boxes = _as_boxes(points, strides.unsqueeze(1) * sides)
        return cut_at_edges(boxes, shape), torch.sqrt(torch.sigmoid(logits) * torch.sigmoid(centre).unsqueeze(2))


def _as_boxes(points: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """Boxes around points from the distances to the left, top, right and bottom."""
    return torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=-1)


def _at_least_one(boxes: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded objects with one row at least, so that there is something to choose from."""
    if boxes.shape[1]:
        return boxes, classes
    return boxes.new_zeros(len(boxes), 1, 4), classes.new_full((len(classes), 1), -1)


def generalized_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Of pairs of boxes (..., 4), after Rezatofighi et al. 2019: the overlap, less the share of the box around both that neither
    covers. As torchvision's loss has it, which picks by masks and so waits for the device."""
    shared = _area(torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:]))
    union = _area(first[..., :2], first[..., 2:]) + _area(second[..., :2], second[..., 2:]) - shared
    around = _area(torch.minimum(first[..., :2], second[..., :2]), torch.maximum(first[..., 2:], second[..., 2:]))
    return shared / (union + EPSILON) - (around - union) / (around + EPSILON)


def _area(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return (high - low).clamp(min=0.0).prod(dim=-1)
