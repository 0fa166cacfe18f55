"""One object's mask as bytes: polygons, run lengths, or the name of a picture; and drawn as pixels.

A pixel belongs to a polygon if its centre lies inside by the even-odd rule, so areas are not biased: a filled disc of
radius 5 px has 1.01 of its true area, where Pillow's polygons, which include their outline, have 1.27.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from goodfit.data.columns import MASK_FILE, POLYGONS, RLE
from goodfit.runtime.images import MAX_PIXELS, ImageError, open_image
from goodfit.runtime.masks import MAX_DIGITS, CutMask, cut_mask, encode_counts, run_lengths

MAX_POINTS = 100_000  # of one object; drawing takes points times rows, and a hand draws some hundred
_MAX_CROSSINGS = 4_000_000  # edges times rows handled at once: 100 MB
_RLE_HEAD = struct.Struct("<II")  # height, width

Mask = npt.NDArray[np.bool_]


def pack_polygons(polygons: Sequence[npt.ArrayLike]) -> bytes:
    """Rings of points as bytes: their number, the points of each (uint32), then x and y of all points (float32).

    Values are not judged here: too few points or NaN are found by the audit.

    Args:
        polygons: One array per ring, shape (points, 2).

    Raises:
        ValueError: a ring is no array of that shape, or there are more than 100,000 points.
    """
    rings = []
    for polygon in polygons:
        with np.errstate(over="ignore"):
            ring = np.asarray(polygon, dtype="<f4")
        if ring.ndim != 2 or ring.shape[1] != 2:
            raise ValueError("a polygon is not a list of points x, y")
        rings.append(ring)
    if sum(map(len, rings)) > MAX_POINTS:
        raise ValueError(f"a mask has more than {MAX_POINTS:,} points")
    head = np.array([len(rings), *map(len, rings)], "<u4").tobytes()
    return head + b"".join(ring.tobytes() for ring in rings)


def unpack_polygons(data: bytes) -> list[npt.NDArray[np.float32]]:
    """The inverse of pack_polygons: float32, shape (points, 2) each.

    Raises:
        ValueError: the bytes are not those of pack_polygons.
    """
    counts, points = _polygon_parts(data)
    return np.split(points, np.cumsum(counts)[:-1]) if len(counts) else []


def scale_polygons(data: bytes, scale: tuple[float, float]) -> bytes:
    """The same polygons with x and y multiplied.

    Raises:
        ValueError: the bytes are not those of pack_polygons.
    """
    counts, points = _polygon_parts(data)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (points.astype(np.float64) * scale).astype("<f4")
    return data[: 4 + 4 * len(counts)] + scaled.tobytes()


def _polygon_parts(data: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Points per ring, shape (rings,), and all points, shape (points, 2)."""
    num = int.from_bytes(data[:4], "little") if len(data) >= 4 else -1
    if num < 0 or len(data) < 4 + 4 * num:
        raise ValueError("the bytes of the polygons are cut off")
    counts = np.frombuffer(data, "<u4", num, 4).astype(np.int64)
    total = int(counts.sum())
    if len(data) != 4 + 4 * num + 8 * total:
        raise ValueError("the bytes of the polygons are cut off")
    return counts, np.frombuffer(data, "<f4", 2 * total, 4 + 4 * num).reshape(-1, 2)


def outline_mask(cut: CutMask) -> npt.NDArray[np.float64]:
    """One closed ring around all pieces and holes of a mask, by the even-odd rule: they are joined by lines that are walked there and
    back, as a form with one polygon for an object needs. Drawn again (see above) it gives the same pixels.

    The contours are contourpy's, which matplotlib brings.

    Returns:
        x and y in pixels of the picture, shape (points, 2); none of an empty mask.
    """
    from contourpy import contour_generator

    lines: Any = contour_generator(z=np.pad(cut.pixels, 1).astype(np.float32)).lines(0.5) if cut.pixels.size else []
    corner = np.array(
        [cut.left - 0.5, cut.top - 0.5]
    )  # lines run between the middles of pixels, of which one is padding
    rings = [_without_straight(line + corner) for line in lines]
    joined = [part for ring in rings for part in (ring, rings[0][:1])]  # each begins where it ends
    return np.concatenate(joined[:-1]) if joined else np.zeros((0, 2))


def _without_straight(ring: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A closed ring without the points that lie on the line between their neighbours."""
    steps = np.diff(ring, axis=0)
    turns = steps[:-1, 0] * steps[1:, 1] != steps[:-1, 1] * steps[1:, 0]
    return ring[np.concatenate([[True], turns, [True]])]


def pack_rle(counts: Sequence[int] | str | bytes, height: int, width: int) -> bytes:
    """Run lengths as bytes: height and width (uint32), then COCO's compressed string.

    The form is that of COCO's public mask API: pixels column by column, runs of background and object in turn, starting
    with background; in the string, every count from the fourth on as the difference to the one two before, in digits of
    5 bits, lowest first, a sixth bit saying that more follow, each as a character from "0" on.

    Args:
        counts: Run lengths (pixels), or the compressed string.
        height, width: Of the mask, pixels.

    Raises:
        ValueError: the counts are not whole numbers of at least 0, the string is none, or the pixels do not add up.
    """
    if not 0 < height * width <= MAX_PIXELS or height < 0:
        raise ValueError(f"a mask of {width} x {height} pixels is empty or over the limit of 89 million pixels")
    if isinstance(counts, str):
        counts = counts.encode("utf-8", "surrogatepass")  # what is not ASCII is no digit
    if isinstance(counts, bytes):
        packed, runs = counts, _decode_counts(counts)
    else:
        if len(counts) > height * width + 1 or not all(type(c) is int and 0 <= c <= MAX_PIXELS for c in counts):
            raise ValueError("run lengths are not whole numbers of at least 0")
        runs = np.array(counts, np.int64)
        packed = encode_counts(runs)
    _check_runs(runs, height, width)
    return _RLE_HEAD.pack(height, width) + packed


def pack_mask(mask: Mask) -> bytes:
    """A mask of shape (height, width) as the bytes of pack_rle."""
    height, width = mask.shape
    return _RLE_HEAD.pack(height, width) + encode_counts(run_lengths(mask))


def unpack_rle(data: bytes) -> Mask:
    """The mask of pack_rle, bool, shape (height, width).

    Raises:
        ValueError: the bytes are not those of pack_rle.
    """
    height, width, runs = rle_runs(data)
    values = (np.arange(len(runs)) % 2).astype(bool)
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)


def rle_runs(data: bytes) -> tuple[int, int, npt.NDArray[np.int64]]:
    """Height, width and run lengths of packed run lengths; the object's pixels are the sum of every second run.

    Raises:
        ValueError: the bytes are not those of pack_rle.
    """
    if len(data) <= _RLE_HEAD.size:
        raise ValueError("the bytes of the run lengths are cut off")
    height, width = _RLE_HEAD.unpack_from(data)
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"a mask of {width} x {height} pixels is empty or over the limit of 89 million pixels")
    runs = _decode_counts(data[_RLE_HEAD.size :])
    _check_runs(runs, height, width)
    return height, width, runs


def rle_box(height: int, runs: npt.NDArray[np.int64]) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom (pixels) of column-wise run lengths without drawing them; None for an empty mask."""
    ends = np.cumsum(runs)
    first, last = (ends - runs)[1::2][runs[1::2] > 0], ends[1::2][runs[1::2] > 0] - 1
    if not len(first):
        return None
    left, right = int(first[0]) // height, int(last[-1]) // height
    crosses = first // height != last // height  # a run over a column's end holds the bottom pixel and a top one
    top = 0 if crosses.any() else int((first % height).min())
    bottom = height - 1 if crosses.any() else int((last % height).max())
    return float(left), float(top), float(right + 1), float(bottom + 1)


def _check_runs(runs: npt.NDArray[np.int64], height: int, width: int) -> None:
    if len(runs) and int(runs.min()) < 0:
        raise ValueError("a run length is negative")
    total = int(runs.sum())
    if total != height * width:
        raise ValueError(f"run lengths add up to {total} pixels, not to {width} x {height}")


def _decode_counts(data: bytes) -> npt.NDArray[np.int64]:
    codes = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or int(codes.min()) < 0 or int(codes.max()) > 63:
        raise ValueError("the run lengths are no string of COCO's run-length code")
    ends = np.flatnonzero((codes & 32) == 0)
    if len(ends) == 0 or int(ends[-1]) != len(codes) - 1:
        raise ValueError("the run-length code is cut off")
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if int(lengths.max()) > MAX_DIGITS:
        raise ValueError("a run length is larger than any mask")
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * places), starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)  # two's complement
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def draw_mask(
    kind: int, data: bytes, *, size: tuple[int, int], root: Path | None = None, scale: tuple[float, float] = (1.0, 1.0)
) -> Mask:
    """One object's mask as pixels, bool, shape (height, width).

    Args:
        kind: POLYGONS, RLE or MASK_FILE.
        data: The object's entry in `Objects.masks`.
        size: Width and height to draw, pixels. Run lengths and mask files of another size are scaled (nearest pixel).
        root: The index's root, from which mask files are named.
        scale: What x and y of polygons are multiplied with: 1 for pixels of this size, `size` for shares.

    Raises:
        ValueError: there is no mask, its bytes are damaged, the file cannot be read, or `size` is over the limit.
    """
    width, height = size
    if not 0 < width * height <= MAX_PIXELS or width < 0:
        raise ValueError(f"a mask of {width} x {height} pixels is empty or over the limit of 89 million pixels")
    if kind == POLYGONS:
        mask = np.zeros((height, width), bool)
        for ring in unpack_polygons(data):
            if len(ring) >= 3 and np.isfinite(ring).all():
                _fill(mask, ring.astype(np.float64) * scale)
        return mask
    if kind == RLE:
        mask = unpack_rle(data)
    elif kind == MASK_FILE:
        mask = read_mask((root or Path()) / data.decode("utf-8", "surrogateescape"))
    else:
        raise ValueError("the object has no mask")
    if mask.shape != (height, width):
        mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST), dtype=bool)
    return mask


def cut_polygons(data: bytes, size: tuple[int, int], scale: tuple[float, float] = (1.0, 1.0)) -> CutMask:
    """Polygons as a cut-out, of which only the part around them is drawn: a small object in a picture of 24 million pixels.

    Args:
        data, size, scale: As draw_mask has them.

    Raises:
        ValueError: the bytes are damaged.
    """
    rings = [
        ring.astype(np.float64) * scale for ring in unpack_polygons(data) if len(ring) >= 3 and np.isfinite(ring).all()
    ]
    if not rings:
        return CutMask(0, 0, np.zeros((0, 0), bool))
    points = np.concatenate(rings)
    left, top = np.clip(np.floor(points.min(axis=0)), 0, size).astype(int)
    right, bottom = np.clip(np.ceil(points.max(axis=0)), 0, size).astype(int)
    part = np.zeros((max(0, bottom - top), max(0, right - left)), bool)
    for ring in rings:
        _fill(part, ring - (left, top))
    made = cut_mask(part)
    return CutMask(made.left + int(left), made.top + int(top), made.pixels) if made.pixels.size else made


def _fill(mask: Mask, ring: npt.NDArray[np.float64]) -> None:
    """Add the pixels whose centres lie in a ring, by the even-odd rule. mask: shape (height, width), changed."""
    height, width = mask.shape
    left, top = np.clip(np.floor(ring.min(axis=0)), 0, (width, height)).astype(int)
    right, bottom = np.clip(np.ceil(ring.max(axis=0)), 0, (width, height)).astype(int)
    if right <= left or bottom <= top:
        return
    x, y = ring.T
    x2, y2 = np.roll(x, -1), np.roll(y, -1)
    # an edge crosses the centre lines of rows first .. last - 1; the half-open rule counts a corner once
    first = np.clip(np.ceil(np.minimum(y, y2) - 0.5), top, bottom).astype(np.int64)
    last = np.clip(np.ceil(np.maximum(y, y2) - 0.5), top, bottom).astype(np.int64)
    rows = last - first
    slope = np.divide(x2 - x, y2 - y, out=np.zeros_like(x), where=y2 != y)
    stride = right - left + 1
    toggles = np.zeros((bottom - top) * stride, np.int64)
    part = np.cumsum(rows) // _MAX_CROSSINGS
    for number in range(int(part[-1]) + 1):
        edges = np.flatnonzero((part == number) & (rows > 0))
        if not len(edges):
            continue
        edge = np.repeat(edges, rows[edges])
        before = np.cumsum(rows[edges]) - rows[edges]
        row = np.arange(len(edge)) - np.repeat(before, rows[edges]) + first[edge]
        cross = x[edge] + (row + 0.5 - y[edge]) * slope[edge]
        column = np.clip(np.ceil(cross - 0.5), left, right).astype(np.int64) - left
        toggles += np.bincount((row - top) * stride + column, minlength=len(toggles))
    inside = np.cumsum(toggles.reshape(-1, stride)[:, :-1], axis=1) & 1
    mask[top:bottom, left:right] |= inside.astype(bool)


def read_mask(path: Path) -> Mask:
    """A mask file's pixels, bool, shape (height, width): what is neither zero (index zero, black) nor transparent.

    Raises:
        ValueError: the file cannot be read as an image, or is a map of several objects.
    """
    try:
        image = open_image(path)
        image.load()
        pixels = np.asarray(image)
    except ImageError as error:
        raise ValueError(error.message) from error
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ValueError(f"The mask file is cut off or damaged: {error}.") from error
    if pixels.ndim == 2:
        if image.format != "JPEG":  # whose greys are many
            _refuse_map(pixels)
        return pixels != 0
    if image.mode in ("RGBA", "LA", "PA"):
        return (pixels[..., :-1] != 0).any(axis=2) & (pixels[..., -1] != 0)
    return (pixels != 0).any(axis=2)


def _refuse_map(pixels: npt.NDArray[np.generic]) -> None:
    """Refuse the values 1 to N, with which programs for cells number the objects of a picture. All greys up to 255 are an edge that was
    smoothed."""
    largest = int(pixels.max(initial=0)) if pixels.dtype.kind in "iu" else 0
    if 1 < largest < 255 or 255 < largest < 65535:
        values = np.unique(pixels)
        if len(values) == largest + (values[0] == 0):
            raise ValueError(
                f"The file holds the numbers 1 to {largest}, a map of as many objects; one file for each object is wanted."
            )


def mask_box(mask: Mask) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom (pixels) around a mask of shape (height, width); None where it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def polygon_area(ring: npt.NDArray[np.float32]) -> float:
    """Area of a ring of points by the shoelace formula, in squares of its unit. ring: shape (points, 2)."""
    x, y = (ring.astype(np.float64) - ring[:1]).T
    return 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))
