"""What a family of detectors is to the rest of goodfit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from goodfit.models.detection.choose import Found, choose_objects
from goodfit.runtime.detections import Selection

Terms = dict[str, tuple[torch.Tensor, torch.Tensor | int]]
Shape = tuple[int, int]  # height and width of the input


class Family(ABC):
    """The loss and the decoding that belong to a network of some family. No state: all that is learned is in the network.

    Attributes:
        exact: Whether its terms are sums with their counts, so that a batch in parts adds up; where a library gives only means,
            they are means over images of equal weight.
        has_masks: Whether it gives a mask for every object.
        exports: Whether its network becomes ONNX as a whole, from pictures to candidates.
        fixed_batch: Whether that takes one picture at a time, and its candidates have no order that a rounding could not change.
        selection: Which candidates become objects.
    """

    exact: bool = True
    has_masks: bool = False
    exports: bool = True
    fixed_batch: bool = False
    selection: Selection = Selection()

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        """Each term of the loss, from one call of the model.

        `batch`: `image` (N, 3, H, W); `boxes` (N, G, 4) in the input and `classes` (N, G), -1 where there is none; `masks`, for each
        image (its objects, H, W), uint8, for families with masks.
        """

    @abstractmethod
    def predict(self, model: nn.Module, batch: dict[str, Any], how: Selection) -> tuple[list[Found], Terms]:
        """The objects of every image, and the terms of the loss if the batch has targets, from one call of the model."""

    @abstractmethod
    def candidates(self, model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs before anything is chosen, for checks that compare them: each with a row per image."""

    def is_close_call(self, model: nn.Module, images: torch.Tensor) -> bool:
        """Whether some choice between candidates inside the network is up to rounding for one of the images."""
        del model, images
        return False


class OneStage(Family):
    """A network that guesses at fixed places, of which the objects are then chosen."""

    @abstractmethod
    def terms(self, model: nn.Module, outputs: Any, boxes: torch.Tensor, classes: torch.Tensor, shape: Shape) -> Terms:
        """The terms of the loss from the network's outputs.

        Args:
            model: The network, for what it holds besides weights.
            boxes: Left, top, right, bottom in the input, shape (N, G, 4).
            classes: Shape (N, G), -1 where there is no object.
        """

    @abstractmethod
    def decode(self, model: nn.Module, outputs: Any, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes in the input (N, A, 4), cut at its edges, and scores from 0 to 1 (N, A, classes)."""

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        """As `Family` has it."""
        return self.terms(model, model(batch["image"]), batch["boxes"], batch["classes"], shape_of(batch["image"]))

    def predict(self, model: nn.Module, batch: dict[str, Any], how: Selection) -> tuple[list[Found], Terms]:
        """As `Family` has it."""
        outputs, shape = model(batch["image"]), shape_of(batch["image"])
        boxes, scores = self.decode(model, outputs, shape)
        found = [choose_objects(b, s, how) for b, s in zip(boxes, scores, strict=True)]
        return found, self.terms(model, outputs, batch["boxes"], batch["classes"], shape) if "boxes" in batch else {}

    def candidates(self, model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Boxes and scores, as `decode` gives them."""
        return self.decode(model, model(images), shape_of(images))


@contextmanager
def unmoved_random(device: torch.device) -> Iterator[None]:
    """The same random numbers each time, and the generators afterwards as they were: an evaluation is a function of the weights."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.manual_seed(0)
        yield


def shape_of(images: torch.Tensor) -> Shape:
    """Height and width of a batch's input."""
    return int(images.shape[-2]), int(images.shape[-1])


def listed(boxes: torch.Tensor, classes: torch.Tensor, *, first_class: int = 0) -> list[dict[str, torch.Tensor]]:
    """Padded objects as torchvision's detectors take them: `boxes` and `labels` of each image.

    Args:
        first_class: The number of class 0: 1 where 0 is background.
    """
    return [
        {"boxes": b[c >= 0].float(), "labels": c[c >= 0] + first_class} for b, c in zip(boxes, classes, strict=True)
    ]


def cut_at_edges(boxes: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Boxes (..., 4) cut at the edges of the input."""
    limits = torch.tensor([shape[1], shape[0], shape[1], shape[0]], device=boxes.device, dtype=boxes.dtype)
    return torch.minimum(boxes.clamp(min=0.0), limits)
