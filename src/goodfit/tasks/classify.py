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
        class_weights: Weight of each class's samples in the training loss (balance=loss).
        log_prior: Logarithm of each class's share, added to the logits in the training loss, so that the model learns
            what tells the classes apart whatever their number (logit adjustment, Menon et al. 2021; balance=logit).
    """

    def __init__(
        self, class_names: Sequence[str], *, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None,
        log_prior: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        self.class_names = tuple(class_names)
        self.label_smoothing = label_smoothing
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.log_prior = None if log_prior is None else torch.tensor(log_prior, dtype=torch.float32)

    def collate(self, images: npt.NDArray[np.uint8], targets: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """Name the parts of a batch: `image` (uint8, shape (N, 3, S, S)) and `target` (int64, shape (N,))."""
        return {"image": torch.from_numpy(images), "target": torch.from_numpy(targets)}

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        """The summed cross-entropy and what it is divided by: the samples, or their class weights; one call of the model.

        `batch["target"]` is int64 of shape (N,), or class shares of shape (N, classes) after mixup or cutmix.
        """
        logits = model(batch["image"]).float()
        target = batch["target"]
        if self.log_prior is not None:
            self.log_prior = self.log_prior.to(logits.device)  # once: each copy to a GPU waits for it
            logits = logits + self.log_prior
        if self.class_weights is None:
            total = nn.functional.cross_entropy(logits, target, reduction="sum", label_smoothing=self.label_smoothing)
            return {"loss": (total, len(logits))}
        weights = self.class_weights = self.class_weights.to(logits.device)
        if target.ndim == 1:
            target = nn.functional.one_hot(target, len(weights)).to(torch.float32)
        losses = -logits.log_softmax(dim=1)  # of each class that a sample may be of
        if self.label_smoothing:
            losses = torch.lerp(losses, losses.mean(dim=1, keepdim=True), self.label_smoothing)
        shares = target * weights  # a mixed sample is two: each class's share counts by that class's weight
        return {"loss": ((shares * losses).sum(), shares.sum())}

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Logits, float32, shape (N, classes)."""
        logits: torch.Tensor = model(batch["image"])
        return logits.float()

    def meter(self) -> ClassificationMeter:
        """An empty meter of loss, accuracy, macro F1 and the confusion matrix."""
        return ClassificationMeter(len(self.class_names))

    def describe(self) -> dict[str, Any]:
        """The labels and the meaning of the output, and the losses that the rehearsal compares with.

        `chance_loss` is that of a model that knows nothing, ln(classes), or the entropy of the class shares where they
        are added to the logits; `lowest_loss` is the entropy of the smoothed
        targets, which no model can beat.
        """
        num, smoothing = len(self.class_names), self.label_smoothing
        prior = torch.full((num,), -math.log(num)) if self.log_prior is None else self.log_prior
        shares = [1 - smoothing + smoothing / num] + [smoothing / num] * (num - 1)
        return {
            "task": "classify",
            "labels": list(self.class_names),
            "output": "logits",
            "chance_loss": float(-(prior.exp() * prior).sum()),
            "lowest_loss": -sum(s * math.log(s) for s in shares if s > 0),
        }
