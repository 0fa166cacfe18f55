"""From candidates to objects on the device: what goodfit.runtime.detections does in numpy, with torchvision's compiled suppression."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from goodfit.runtime.detections import Selection


@dataclass(frozen=True, slots=True)
class Found:
    """The objects of one image, best first.

    Attributes:
        boxes: Left, top, right, bottom in the input, shape (K, 4).
        scores: Shape (K,).
        classes: Shape (K,).
        masks: Probabilities within each box, shape (K, M, M); None without masks.
        candidates: Which of the candidates each was, shape (K,); None where they have no fixed order.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    classes: torch.Tensor
    masks: torch.Tensor | None = None
    candidates: torch.Tensor | None = None


def choose_objects(boxes: torch.Tensor, scores: torch.Tensor, how: Selection) -> Found:
    """The objects among one image's candidates.

    Args:
        boxes: Shape (A, 4).
        scores: Shape (A, classes).
    """
    from torchvision.ops import batched_nms

    flat = scores.flatten()
    found = torch.nonzero(flat > how.threshold).squeeze(1)
    values, order = torch.sort(flat[found], descending=True, stable=True)
    values, order = values[: how.candidates], found[order[: how.candidates]]
    places, classes = torch.div(order, scores.shape[1], rounding_mode="floor"), order % scores.shape[1]
    kept = batched_nms(boxes[places].float(), values.float(), classes, how.iou)[: how.most]
    return Found(boxes[places[kept]], values[kept], classes[kept], candidates=places[kept])
