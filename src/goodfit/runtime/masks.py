"""Masks of objects in numpy: cut out of their picture, pasted from a network's small ones, compared with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SURE = 0.5  # probability from which a pixel belongs to an object
MAX_DIGITS = 7  # of 5 bits each: 35 bits, more than any count of pixels


@dataclass(frozen=True, slots=True)
class CutMask:
    """The part of a picture's mask around one object; all other pixels are background.

    Attributes:
        left, top: Where the part begins, pixels of the picture.
        pixels: bool, shape (height, width) of the part.
    """

    left: int
    top: int
    pixels: npt.NDArray[np.bool_]

    @property
    def area(self) -> int:
        """Pixels of the object."""
        return int(np.count_nonzero(self.pixels))

    def whole(self, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """The mask of a picture of this width and height."""
        made = np.zeros((size[1], size[0]), bool)
        height, width = self.pixels.shape
        made[self.top : self.top + height, self.left : self.left + width] = self.pixels
        return made

    def at(self, x: npt.NDArray[np.int64], y: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """The mask at columns x and rows y of the picture. Shape: (len(y), len(x))."""
        height, width = self.pixels.shape
        columns, rows = x - self.left, y - self.top
        inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None, :]
        if not height or not width:
            return inside
        return inside & self.pixels[np.clip(rows, 0, height - 1)[:, None], np.clip(columns, 0, width - 1)[None, :]]

    def draw(self, x: npt.NDArray[np.int64], y: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        """As `at`, into `out` of shape (len(y), len(x)); only what lies around the object is looked at: a hundred small ones in a picture
        would each take as long as the picture. Columns and rows rise, or fall, throughout."""
        height, width = self.pixels.shape
        columns = np.flatnonzero((x >= self.left) & (x < self.left + width))
        rows = np.flatnonzero((y >= self.top) & (y < self.top + height))
        if len(columns) and len(rows):
            part = out[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            part |= self.pixels[(y[rows] - self.top)[:, None], (x[columns] - self.left)[None, :]]


def cut_mask(mask: npt.NDArray[np.bool_]) -> CutMask:
    """A picture's mask, cut to its object. mask: shape (height, width)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return CutMask(0, 0, np.zeros((0, 0), bool))
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return CutMask(int(columns[0]), int(rows[0]), part.copy())  # a view would keep the whole mask alive


def paste_mask(probabilities: npt.NDArray[np.floating], box: Sequence[float], size: tuple[int, int]) -> CutMask:
    """A network's mask of a box as pixels of the picture: bilinear between the middles of its cells, nothing beyond them.

    Args:
        probabilities: Within the box, shape (M, M).
        box: Left, top, right, bottom in the picture, pixels.
        size: Width and height of the picture.
    """
    left, top = max(0, int(np.floor(box[0]))), max(0, int(np.floor(box[1])))
    right, bottom = min(size[0], int(np.ceil(box[2]))), min(size[1], int(np.ceil(box[3])))
    if right <= left or bottom <= top or box[2] <= box[0] or box[3] <= box[1]:
        return CutMask(0, 0, np.zeros((0, 0), bool))
    cells = len(probabilities)
    ringed = np.pad(probabilities.astype(np.float64), 1)
    across = _weights((np.arange(left, right) + 0.5 - box[0]) / (box[2] - box[0]) * cells + 0.5, cells + 2)
    down = _weights((np.arange(top, bottom) + 0.5 - box[1]) / (box[3] - box[1]) * cells + 0.5, cells + 2)
    return CutMask(left, top, down @ ringed @ across.T >= SURE)


def _weights(places: npt.NDArray[np.floating], cells: int) -> npt.NDArray[np.float64]:
    """What each cell counts at each place, linearly between the two nearest. Shape: (places, cells)."""
    return np.clip(1.0 - np.abs(places[:, None] - np.arange(cells)[None, :]), 0.0, 1.0)


def mask_overlaps(
    found: Sequence[CutMask], there: Sequence[CutMask], crowd: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """Intersection over union of every pair; with a crowd, the share of the found mask that lies in it. Shape: (K, G)."""
    made = np.zeros((len(found), len(there)))
    mine, theirs = [m.area for m in found], [m.area for m in there]
    first, second = _corners(found), _corners(there)
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    for k, g in np.argwhere((low < high).all(axis=2)):  # of hundreds each, few meet
        shared = _shared(found[k], there[g])
        union = mine[k] if crowd[g] else mine[k] + theirs[g] - shared
        made[k, g] = shared / union if union else 0.0
    return made


def _corners(masks: Sequence[CutMask]) -> npt.NDArray[np.int64]:
    """Left, top, right and bottom of the parts that are drawn. Shape: (K, 4)."""
    return np.array(
        [(m.left, m.top, m.left + m.pixels.shape[1], m.top + m.pixels.shape[0]) for m in masks], np.int64
    ).reshape(-1, 4)


def _shared(one: CutMask, other: CutMask) -> int:
    left, top = max(one.left, other.left), max(one.top, other.top)
    right = min(one.left + one.pixels.shape[1], other.left + other.pixels.shape[1])
    bottom = min(one.top + one.pixels.shape[0], other.top + other.pixels.shape[0])
    if right <= left or bottom <= top:
        return 0
    first = one.pixels[top - one.top : bottom - one.top, left - one.left : right - one.left]
    second = other.pixels[top - other.top : bottom - other.top, left - other.left : right - other.left]
    return int(np.count_nonzero(first & second))


def as_rle(mask: CutMask, size: tuple[int, int]) -> dict[str, object]:
    """A mask of a picture of this width and height as COCO's compressed run lengths: `size` (height, width) and `counts`."""
    width, height = size
    part = mask.pixels
    if not part.size:
        return {"size": [height, width], "counts": encode_counts(np.array([width * height], np.int64)).decode("ascii")}
    # each column of the cut-out between a row of background above and one below: where its runs begin and end
    ringed = np.pad(part, ((1, 1), (0, 0))).astype(np.int8)
    columns, rows = np.nonzero(np.diff(ringed, axis=0).T)
    places = (mask.left + columns) * height + mask.top + rows  # begins and ends in turn, column by column
    apart = np.flatnonzero(places[1:-1:2] == places[2::2])  # a run to a picture's lower edge goes on in the next column
    places = np.delete(places, np.concatenate([2 * apart + 1, 2 * apart + 2]))
    edges = np.concatenate([[0], places, [width * height]])
    runs = np.diff(edges).astype(np.int64)
    runs = runs[:-1] if runs[-1] == 0 else runs
    return {"size": [height, width], "counts": encode_counts(runs).decode("ascii")}


def run_lengths(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Pixels of background and object in turn, column by column, beginning with background. mask: shape (height, width)."""
    flat = mask.ravel(order="F")
    edges = np.concatenate([[0], np.flatnonzero(np.diff(flat.view(np.int8))) + 1, [len(flat)]])
    runs = np.diff(edges).astype(np.int64)
    return np.concatenate([[0], runs]) if len(flat) and flat[0] else runs


def encode_counts(runs: npt.NDArray[np.int64]) -> bytes:
    """Run lengths as COCO's compressed string (see data/masks.py)."""
    rest = runs.copy()
    rest[3:] -= runs[1:-2]
    digits = np.zeros((len(runs), MAX_DIGITS), np.uint8)
    used = np.zeros((len(runs), MAX_DIGITS), bool)
    more = np.ones(len(runs), bool)
    for place in range(MAX_DIGITS):
        used[:, place] = more
        digit = rest & 31
        rest = rest >> 5
        more = more & np.where(digit & 16, rest != -1, rest != 0)
        digits[:, place] = digit + 32 * more + 48
    return digits[used].tobytes()
