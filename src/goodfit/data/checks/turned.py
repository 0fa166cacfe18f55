"""Annotations of pictures as they lie in their files, before the turn that EXIF asks for: brought to the upright picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from goodfit.data.columns import NO_MASK, POLYGONS, RLE, Blobs, Objects
from goodfit.data.index import DatasetIndex
from goodfit.data.masks import pack_mask, pack_polygons, unpack_polygons, unpack_rle
from goodfit.runtime.images import ImageError, open_image, orientation

BEYOND_SHARE = 0.02  # of such pictures that may have a box beyond their stated size, by mistake
FIRST_QUARTER = (
    5  # EXIF orientations from here on exchange width and height: transposed, turned right, transversed, turned left
)


def turned_rows(index: DatasetIndex, rows: npt.NDArray[np.int64]) -> dict[int, int]:
    """Of rows whose annotation states another size, those whose sides it states the other way round and that EXIF turns by a quarter, with
    its orientation; none, where boxes reach beyond the stated size: some tools state that of the file, and draw upon the upright picture."""
    found: dict[int, int] = {}
    if not len(rows):
        return found
    assert index.objects is not None and index.objects.declared is not None and index.sizes is not None
    for row in rows[(index.objects.declared[rows] == index.sizes[rows][:, ::-1]).all(axis=1)].tolist():
        try:
            turn = orientation(open_image(index.file(row)).getexif)
        except (ImageError, OSError):  # the audit of files tells of it
            continue
        if turn >= FIRST_QUARTER:
            found[row] = turn
    within = {row: turn for row, turn in found.items() if _lies_within(index.objects, row, index.objects.declared[row])}
    return within if len(found) - len(within) <= BEYOND_SHARE * len(found) else {}


def _lies_within(objects: Objects, row: int, size: npt.NDArray[np.float64]) -> bool:
    """Whether all boxes of a row lie within the size that its annotation states."""
    boxes = objects.boxes[objects.of(row)].astype(np.float64)
    boxes = boxes[np.isfinite(boxes).all(axis=1)]
    return bool((boxes <= np.tile(size, 2) + 1.0).all())


def turn_objects(objects: Objects, turns: Mapping[int, int], sizes: npt.NDArray[np.integer]) -> Objects:
    """The objects with the boxes and masks of some rows turned as EXIF turns their pictures.

    Args:
        turns: EXIF orientation, 5 to 8, by row.
        sizes: Width and height of every upright picture, pixels, shape (rows, 2).
    """
    boxes, masks = objects.boxes.astype(np.float64), list(objects.masks)
    for row, turn in turns.items():
        wide, high = (float(side) for side in sizes[row])
        part = objects.of(row)
        corners = _moved(boxes[part].reshape(-1, 2), turn, wide, high).reshape(-1, 2, 2)
        made = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        reversed_ = np.asarray((boxes[part, 2:] < boxes[part, :2]).any(axis=1))  # stay so, for the audit
        boxes[part] = np.where(reversed_[:, None], made[:, [2, 3, 0, 1]], made)
        for number in range(part.start, part.stop):
            masks[number] = _turned_mask(int(objects.mask_kinds[number]), masks[number], turn, wide, high)
    with np.errstate(over="ignore"):
        return replace(objects, boxes=boxes.astype(np.float32), masks=Blobs(masks))


def _moved(points: npt.NDArray[np.float64], turn: int, wide: float, high: float) -> npt.NDArray[np.float64]:
    """Points (x, y) of the file's picture in the upright one, which has this width and height. Shape: (P, 2)."""
    x, y = points[:, 1], points[:, 0]
    return np.stack([wide - x if turn in (6, 7) else x, high - y if turn in (7, 8) else y], axis=1)


def _turned_mask(kind: int, data: bytes, turn: int, wide: float, high: float) -> bytes:
    """A mask's bytes for the upright picture; what is damaged stays so for the audit."""
    if kind == NO_MASK:
        return data
    try:
        if kind == POLYGONS:
            return pack_polygons([_moved(ring.astype(np.float64), turn, wide, high) for ring in unpack_polygons(data)])
        if kind == RLE:
            mask = unpack_rle(data).T
            mask = mask[:, ::-1] if turn in (6, 7) else mask
            return pack_mask(np.ascontiguousarray(mask[::-1] if turn in (7, 8) else mask))
    except ValueError:
        pass
    return data
