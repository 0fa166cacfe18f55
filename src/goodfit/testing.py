"""Small real parts to test with: a task of five methods on vectors, and a dataset of pictures that can be learned.

As `httpx.MockTransport`, they are shipped, so that tests of code around goodfit use the same as goodfit's own.

Example:
    >>> from goodfit.testing import make_dataset
    >>> import goodfit
    >>> run = goodfit.train(make_dataset("bars"), epochs=3)  # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from goodfit.metrics.classification import ClassificationMeter

Terms = dict[str, tuple[torch.Tensor, torch.Tensor | int]]


class ToyTask:
    """Classification of vectors, in the five methods that the engine asks of a task.

    Args:
        num_features: Length of a vector.
        num_classes: Classes; a vector of `samples` belongs to the class of its largest among the first features.
    """

    def __init__(self, num_features: int = 8, num_classes: int = 3) -> None:
        if num_features < num_classes:
            raise ValueError("a toy task needs at least as many features as classes")
        self.num_features = num_features
        self.num_classes = num_classes

    def samples(self, num: int, seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Vectors, float32 of shape (num, features), and their classes, int64 of shape (num,)."""
        vectors = np.random.default_rng(seed).standard_normal((num, self.num_features)).astype(np.float32)
        return vectors, vectors[:, : self.num_classes].argmax(axis=1)

    def collate(self, inputs: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """One batch: `x`, float32 of shape (N, features), and `target`, int64 of shape (N,)."""
        return {"x": torch.from_numpy(np.ascontiguousarray(inputs)), "target": torch.from_numpy(targets)}

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        """The summed cross-entropy and the number of samples."""
        logits = model(batch["x"]).float()
        return {"loss": (nn.functional.cross_entropy(logits, batch["target"], reduction="sum"), len(logits))}

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Logits, float32, shape (N, classes)."""
        logits: torch.Tensor = model(batch["x"])
        return logits.float()

    def meter(self) -> ClassificationMeter:
        """An empty meter of loss, accuracy and macro F1."""
        return ClassificationMeter(self.num_classes)

    def describe(self) -> dict[str, Any]:
        """Labels and the losses that a rehearsal compares with."""
        return {
            "task": "toy", "labels": [f"class{k}" for k in range(self.num_classes)], "output": "logits",
            "chance_loss": float(np.log(self.num_classes)), "lowest_loss": 0.0,
        }  # fmt: skip


def make_dataset(root: str | Path, *, per_class: int = 20, classes: int = 3, size: int = 24, seed: int = 0) -> Path:
    """Write class folders of small pictures that can be learned: bright stripes on noise, another slant in every class.

    Args:
        root: The folder to make; it may not exist yet.
        per_class: Pictures in each class.
        classes: Class folders, `class0` on; at most 8.
        size: Side of a picture, pixels.
        seed: Of the noise and of the places of the stripes.

    Returns:
        The folder, for `goodfit.train`.

    Raises:
        FileExistsError: the folder exists.
        ValueError: there are more than 8 classes, or fewer than 2.
    """
    from PIL import Image

    if not 2 <= classes <= 8:
        raise ValueError("from 2 to 8 classes can be drawn")
    root = Path(root)
    root.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    for number in range(classes):
        folder = root / f"class{number}"
        folder.mkdir()
        angle = np.pi * number / classes
        for picture in range(per_class):
            pixels = draw.integers(0, 90, (size, size, 3))
            across = np.cos(angle) * x + np.sin(angle) * y + draw.uniform(0, size / 2)
            pixels[across % (size / 2) < 3] = 230
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{picture:03d}.png")
    return root
