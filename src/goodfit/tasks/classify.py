"""Image classification: one class per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from goodfit.metrics.classification import ClassificationMeter

Terms = dict[str, tuple[torch.Tensor, torch.Tensor | int]]


class ClassifyTask:
    """Cross-entropy over classes, with optional label smoothing (Szegedy et al. 2016).

    Args:
        class_names: Labels, in the order of the targets.
        label_smoothing: Share of the target mass spread evenly over all classes, in the training loss only.
    """

    def __init__(self, class_names: Sequence[str], *, label_smoothing: float = 0.0) -> None:
        self.class_names = tuple(class_names)
        self.label_smoothing = label_smoothing

    def collate(self, samples: Sequence[tuple[int, npt.NDArray[np.uint8], int]]) -> dict[str, torch.Tensor]:
        """Stack samples into `image` (uint8, shape (N, 3, S, S)) and `target` (int64, shape (N,))."""
        images = np.stack([pixels for _, pixels, _ in samples])
        targets = np.array([target for _, _, target in samples], np.int64)
        return {"image": torch.from_numpy(images), "target": torch.from_numpy(targets)}

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        """The summed cross-entropy and the number of samples; one call of the model.

        `batch["target"]` is int64 of shape (N,), or class shares of shape (N, classes) after mixup or cutmix.
        """
        logits = model(batch["image"]).float()
        total = nn.functional.cross_entropy(
            logits, batch["target"], reduction="sum", label_smoothing=self.label_smoothing
        )
        return {"loss": (total, len(logits))}

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Logits, float32, shape (N, classes)."""
        logits: torch.Tensor = model(batch["image"])
        return logits.float()

    def meter(self) -> ClassificationMeter:
        """An empty meter of loss, accuracy, macro F1 and the confusion matrix."""
        return ClassificationMeter(len(self.class_names))

    def describe(self) -> dict[str, Any]:
        """The labels and the meaning of the output, and the losses that the rehearsal compares with.

        `chance_loss` is that of a model that knows nothing, ln(classes); `lowest_loss` is the entropy of the smoothed
        targets, which no model can beat.
        """
        num, smoothing = len(self.class_names), self.label_smoothing
        shares = [1 - smoothing + smoothing / num] + [smoothing / num] * (num - 1)
        return {
            "task": "classify",
            "labels": list(self.class_names),
            "output": "logits",
            "chance_loss": math.log(num),
            "lowest_loss": -sum(s * math.log(s) for s in shares if s > 0),
        }
