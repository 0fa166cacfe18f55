"""The objects of a sample, ready to be learned: boxes in pixels of the upright picture, unusable ones left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError
from goodfit.data.columns import MASK_FILE, POLYGONS
from goodfit.data.index import DatasetIndex
from goodfit.data.masks import cut_polygons, draw_mask
from goodfit.runtime.masks import CutMask, cut_mask

MOST_REPEATS = 10.0  # of a picture with a rare class
BOOK_BYTES = 256 << 20  # of cut-outs, a byte a pixel: those of 100,000 objects of 50 × 50


@dataclass(frozen=True, slots=True)
class SampleObjects:
    """The objects of one picture that the audit kept.

    Attributes:
        boxes: Left, top, right, bottom in pixels, cut at the picture's edges; float64, shape (G, 4).
        classes: int64, shape (G,).
        crowd: bool, shape (G,).
        numbers: Of the objects in the index, int64, shape (G,).
        areas: Square pixels as the annotations state them, NaN where they do not; float64, shape (G,).
    """

    boxes: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]
    numbers: npt.NDArray[np.int64]
    areas: npt.NDArray[np.float64]


def objects_of(index: DatasetIndex, row: int) -> SampleObjects:
    """The objects of a row of an index that was audited."""
    objects, sizes = index.objects, index.sizes
    assert objects is not None and sizes is not None
    part = objects.of(row)
    kept = np.flatnonzero(objects.kept[part])
    size = np.tile(sizes[row].astype(np.float64), 2)
    boxes = objects.boxes[part][kept].astype(np.float64)
    boxes = np.clip(boxes * size if objects.relative else boxes, 0.0, size)
    whole = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    kept = kept[whole]
    areas = np.full(len(kept), np.nan) if objects.areas is None else objects.areas[part][kept]
    return SampleObjects(boxes[whole], objects.classes[part][kept].astype(np.int64), objects.crowd[part][kept],
                         kept + part.start, areas)  # fmt: skip


def object_counts(index: DatasetIndex, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many objects that are no crowds each picture has; none where the data has no objects. Shape: (rows,)."""
    if index.objects is None:
        return np.zeros(len(rows), np.int64)
    learned = index.objects.kept & ~index.objects.crowd
    return np.bincount(index.objects.rows[learned], minlength=len(index))[rows]


def repeat_factors(index: DatasetIndex, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """How often each picture is to come, so that rare classes are seen more: by the rarest class that it shows, the square root of the
    most frequent class's pictures over those of that class, ten at most; 1 for a picture without objects. Shape: (rows,).

    Repeat-factor sampling as of LVIS (Gupta, Dollár and Girshick 2019), with the most frequent class as its threshold.
    """
    objects = index.objects
    assert objects is not None
    learned = objects.kept & ~objects.crowd
    shown = np.zeros((len(index), len(index.class_names)), bool)
    shown[objects.rows[learned], objects.classes[learned]] = True
    shown = shown[rows]
    counts = shown.sum(axis=0)
    factors = np.sqrt(counts.max(initial=1) / np.maximum(1, counts))
    return np.clip(np.where(shown, factors[None, :], 1.0).max(axis=1, initial=1.0), 1.0, MOST_REPEATS)


class MaskBook:
    """The masks of an index's objects in pixels of their upright pictures, drawn when they are needed; the last `BOOK_BYTES` of
    cut-outs are kept."""

    def __init__(self, index: DatasetIndex) -> None:
        self._index = index
        self._kept: dict[int, CutMask] = {}
        self._bytes = 0

    def get(self, row: int, number: int) -> CutMask:
        """The mask of an object of a row; its box, where it has no mask or a damaged one."""
        found = self._kept.get(number)
        if found is None:
            found = self._kept[number] = self._draw(row, number)
            self._bytes += found.pixels.nbytes
            while self._bytes > BOOK_BYTES and len(self._kept) > 1:
                oldest = next(iter(self._kept))  # as good as any: an epoch meets all of them once
                self._bytes -= self._kept.pop(oldest).pixels.nbytes
        return found

    def _draw(self, row: int, number: int) -> CutMask:
        objects, sizes = self._index.objects, self._index.sizes
        assert objects is not None and sizes is not None
        width, height = (int(v) for v in sizes[row])
        scale = (float(width), float(height)) if objects.relative else (1.0, 1.0)
        kind = int(objects.mask_kinds[number])
        try:
            if kind == POLYGONS:
                return cut_polygons(objects.masks[number], (width, height), scale)
            return cut_mask(draw_mask(kind, objects.masks[number], size=(width, height), root=self._index.root))
        except ValueError as error:
            if kind == MASK_FILE:  # as a run begun by an earlier version has it: a box in its place would be learned
                name = objects.masks[number].decode("utf-8", "surrogateescape")
                raise DataError(
                    f"Mask file {name}: {error}", where=str(self._index.root), next="put it back"
                ) from error
            left, top, right, bottom = (
                (objects.boxes[number].astype(np.float64) * np.tile(scale, 2)).round().astype(int).clip(0).tolist()
            )
            return CutMask(
                left, top, np.ones((max(0, min(bottom, height) - top), max(0, min(right, width) - left)), bool)
            )


def padded(
    rows: Sequence[npt.NDArray[Any]], fill: float, dtype: npt.DTypeLike, *, width: tuple[int, ...] = ()
) -> npt.NDArray[Any]:
    """Arrays of unequal length as one, filled up behind. Shape: (N, longest, *width)."""
    longest = max((len(r) for r in rows), default=0)
    made = np.full((len(rows), longest, *width), fill, dtype)
    for number, row in enumerate(rows):
        made[number, : len(row)] = row
    return made
