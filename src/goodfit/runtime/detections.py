"""From a detector's dense outputs to objects, in numpy: threshold, the best candidates, suppression of doubles.

The serving path's own, without torch. Training and testing use torchvision's compiled suppression, which must agree (tests).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is kept of a detector's candidates.

    Attributes:
        threshold: Scores at or below it are nothing.
        iou: Of two boxes of one class that overlap by more than this, the worse is a double (greedy non-maximum suppression).
        candidates: So many of the best scores are looked at.
        most: Objects in an image, at most.
    """

    threshold: float = 0.01
    iou: float = 0.6
    candidates: int = 1000
    most: int = 100

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def select_objects(
    boxes: Floats, scores: Floats, how: Selection
) -> tuple[Floats, Floats, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The objects among one image's candidates, best first.

    Args:
        boxes: Left, top, right, bottom of each candidate, shape (A, 4).
        scores: Of each candidate and class, 0 to 1, shape (A, classes).

    Returns:
        Boxes (K, 4), scores (K,), classes (K,), and the candidates (K,) that they come from.
    """
    flat = scores.reshape(-1)
    found = np.flatnonzero(flat > how.threshold)
    order = found[np.argsort(-flat[found], kind="stable")][: how.candidates]
    candidates, classes = np.divmod(order, scores.shape[1])
    kept = suppress_doubles(boxes[candidates], classes, how.iou, how.most)
    return boxes[candidates[kept]], flat[order[kept]], classes[kept], candidates[kept]


def suppress_doubles(
    boxes: Floats, classes: npt.NDArray[np.integer], limit: float, most: int | None = None
) -> npt.NDArray[np.int64]:
    """The rows that are left, in order, when each box removes those after it of its class that overlap it by more than `limit`;
    the first `most` of them.

    Args:
        boxes: Best first, shape (K, 4).
        classes: Shape (K,).
    """
    alive = np.ones(len(boxes), bool)
    kept: list[int] = []
    for number in range(len(boxes)):
        if len(kept) == most:
            break
        if alive[number]:
            kept.append(number)
            rest = np.flatnonzero(alive[number + 1 :] & (classes[number + 1 :] == classes[number])) + number + 1
            alive[rest[box_iou(boxes[number : number + 1], boxes[rest])[0] > limit]] = False
    return np.array(kept, np.int64)


def box_iou(first: Floats, second: Floats) -> npt.NDArray[np.float64]:
    """Intersection over union of every pair of boxes. Shapes: (M, 4), (N, 4) → (M, N)."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    areas = [np.clip(b[:, 2:] - b[:, :2], 0, None).prod(axis=1) for b in (first, second)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
