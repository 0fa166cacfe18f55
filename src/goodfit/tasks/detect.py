"""Object detection and instance segmentation: a box and a class for every object in an image, and a mask where a family gives one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from goodfit.metrics.detection import DetectionMeter
from goodfit.models.detection.choose import Found
from goodfit.models.detection.family import Family, Terms
from goodfit.runtime.detections import Selection

Arrays = Mapping[str, Any]


class DetectTask:
    """The loss and the decoding of a family of detectors.

    Args:
        class_names: Labels, in the order of the targets.
        family: Of the network.
        selection: Which candidates become objects; the same in the bundle. The family's, if None.
    """

    def __init__(self, class_names: Sequence[str], family: Family, *, selection: Selection | None = None) -> None:
        self.class_names = tuple(class_names)
        self.family = family
        self.selection = selection or family.selection

    def collate(self, images: npt.NDArray[np.uint8], targets: Arrays) -> dict[str, torch.Tensor]:
        """Name the parts of a batch.

        `image`: uint8, (N, 3, H, W). `boxes`: float32, (N, G, 4), in the input; `classes`: int64, (N, G), -1 where an image
        has fewer than G objects. For evaluation also what a `DetectionMeter` needs: `true_boxes`, `true_classes`, `crowd`,
        `place` and `size`. With masks: `masks`, for each image uint8 (its objects, H, W), in the input, and `true_masks`, a list of
        `CutMask` for each image.
        """
        return {
            "image": torch.from_numpy(images),
            **{name: _as_tensors(v) for name, v in targets.items()},
        }

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        """The family's terms, each with its count; one call of the model."""
        return self.family.loss(model, batch)

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """Objects in the input, best first: `boxes` (N, K, 4), `scores` (N, K), `classes` (N, K), -1 where an image has fewer
        than K, with `masks`, probabilities within the boxes (N, K, M, M), where the family has some; and `terms`, those of the loss."""
        return self.told(*self.family.predict(model, batch, self.selection))

    def told(self, found: Sequence[Found], terms: Terms) -> dict[str, Any]:
        """What `predict` says of these objects."""
        most = max((len(f.scores) for f in found), default=0)
        made = {
            "boxes": torch.stack([_filled(f.boxes, most, 0.0) for f in found]),
            "scores": torch.stack([_filled(f.scores, most, 0.0) for f in found]),
            "classes": torch.stack([_filled(f.classes, most, -1) for f in found]),
        }
        if self.family.has_masks:
            made["masks"] = torch.stack([_filled(f.masks, most, 0.0) for f in found if f.masks is not None])
        return {**made, "terms": terms}

    def meter(self) -> DetectionMeter:
        """An empty meter of the loss and of average precision."""
        return DetectionMeter(len(self.class_names), masks=self.family.has_masks, most=self.selection.most)

    def keeping(self) -> DetectTask:
        """This task with meters that keep the masks found."""
        return KeepingTask(self.class_names, self.family, selection=self.selection)

    def describe(self) -> dict[str, Any]:
        """The labels, and what of the outputs becomes an object."""
        return {"task": "segment" if self.family.has_masks else "detect", "labels": list(self.class_names), "output": "candidates",
                "selection": self.selection.to_dict(), "exact": self.family.exact,
                "fixed_batch": self.family.fixed_batch}  # fmt: skip

    def dense(self) -> DenseTask:
        """This task before anything is chosen, for checks that compare outputs: a tie must not turn into a difference."""
        return DenseTask(self.class_names, self.family, selection=self.selection)


class KeepingTask(DetectTask):
    """Keeps the masks found, to draw them."""

    def meter(self) -> DetectionMeter:
        """As `DetectTask` has it."""
        return DetectionMeter(len(self.class_names), masks=self.family.has_masks, keep=True, most=self.selection.most)


class DenseTask(DetectTask):
    """Predicts what there is before anything is chosen."""

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """Every candidate, in the network's order."""
        return {str(k): made for k, made in enumerate(self.family.candidates(model, batch["image"]))}


def _as_tensors(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_tensors(v) for v in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _filled(values: torch.Tensor, length: int, with_: float) -> torch.Tensor:
    made = values.new_full((length, *values.shape[1:]), with_)
    made[: len(values)] = values
    return made
