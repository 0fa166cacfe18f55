"""Object detection: a box and a class for every object in an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from goodfit.metrics.detection import DetectionMeter
from goodfit.runtime.detections import Selection

Terms = dict[str, tuple[torch.Tensor, torch.Tensor | int]]
Arrays = Mapping[str, npt.NDArray[Any]]


class Detector(Protocol):
    """What a family of networks adds to its weights."""

    @property
    def exact(self) -> bool: ...

    def loss(self, outputs: Any, boxes: torch.Tensor, classes: torch.Tensor, shape: tuple[int, int]) -> Terms: ...

    def decode(self, outputs: Any, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]: ...


class DetectTask:
    """The loss and the decoding of a family of detectors.

    Args:
        class_names: Labels, in the order of the targets.
        detector: The family's.
        selection: Which candidates become objects; the same in the bundle.
    """

    def __init__(self, class_names: Sequence[str], detector: Detector, *, selection: Selection | None = None) -> None:
        self.class_names = tuple(class_names)
        self.detector = detector
        self.selection = selection or Selection()

    def collate(self, images: npt.NDArray[np.uint8], targets: Arrays) -> dict[str, torch.Tensor]:
        """Name the parts of a batch.

        `image`: uint8, (N, 3, H, W). `boxes`: float32, (N, G, 4), in the input; `classes`: int64, (N, G), -1 where an image
        has fewer than G objects. For evaluation also what a `DetectionMeter` needs: `true_boxes`, `true_classes`, `crowd`,
        `place` and `size`.
        """
        return {
            "image": torch.from_numpy(images),
            **{name: torch.from_numpy(values) for name, values in targets.items()},
        }

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        """The family's terms, each with its count; one call of the model."""
        shape = _shape(batch)
        return self.detector.loss(model(batch["image"]), batch["boxes"], batch["classes"], shape)

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """Objects in the input, best first: `boxes` (N, K, 4), `scores` (N, K), `classes` (N, K), -1 where an image has fewer
        than K; and `terms`, those of the loss."""
        shape, outputs = _shape(batch), model(batch["image"])
        boxes, scores = self.detector.decode(outputs, shape)
        chosen = [select(b, s, self.selection) for b, s in zip(boxes, scores, strict=True)]
        most = max((len(s) for _, s, _ in chosen), default=0)
        made = [(_filled(b, most, 0.0), _filled(s, most, 0.0), _filled(c, most, -1)) for b, s, c in chosen]
        terms = self.detector.loss(outputs, batch["boxes"], batch["classes"], shape)
        return {**{k: torch.stack(v) for k, v in zip(("boxes", "scores", "classes"), zip(*made, strict=True), strict=True)},
                "terms": terms}  # fmt: skip

    def meter(self) -> DetectionMeter:
        """An empty meter of the loss and of average precision."""
        return DetectionMeter(len(self.class_names))

    def describe(self) -> dict[str, Any]:
        """The labels, and what of the outputs becomes an object."""
        return {"task": "detect", "labels": list(self.class_names), "output": "candidates",
                "selection": self.selection.to_dict(), "exact": self.detector.exact}  # fmt: skip

    def dense(self) -> DenseTask:
        """This task before anything is chosen, for checks that compare outputs: a tie must not turn into a difference."""
        return DenseTask(self.class_names, self.detector, selection=self.selection)


class DenseTask(DetectTask):
    """Predicts all candidates: `boxes` (N, A, 4), `scores` (N, A, classes)."""

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """Every candidate, in the network's order."""
        boxes, scores = self.detector.decode(model(batch["image"]), _shape(batch))
        return {"boxes": boxes, "scores": scores}


def _shape(batch: dict[str, Any]) -> tuple[int, int]:
    height, width = batch["image"].shape[-2:]
    return int(height), int(width)


def _filled(values: torch.Tensor, length: int, with_: float) -> torch.Tensor:
    made = values.new_full((length, *values.shape[1:]), with_)
    made[: len(values)] = values
    return made


def select(
    boxes: torch.Tensor, scores: torch.Tensor, how: Selection
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The objects among one image's candidates, as goodfit.runtime.detections.select_objects finds them, on the device.

    Args:
        boxes: Shape (A, 4).
        scores: Shape (A, classes).

    Returns:
        Boxes (K, 4), scores (K,) and classes (K,), best first.
    """
    from torchvision.ops import batched_nms

    flat = scores.flatten()
    found = torch.nonzero(flat > how.threshold).squeeze(1)
    values, order = torch.sort(flat[found], descending=True, stable=True)
    values, order = values[: how.candidates], found[order[: how.candidates]]
    places, classes = torch.div(order, scores.shape[1], rounding_mode="floor"), order % scores.shape[1]
    kept = batched_nms(boxes[places].float(), values.float(), classes, how.iou)[: how.most]
    return boxes[places[kept]], values[kept], classes[kept]
