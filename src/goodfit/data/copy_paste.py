"""Copy-paste of objects with masks (Ghiasi et al. 2021): some of another picture's objects lie upon this one's, pixels and masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from goodfit.core.random import stream, uniform
from goodfit.data.scenes import LEAST_SIDE, SEEN

_COPIES = stream("scene copies")
TAKEN = 0.5  # of the other picture's objects
_WHETHER, _PARTNER, _CHOICE = 0, 1, 2  # what is drawn


@dataclass(frozen=True, slots=True)
class Drawn:
    """The objects of a drawn input.

    Attributes:
        boxes: Left, top, right, bottom, shape (G, 4).
        classes: Shape (G,).
        masks: uint8, shape (G, height, width).
    """

    boxes: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]
    masks: npt.NDArray[np.uint8]


def partner_of(share: float, *, seed: int, epoch: int, sample: int, rows: npt.NDArray[np.int64]) -> int | None:
    """The row of the picture whose objects a sample gets, None where it gets none.

    Args:
        share: Probability that it gets some.
        rows: Of which the partner is drawn.
    """
    if float(uniform(_COPIES, seed, epoch, sample, _WHETHER)) >= share:
        return None
    return int(rows[int(float(uniform(_COPIES, seed, epoch, sample, _PARTNER)) * len(rows))])


def chosen(num: int, *, seed: int, epoch: int, sample: int) -> npt.NDArray[np.bool_]:
    """Which of the partner's objects are taken. Shape: (num,)."""
    return np.asarray(uniform(_COPIES, seed, epoch, sample, _CHOICE + np.arange(num)) < TAKEN)


def paste_objects(
    pixels: npt.NDArray[np.uint8], under: Drawn, other: npt.NDArray[np.uint8], over: Drawn
) -> Drawn:  # fmt: skip
    """Lay the objects of another input upon one, in place.

    Args:
        pixels, other: Shape (height, width, 3).
        under: What is there; masks lose what is covered, boxes are those of what is left, and an object of which less than a quarter
            of its pixels or less than two pixels of a side is left is none.
        over: What is laid upon it.

    Returns:
        All that is to be seen.
    """
    cover = over.masks.any(axis=0)
    if not cover.any():
        return under
    pixels[cover] = other[cover]
    before = under.masks.sum(axis=(1, 2), dtype=np.int64)
    masks = under.masks * ~cover
    touched = (under.masks & cover).any(axis=(1, 2))
    boxes, kept = under.boxes.copy(), np.ones(len(masks), bool)
    for number in np.flatnonzero(touched):
        boxes[number], kept[number] = what_is_left(masks[number], float(before[number]))
    return Drawn(np.concatenate([boxes[kept], over.boxes]), np.concatenate([under.classes[kept], over.classes]),
                 np.concatenate([masks[kept], over.masks]))  # fmt: skip


def what_is_left(mask: npt.NDArray[np.uint8], before: float) -> tuple[npt.NDArray[np.float64], bool]:
    """The box of what is left of a mask that had so many pixels, and whether that is an object still."""
    box = around(mask)
    return box, int(mask.sum(dtype=np.int64)) >= SEEN * before and float((box[2:] - box[:2]).min()) >= LEAST_SIDE


def around(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """The box of a mask: left, top, right, bottom; zeros of one that is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.zeros(4)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)
