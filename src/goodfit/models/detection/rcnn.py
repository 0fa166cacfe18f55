"""Faster R-CNN (Ren et al. 2015) and Mask R-CNN (He et al. 2017): torchvision's two stages over a feature pyramid."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from goodfit.models.detection.choose import Found
from goodfit.models.detection.family import Family, Terms, listed, shape_of, unmoved_random
from goodfit.models.detection.pyramid import Pyramid
from goodfit.models.detection.retinanet import level_anchors
from goodfit.models.detection.transfer import ClassLayer
from goodfit.runtime.detections import Selection

ANCHOR = 2.0  # strides: side of a level's smaller anchors; the larger are half an octave above
RATIOS = (0.5, 1.0, 2.0)
ROI, MASK_ROI = 7, 14  # places that a proposal is read at, each way
PROPOSED = Selection(iou=0.5)  # as torchvision has it: what the second stage finds lies closer than dense guesses
GROUP = 16  # objects whose masks are made at once
WIDTH = 256  # of the fully connected layers: a quarter of the published 1,024, for few classes and little data


class RcnnNetwork(nn.Module):
    """Both stages; what `forward` gives depends on what it is given, as in torchvision."""

    pretrained_cfg = {"classifier": ("pyramid.fpn", "pyramid.more", "rpn", "roi_heads")}  # noqa: RUF012  what is new
    backbone_at = "pyramid.body"

    def __init__(
        self, pyramid: Pyramid, *, num_classes: int, channels: int, num_convs: int, sampled: int, points: int,
        proposals: int, masks: bool,
    ) -> None:  # fmt: skip
        """Of `num_convs` convolutions in the head of masks; learning from `sampled` of an image's `proposals`, finding among all
        of them; each is read at `points` places of a cell each way."""
        super().__init__()
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
        from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
        from torchvision.models.detection.roi_heads import RoIHeads
        from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

        self.pyramid = pyramid
        sizes = tuple((ANCHOR * stride, ANCHOR * stride * 2**0.5) for stride in pyramid.strides)
        anchors = AnchorGenerator(sizes, (RATIOS,) * len(sizes))
        counts = {"training": proposals, "testing": proposals}
        self.rpn = RegionProposalNetwork(
            _Anchors(anchors, pyramid.strides),
            RPNHead(channels, 2 * len(RATIOS)),
            0.7,
            0.3,
            256,
            0.5,
            counts,
            counts,
            0.7,
        )
        layers = [ClassLayer("roi_heads.box_predictor.cls_score", background=True),
                  ClassLayer("roi_heads.box_predictor.bbox_pred", background=True, inner=4)]  # fmt: skip
        if masks:
            layers.append(ClassLayer("roi_heads.mask_predictor.mask_fcn_logits", background=True))
        self.class_layers = tuple(layers)
        mask_parts: dict[str, Any] = {}
        if masks:
            mask_parts = {
                "mask_roi_pool": _roi_align(pyramid.strides, MASK_ROI, points),
                "mask_head": _InGroups(MaskRCNNHeads(channels, (channels,) * num_convs, 1)),
                "mask_predictor": _InGroups(MaskRCNNPredictor(channels, channels, num_classes + 1)),
            }
        self.roi_heads = RoIHeads(
            _roi_align(pyramid.strides, ROI, points), TwoMLPHead(channels * ROI**2, WIDTH), FastRCNNPredictor(WIDTH, num_classes + 1),
            0.5, 0.5, sampled, 0.25, None, 0.01, 0.5, 100, **mask_parts,
        )  # fmt: skip

    def forward(
        self,
        images: torch.Tensor,
        targets: list[dict[str, torch.Tensor]] | None = None,
        *,
        find: Selection | None = None,
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        """The losses where there are targets, and the objects where `find`; the backbone is run once.

        In float32 after the backbone: proposals of half precision are too coarse.
        """
        from torchvision.models.detection.image_list import ImageList

        shape = shape_of(images)
        levels = self.pyramid(images)
        losses: dict[str, torch.Tensor] = {}
        found: list[dict[str, torch.Tensor]] = []
        with torch.autocast(images.device.type, enabled=False):
            maps = OrderedDict((str(k), m.float()) for k, m in enumerate(levels))
            listed_images = ImageList(images, [shape] * len(images))
            if targets is not None:
                with _learning(self.rpn, self.roi_heads):
                    proposals, losses = self.rpn(listed_images, maps, targets)
                    losses = {**losses, **self.roi_heads(maps, proposals, listed_images.image_sizes, targets)[1]}
            if find is not None:
                heads = self.roi_heads
                heads.score_thresh, heads.nms_thresh, heads.detections_per_img = find.threshold, find.iou, find.most
                with _learning(self.rpn, self.roi_heads, learning=False):
                    proposals, _ = self.rpn(listed_images, maps)
                    found = self.roi_heads(maps, proposals, listed_images.image_sizes)[0]
        return losses, found


def _roi_align(strides: Sequence[int], side: int, points: int) -> nn.Module:
    """Reads proposals from the finest four levels, by their strides: torchvision's own guess, from the heights of the first input that
    it sees, takes a stride of 64 for 32 where that input is 32 high, for as long as the process lives."""
    from torchvision.ops import MultiScaleRoIAlign
    from torchvision.ops.poolers import initLevelMapper

    levels = [round(math.log2(stride)) for stride in strides[:4]]
    made = MultiScaleRoIAlign([str(number) for number in range(len(levels))], side, points)
    made.scales = [2.0**-level for level in levels]
    made.map_levels = initLevelMapper(levels[0], levels[-1])
    return made


class _Anchors(nn.Module):
    """The anchors of every image, a stride apart (see `level_anchors`)."""

    def __init__(self, generator: nn.Module, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.generator, self.strides = generator, strides

    def forward(self, images: Any, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One tensor of shape (A, 4) for all images, as torchvision's generator gives each its own. images: an `ImageList`."""
        made = level_anchors(self.generator, self.strides, shape_of(images.tensors), maps[0].device)
        return [made] * len(images.image_sizes)


class _InGroups(nn.Sequential):
    """Layers that see objects in groups of one size where they do not learn, the last filled up: as many objects as are found, another
    number in every picture, would each be a size of their own for the allocator and the library of convolutions, which keep
    something for every size."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__(OrderedDict(layers.named_children()))

    def forward(self, found: torch.Tensor) -> torch.Tensor:
        """What the layers make of each object. found: shape (K, ...)."""
        if self.training or torch.is_grad_enabled() or not len(found):
            return super().forward(found)
        filled = torch.cat([found, found.new_zeros(-len(found) % GROUP, *found.shape[1:])])
        return torch.cat([super(_InGroups, self).forward(part) for part in filled.split(GROUP)])[: len(found)]


@contextmanager
def _learning(*modules: nn.Module, learning: bool = True) -> Iterator[None]:
    """Set what torchvision's two stages look at to know what is wanted of them; modules inside them are left as they are."""
    before = [module.training for module in modules]
    for module in modules:
        module.training = learning
    try:
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.training = was


@dataclass(frozen=True, kw_only=True)
class Rcnn(Family):
    """What belongs to an `RcnnNetwork` besides its weights. The library's terms are means over samples that it draws itself; they
    are taken as means over images of equal weight, so that batches in uneven parts are not exactly one batch."""

    has_masks: bool = False
    exact: bool = False
    exports: bool = False
    selection: Selection = PROPOSED

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        """The terms of both stages."""
        losses, _ = model(batch["image"], self._targets(batch))
        return _weighed(losses, len(batch["image"]))

    def predict(self, model: nn.Module, batch: dict[str, Any], how: Selection) -> tuple[list[Found], Terms]:
        """What the second stage finds, and the terms of both."""
        with unmoved_random(batch["image"].device):  # the library's terms look at samples that it draws
            losses, made = model(batch["image"], self._targets(batch) if "boxes" in batch else None, find=how)
        found = []
        for one in made:
            found.append(
                Found(one["boxes"], one["scores"], one["labels"] - 1, one["masks"][:, 0] if "masks" in one else None)
            )
        return found, _weighed(losses, len(batch["image"]))

    def candidates(self, model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the first stage says of every place: the second's choice of places has no fixed order."""
        network: Any = model
        with torch.autocast(images.device.type, enabled=False):
            objectness, offsets = network.rpn.head([m.float() for m in network.pyramid(images)])
        return tuple(m.flatten(1) for m in (*objectness, *offsets))

    def _targets(self, batch: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
        targets = listed(batch["boxes"], batch["classes"], first_class=1)
        if self.has_masks:
            for target, masks, classes in zip(targets, batch["masks"], batch["classes"], strict=True):
                target["masks"] = _centred(masks[: int((classes >= 0).sum())])
        return targets


def _centred(masks: torch.Tensor) -> torch.Tensor:
    """Masks as the library's loss has to be given them. It reads them without `aligned`: the value of pixel k at the place k, whose
    middle lies at k + 0.5, so that what is learned lies half a pixel too far to the left and up. Each pixel becomes the mean of
    itself and those to its left and above. masks: shape (G, height, width)."""
    # In bytes, and half precision, which has all the quarters: as float32 crowded pictures would hold gigabytes.
    padded = nn.functional.pad(masks, (1, 0, 1, 0))
    return (padded[:, 1:, 1:] + padded[:, :-1, 1:] + padded[:, 1:, :-1] + padded[:, :-1, :-1]).half() / 4


def _weighed(losses: dict[str, torch.Tensor], num: int) -> Terms:
    return {name.removeprefix("loss_"): (mean * num, num) for name, mean in losses.items()}
