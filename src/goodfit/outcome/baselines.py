"""What a model must beat to have been worth training: the majority class and a linear probe, or boxes that look at no picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from goodfit.runtime.detections import box_iou

STRENGTHS = (
    10.0,
    1.0,
    0.1,
    0.01,
    1e-3,
    1e-4,
)  # of the L2 penalty, per sample; strongest first, each warm-starts the next
SEEN_OBJECTS, TRIED_BOXES, CONSTANT_BOXES = 3000, 500, 100  # 1.5 million overlaps: a second
TOLERANCE = 1e-5  # of the gradient's largest entry: converged


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """A linear probe: its predictions on the test split, the chosen strength, and whether the fit converged."""

    predictions: npt.NDArray[np.int64]
    strength: float
    val_accuracy: float
    gradient: float


def majority_class(train_targets: npt.NDArray[np.int64]) -> int:
    """The most frequent class of the training split; the lowest number wins a tie."""
    return int(np.bincount(train_targets).argmax())


def constant_objects(
    boxes: npt.NDArray[np.float64], classes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The boxes that are right most often, whatever the picture: one after another that which lies upon most of the training
    objects that none before it does (an IoU of 0.5, greedy covering).

    Args:
        boxes: Of the training objects, over their picture's sides, shape (G, 4).
        classes: Shape (G,).

    Returns:
        Boxes (K, 4), at most a hundred; the share of the objects that each adds, as its score (K,); classes (K,).
    """
    seen = np.linspace(0, len(boxes) - 1, min(SEEN_OBJECTS, len(boxes))).astype(np.int64)
    tried = seen[np.linspace(0, len(seen) - 1, min(TRIED_BOXES, len(seen))).astype(np.int64)]
    upon = (box_iou(boxes[tried], boxes[seen]) >= 0.5) & (classes[tried][:, None] == classes[seen][None, :])
    chosen: list[int] = []
    scores: list[float] = []
    while len(chosen) < CONSTANT_BOXES and upon.any():
        counts = upon.sum(axis=1)
        best = int(counts.argmax())
        chosen.append(int(tried[best]))
        scores.append(float(counts[best]) / len(seen))
        upon = upon & ~upon[best][None, :]
    rows = np.array(chosen, np.int64)
    return boxes[rows], np.array(scores, np.float64), classes[rows]


def backbone_features(network: nn.Module, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Pooled features before the head, in evaluation mode. Returns float64 on the CPU, shape (samples, features)."""
    model: Any = network
    was_training = network.training
    network.eval()
    with torch.inference_mode():
        made = [model.forward_head(model.forward_features(images), pre_logits=True).flatten(1).cpu().double()
                for images in batches]  # fmt: skip
    network.train(was_training)
    return torch.cat(made).clone()


def linear_probe(
    train: tuple[torch.Tensor, npt.NDArray[np.int64]], val: tuple[torch.Tensor, npt.NDArray[np.int64]],
    test: torch.Tensor, num_classes: int,
) -> ProbeResult:  # fmt: skip
    """Converged L2 logistic regression on frozen features; the strength is chosen by accuracy on the validation split.

    Features are standardised by the training split. The fit is L-BFGS with strong Wolfe line search, in float64.
    """
    mean, std = train[0].mean(0), train[0].std(0).clamp(min=1e-6)
    x, x_val, x_test = ((f - mean) / std for f in (train[0], val[0], test))
    y, y_val = torch.from_numpy(train[1]), torch.from_numpy(val[1])
    weight = torch.zeros(x.shape[1], num_classes, dtype=torch.float64)
    bias = torch.zeros(num_classes, dtype=torch.float64)
    best: tuple[tuple[float, float], ProbeResult] | None = None
    for strength in STRENGTHS:
        weight, bias, gradient = _fit(x, y, weight, bias, strength)
        logits = x_val @ weight + bias
        accuracy = float((logits.argmax(1) == y_val).double().mean())
        rank = (accuracy, -float(nn.functional.cross_entropy(logits, y_val)))
        if best is None or rank > best[0]:
            predictions = (x_test @ weight + bias).argmax(1).numpy()
            best = (rank, ProbeResult(predictions, strength, accuracy, gradient))
    assert best is not None
    return best[1]


def _fit(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, strength: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=TOLERANCE, tolerance_change=0.0,
                                  history_size=20, line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight + bias, y) + 0.5 * strength * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    assert weight.grad is not None and bias.grad is not None
    gradient = max(float(weight.grad.abs().max()), float(bias.grad.abs().max()))
    return weight.detach(), bias.detach(), gradient
