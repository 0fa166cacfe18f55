"""Find boxes and masks that cannot be right, and leave them out in the index: the object, never its image."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from goodfit.data.checks.findings import Finding
from goodfit.data.checks.turned import turn_objects, turned_rows
from goodfit.data.columns import MASK_FILE, NO_MASK, POLYGONS, RLE, Blobs, Objects
from goodfit.data.index import LEFT_OUT, DatasetIndex
from goodfit.data.masks import mask_box, pack_mask, polygon_area, read_mask, rle_runs, scale_polygons, unpack_polygons
from goodfit.data.reading import Problem, problem

MIN_SIDE = 0.99  # pixels: smaller boxes hold no pixel; a share of 6 decimals of a 1-pixel box may come to 0.995
MIN_INSIDE = 0.5  # share of a box's area within the image, from which it is clipped rather than dropped
ROUNDING_PIXELS = 1.0  # boxes may reach so far outside, or
ROUNDING_SHARE = 0.01  # this share of the image's side, and are clipped without a word

MANY_CROWDS = 0.05  # share of the objects; COCO has 1 %

_Box = tuple[float, float, float, float]


@dataclass(slots=True)
class _Masks:
    """What became of the masks: new bytes, boxes and errors by object, and remarks on masks that are kept."""

    data: list[bytes]
    kinds: npt.NDArray[np.uint8]
    boxes: dict[int, _Box] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    remarks: dict[int, str] = field(default_factory=dict)


def audit_objects(index: DatasetIndex) -> tuple[Objects, list[Problem]]:
    """The objects in pixels, with those that cannot be right no longer kept, and a Problem for each.

    Dropped are boxes with a value that is not finite, reversed or under one pixel, with less than half of their area in
    the image, and repeated boxes of the same class (and mask). What else reaches outside is clipped, and said beyond
    rounding (1 px or 1 %). For segmentation, objects with a mask that is missing, broken, empty, of another size than
    the image or outside of it are dropped. Boxes of mask files are taken from the masks. For detection, masks go.
    Objects of images without a size, or left out, are dropped without a Problem.

    Args:
        index: With `objects` and `sizes`; its `splits` say which images are left out.

    Returns:
        New objects (`relative` is False), and Problems of kind bad_box or bad_mask in the order of the objects; the item
        is the image with the place in the annotation file.

    Raises:
        ValueError: the index has no objects or no sizes.
    """
    if index.objects is None or index.sizes is None:
        raise ValueError("an index with objects and image sizes is needed")
    other = _other_size_rows(index)
    turns = turned_rows(index, other)
    if turns:
        index = replace(index, objects=turn_objects(index.objects, turns, index.sizes))
    objects = index.objects
    assert objects is not None and index.sizes is not None
    rows = objects.rows
    sizes = index.sizes[rows].astype(np.float64)
    kept = objects.kept & (index.splits[rows] != LEFT_OUT) & (sizes > 0).all(axis=1)
    boxes = objects.boxes.astype(np.float64)
    if objects.relative:
        boxes *= np.tile(sizes, 2)
    found: dict[int, tuple[str, str]] = {}
    changes: dict[str, object] = {}
    if index.task == "segment" or (objects.mask_kinds != NO_MASK).any():
        masks = _audit_masks(index, objects, kept, sizes)
        for number, box in masks.boxes.items():
            boxes[number] = box
        found = {n: ("bad_mask", f"{text}; it is ignored.") for n, text in masks.remarks.items()}
        found |= {n: ("bad_mask", f"{text}; the object is dropped.") for n, text in masks.errors.items()}
        kept[list(masks.errors)] = False
        if index.task == "segment":
            changes |= {"masks": Blobs(masks.data), "mask_kinds": masks.kinds}
        else:
            changes |= {"masks": Blobs([b""] * len(objects)), "mask_kinds": np.zeros_like(objects.mask_kinds)}
    boxes, bad = _audit_boxes(boxes, sizes, kept)
    found |= {n: ("bad_box", text) for n, text in bad.items()}
    repeats = _repeats(objects, rows, boxes, kept, with_masks=index.task == "segment")
    kept[repeats] = False
    found |= {n: ("bad_box", f"The box {_text(boxes[n])} stands here a second time; it is dropped.")
              for n in repeats.tolist()}  # fmt: skip
    with np.errstate(over="ignore"):
        made = replace(objects, boxes=boxes.astype(np.float32), kept=kept, relative=False, declared=None, **changes)  # type: ignore[arg-type]
    problems = [problem(found[n][0], f"{index.paths[int(rows[n])]}: {objects.where(n)}", found[n][1])
                for n in sorted(found)]  # fmt: skip
    return made, [*_other_sizes(index, other, turns), *problems]


def _other_size_rows(index: DatasetIndex) -> npt.NDArray[np.int64]:
    """Rows with objects whose image has not the size that its annotation states: a copy of another size, or turned."""
    objects = index.objects
    assert objects is not None and index.sizes is not None
    if objects.declared is None:
        return np.zeros(0, np.int64)
    stated, real = objects.declared, index.sizes.astype(np.float64)
    asked = (
        (stated > 0).all(axis=1) & (real > 0).all(axis=1) & (index.splits != LEFT_OUT) & (np.diff(objects.starts) > 0)
    )
    return np.flatnonzero(asked & (stated != real).any(axis=1))


def _other_sizes(index: DatasetIndex, rows: npt.NDArray[np.int64], turns: Mapping[int, int]) -> list[Problem]:
    """A Problem for each of these rows; turned ones, whose objects were turned too, are another kind."""
    objects, found = index.objects, []
    assert objects is not None and index.sizes is not None and (objects.declared is not None or not len(rows))
    for row in rows.tolist():
        (wide, high), stated = index.sizes[row], objects.declared[row]  # type: ignore[index]
        where = f"{index.paths[row]}: {objects.files[row]}"
        if row in turns:
            found.append(problem("turned", where))
            continue
        why = "of the picture before it was turned" if tuple(stated) == (high, wide) else "of a copy of another size"
        found.append(problem("other_size", where, f"The annotation states {stated[0]:.0f} x {stated[1]:.0f}, the picture has {wide:.0f} x {high:.0f}: "
                             f"boxes may be those {why}."))  # fmt: skip
    return found


def crowds(index: DatasetIndex) -> list[Finding]:
    """What is marked as a crowd, or as difficult: nothing is learned of it, and what is found in it is not judged. A warning where that is
    more than a few objects, or all of a class, as where a tool marks whatever was drawn with its brush."""
    objects, num = index.objects, len(index.class_names)
    assert objects is not None
    there = objects.kept & (index.splits[objects.rows] != LEFT_OUT)
    marked, learned = (np.bincount(objects.classes[there & m], minlength=num) for m in (objects.crowd, ~objects.crowd))
    if not marked.sum():
        return []
    many = marked.sum() > MANY_CROWDS * (marked.sum() + learned.sum()) or ((marked > 0) & (learned == 0)).any()
    items = tuple(
        f"{index.class_names[c]}: {marked[c]} of {marked[c] + learned[c]} objects" for c in np.flatnonzero(marked)
    )
    return [Finding("crowd", "warning" if many else "info", int(marked.sum()), items,
                    "marked as a crowd or as difficult: not learned, and what is found there is not judged",
                    "crowds=learn, where these are objects like others, as CVAT marks what its brush drew")]  # fmt: skip


def _text(box: Iterable[float]) -> str:
    return " ".join(f"{value:.6g}" for value in box)


def _audit_boxes(
    boxes: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64], kept: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float64], dict[int, str]]:
    """Clipped boxes, and what is wrong by object; `kept` is changed. Shapes: (objects, 4), (objects, 2), (objects,)."""
    finite = np.asarray(np.isfinite(boxes).all(axis=1))
    given = np.where(finite[:, None], boxes, 0.0)
    limits = np.tile(sizes, 2)
    clipped = np.clip(given, 0.0, limits)
    width, height = given[:, 2] - given[:, 0], given[:, 3] - given[:, 1]
    new_width, new_height = clipped[:, 2] - clipped[:, 0], clipped[:, 3] - clipped[:, 1]
    inside = new_width * new_height >= MIN_INSIDE * width * height
    over = (np.maximum(-given, given - limits) > np.maximum(ROUNDING_PIXELS, ROUNDING_SHARE * limits)).any(axis=1)
    tests = (
        (~finite, "has a value that is not finite"),
        ((width < 0) | (height < 0), "is reversed: right is left of left, or bottom is above top"),
        ((width < MIN_SIDE) | (height < MIN_SIDE), "is less than one pixel wide or high"),
        (~inside, "has more than half of its area outside of the image"),
        ((new_width < MIN_SIDE) | (new_height < MIN_SIDE), "has less than one pixel inside of the image"),
    )
    found: dict[int, str] = {}

    def note(numbers: npt.NDArray[np.int64], text: str, action: str) -> None:
        for n in numbers.tolist():
            image = f"{sizes[n, 0]:.0f} x {sizes[n, 1]:.0f}"
            found[n] = f"The box {_text(boxes[n])} (image {image}) {text}; it is {action}."

    for test, text in tests:
        numbers = np.flatnonzero(test & kept)
        kept[numbers] = False
        note(numbers, text, "dropped")
    note(np.flatnonzero(over & kept), "reaches outside of the image", "clipped")
    return np.where(kept[:, None], clipped, boxes), found


def _repeats(
    objects: Objects, rows: npt.NDArray[np.int64], boxes: npt.NDArray[np.float64], kept: npt.NDArray[np.bool_], *,
    with_masks: bool,
) -> npt.NDArray[np.int64]:  # fmt: skip
    """The second and later of kept objects that are equal in image, class, box (and mask), ascending."""
    numbers = np.flatnonzero(kept & ~objects.crowd)
    keys = np.column_stack([rows[numbers], objects.classes[numbers], boxes[numbers]])
    order = np.lexsort(keys.T[::-1])  # stable, so the first of equals stays first
    equal = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    if not with_masks:
        return np.sort(numbers[order[1:][equal]])
    found = []
    at = 0
    while at < len(equal):
        end = at
        while end < len(equal) and equal[end]:
            end += 1
        if end > at:
            seen: set[bytes] = set()
            for n in numbers[order[at : end + 1]].tolist():
                if objects.masks[n] in seen:
                    found.append(n)
                seen.add(objects.masks[n])
        at = end + 1
    return np.array(sorted(found), np.int64)


def _audit_masks(
    index: DatasetIndex, objects: Objects, kept: npt.NDArray[np.bool_], sizes: npt.NDArray[np.float64]
) -> _Masks:
    """Judge the mask of every kept object. sizes: width and height of each object's image, shape (objects, 2)."""
    masks = _Masks(list(objects.masks), objects.mask_kinds.copy())
    kinds = objects.mask_kinds.tolist()
    files = []
    for number in np.flatnonzero(kept).tolist():
        kind, data = kinds[number], masks.data[number]
        size = (int(sizes[number, 0]), int(sizes[number, 1]))
        if kind == MASK_FILE:
            files.append((number, data, size))
        elif kind == NO_MASK:
            if not objects.crowd[number] and index.task == "segment":
                masks.errors[number] = "The object has no mask"
        elif index.task == "segment":
            try:
                if kind == POLYGONS:
                    masks.data[number], remark = _polygons(data, size, objects.relative)
                    if remark:
                        masks.remarks[number] = remark
                elif kind == RLE:
                    _run_lengths(data, size)
                else:
                    masks.errors[number] = "The mask is of no known kind"
            except ValueError as error:
                masks.errors[number] = _sentence(error)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    with ThreadPoolExecutor(cores) as pool:
        for number, result in pool.map(lambda f: (f[0], _file_box(index.root, f[1], f[2])), files):
            if isinstance(result, str):
                masks.errors[number] = result
            else:
                masks.boxes[number], masks.data[number] = result
                masks.kinds[number] = RLE
    return masks


def _sentence(error: Exception) -> str:
    text = str(error).rstrip(".")
    return text[:1].upper() + text[1:]


def _polygons(data: bytes, size: tuple[int, int], relative: bool) -> tuple[bytes, str]:
    """The polygons in pixels, and a remark on rings without use.

    Raises:
        ValueError: nothing of the mask can be used.
    """
    if relative:
        data = scale_polygons(data, (float(size[0]), float(size[1])))
    rings = unpack_polygons(data)
    if not all(np.isfinite(ring).all() for ring in rings):
        raise ValueError("a polygon has a corner that is not finite")
    large = [ring for ring in rings if len(ring) >= 3 and polygon_area(ring) > 0]
    if not large:
        few = all(len(ring) < 3 for ring in rings)
        raise ValueError("the polygon has fewer than three corners" if few else "the polygon has no area")
    if all((ring.max(axis=0) <= 0).any() or (ring.min(axis=0) >= size).any() for ring in large):
        raise ValueError("the polygon lies outside of the image")
    num = len(rings) - len(large)
    return data, f"{num} of {len(rings)} polygons of the mask has no area" if num else ""


def _run_lengths(data: bytes, size: tuple[int, int]) -> None:
    height, width, runs = rle_runs(data)
    if (width, height) != size:
        raise ValueError(f"the mask is of {width} x {height} pixels, the image of {size[0]} x {size[1]}")
    if int(runs[1::2].sum()) == 0:
        raise ValueError("the mask is empty")


def _file_box(root: Path, data: bytes, size: tuple[int, int]) -> tuple[_Box, bytes] | str:
    """The box around a mask file's pixels and their run lengths, or what is wrong with it. With run lengths the file is not needed
    again, and a run goes on with the masks that it began with."""
    name = data.decode("utf-8", "surrogateescape")
    try:
        mask = read_mask(root / name)
    except ValueError as error:
        return f"Mask file {name}: {str(error).rstrip('.')}"
    if mask.shape != size[::-1]:
        return f"Mask file {name} is of {mask.shape[1]} x {mask.shape[0]} pixels, the image of {size[0]} x {size[1]}"
    box = mask_box(mask)
    return (box, pack_mask(mask)) if box else f"Mask file {name} is empty"
