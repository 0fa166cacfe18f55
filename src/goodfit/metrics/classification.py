"""Metrics of single-label classification, all from a confusion matrix and a sum of losses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution


class ClassificationMeter:
    """Accumulates outputs on their device; nothing is read until `compute`.

    The state is exact: counts are int64, the loss is summed in float64.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._confusion: torch.Tensor | None = None
        self._loss: torch.Tensor | None = None

    def update(self, logits: torch.Tensor, batch: dict[str, Any]) -> None:
        """Add a batch: logits of shape (N, classes), `batch["target"]` int64 of shape (N,)."""
        targets = batch["target"]
        if self._confusion is None:
            self._confusion = torch.zeros(self.num_classes**2, dtype=torch.int64, device=logits.device)
            kind = torch.float32 if logits.device.type == "mps" else torch.float64
            self._loss = torch.zeros((), dtype=kind, device=logits.device)
        assert self._loss is not None
        pairs = targets * self.num_classes + logits.argmax(dim=1)
        self._confusion += torch.bincount(pairs, minlength=self.num_classes**2)
        losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        self._loss += losses.to(self._loss.dtype).sum()

    def merge(self, states: list[dict[str, Any]]) -> None:
        """Replace the state by the sum of the states of several meters."""
        confusion = sum(torch.tensor(s["confusion"], dtype=torch.int64) for s in states)
        assert isinstance(confusion, torch.Tensor)
        self._confusion = confusion
        self._loss = torch.tensor(math.fsum(s["loss"] for s in states), dtype=torch.float64)

    def state(self) -> dict[str, Any]:
        """The accumulated counts as plain values, for merging and saving."""
        confusion = self.confusion()
        return {"confusion": confusion.ravel().tolist(), "loss": float(self._loss) if self._loss is not None else 0.0}

    def confusion(self) -> npt.NDArray[np.int64]:
        """Counts by true class (rows) and predicted class (columns). Shape (classes, classes)."""
        if self._confusion is None:
            return np.zeros((self.num_classes, self.num_classes), np.int64)
        return self._confusion.cpu().numpy().reshape(self.num_classes, self.num_classes)

    def compute(self) -> dict[str, float]:
        """Mean cross-entropy (without smoothing), accuracy and macro F1, as fractions."""
        confusion = self.confusion()
        total = int(confusion.sum())
        if total == 0:
            return {"loss": math.nan, "accuracy": math.nan, "macro_f1": math.nan}
        assert self._loss is not None
        return {
            "loss": float(self._loss) / total,
            "accuracy": float(np.trace(confusion)) / total,
            "macro_f1": float(np.mean([row["f1"] for row in per_class(confusion) if row["count"]])),
        }


def per_class(confusion: npt.NDArray[np.int64]) -> list[dict[str, float]]:
    """Precision, recall, F1 and number of samples of each class; 0 where undefined."""
    rows = []
    for c in range(len(confusion)):
        hits, true, predicted = int(confusion[c, c]), int(confusion[c].sum()), int(confusion[:, c].sum())
        precision, recall = hits / predicted if predicted else 0.0, hits / true if true else 0.0
        f1 = 2 * hits / (true + predicted) if true + predicted else 0.0
        rows.append({"precision": precision, "recall": recall, "f1": f1, "count": true})
    return rows


def wilson_interval(hits: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927); holds its level also near 0 and 1, unlike the normal one.

    Raises:
        ValueError: total is not positive.
    """
    if total <= 0:
        raise ValueError("an interval needs at least one sample")
    share = hits / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
