"""COCO JSON: images, annotations (boxes, polygons, run lengths, crowds) and categories."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from goodfit.core.errors import DataError
from goodfit.data.columns import NO_MASK, POLYGONS, RLE
from goodfit.data.formats.coco_files import candidates, refuse_doubtful
from goodfit.data.formats.read_objects import Listings, Samples, decode_text, number, shown, split_of, wants_masks
from goodfit.data.index import SPLITS
from goodfit.data.masks import pack_polygons, pack_rle, rle_box, rle_runs
from goodfit.data.reading import How, Problem, Reading, clean, folders, is_image, problem

_IMAGE_FOLDERS = ("images", "JPEGImages", "imgs", "img")
_MAX_ID = 2**63


def recognise(data: Path) -> str | None:
    """One line on the COCO files found, or None where there are none. Never raises."""
    try:
        found = candidates(data, None)
        names = [os.path.relpath(p, data if data.is_dir() else data.parent) for p, _ in found]
    except (OSError, ValueError, DataError):
        return None
    return clean(f"COCO JSON: {', '.join(names)}") if names else None


def read(data: Path, how: How) -> Reading:
    """Read COCO JSON files, or the folder that holds them (at its top, in annotations/, or in one folder per split).

    Classes are the categories in order of their ids. File names are sought in how.images, beside the JSON file, and in
    the usual folders beside and above it. An image without annotations is background.

    Raises:
        DataError: no file is COCO JSON, several are of the same split, one is damaged, or no image is found.
    """
    try:
        chosen = candidates(data, how.annotations)
        beside = sorted(p.name for p in data.glob("*.json")) if data.is_dir() and not chosen else []
    except OSError as error:
        raise DataError(f"The folder cannot be read: {error.strerror}.", where=str(data)) from error
    if not chosen:
        names = clean(f": it is not in {', '.join(beside[:5])}") if beside else ""
        raise DataError(f"There is no COCO JSON with boxes here{names}.", where=str(data),
                        next="give the JSON file itself, or name it: annotations=NAME")  # fmt: skip
    refuse_doubtful(data, chosen)
    root = _root(data, chosen)
    files = [_File(path, split, _load(path, how)) for path, split in chosen]
    reader = _Reader(Samples(root), how)
    reader.read_categories(files)
    for file in files:
        reader.read_images(file)
    reader.unnamed_images()
    if not reader.samples.paths:
        _refuse_no_images(files)
    for file in files:
        reader.read_annotations(file)
    objects = reader.samples.objects
    masks, boxes = objects.num_masks()
    # Some damaged masks are no reason to leave masks.
    sound = sum(objects.kept) if 2 * masks > len(objects) else len(objects)
    with_masks, some = wants_masks(how, masks, sound, str(data), boxes=boxes)
    listed = ", ".join(f"{reader.samples.name(f.path)}{f' ({SPLITS[f.split]})' if f.split >= 0 else ''}" for f in files)
    what = "boxes and masks" if with_masks else "boxes"
    return reader.samples.reading(
        format="coco",
        note=f"COCO JSON: {listed}; {what} of {len(reader.names)} classes{some}{reader.note}",
        problems=reader.problems if with_masks else [p for p in reader.problems if p.kind != "bad_mask"],
        class_names=reader.names,
        how=how,
        with_masks=with_masks,
    )


@dataclass(slots=True)
class _File:
    path: Path
    split: int
    content: dict[str, Any]
    rows: dict[int | str, int] = field(default_factory=dict)  # by image id; -1 where the image is missing


def _root(data: Path, chosen: list[tuple[Path, int]]) -> Path:
    if data.is_dir():
        return data
    folder = chosen[0][0].parent
    return folder.parent if folder.name.lower() == "annotations" else folder


def _load(path: Path, how: How) -> dict[str, Any]:
    try:
        content = json.loads(decode_text(path.read_bytes(), how.encoding))
    except OSError as error:
        raise DataError(f"The file cannot be read: {error.strerror}.", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        reason = clean(str(error)) if not isinstance(error, RecursionError) else "lists are nested too deeply"
        raise DataError(
            f"The file is not whole JSON: {reason}.", where=str(path), next="fetch or export it again"
        ) from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"The JSON has no list named {key!r}, so it is no COCO file.", where=str(path),
                            next="export the annotations again as COCO JSON")  # fmt: skip
    return content


def _refuse_no_images(files: list[_File]) -> None:
    names = [i["file_name"] for f in files for i in f.content["images"]
             if isinstance(i, dict) and isinstance(i.get("file_name"), str)]  # fmt: skip
    if not names:
        raise DataError("The JSON names no image.", where=str(files[0].path), next="export the annotations again")
    raise DataError(f"None of the {len(names)} images that the JSON names exists; the first is {shown(names[0])}.",
                    where=str(files[0].path), next="say where the names start from: images=FOLDER")  # fmt: skip


def _id(value: object) -> int | str | None:
    """An id as a key: 7, 7.0 and "7" are the same; None for what is no id."""
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdigit() and len(value) < 19 else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MAX_ID else None


class _Reader:
    """One reading: what has been found in the files so far."""

    def __init__(self, samples: Samples, how: How) -> None:
        self.samples = samples
        self.how = how
        self.listings = Listings()
        self.problems: list[Problem] = []
        self.names: list[str] = []
        self.classes: dict[int | str, int] = {}
        self.used: set[str] = set()
        self.heads: dict[str, list[str]] = {}  # folders for the folders of a name
        self.note = ""

    def read_categories(self, files: list[_File]) -> None:
        """Classes in order of id; the same id must mean the same in every file."""
        named: dict[int | str, str] = {}
        parents: set[str] = set()
        for file in files:
            for entry in file.content["categories"]:
                key = _id(entry.get("id")) if isinstance(entry, dict) else None
                if key is None:
                    self._bad("bad_box", file, "categories", f"{shown(entry)} has no id: the category is left out.")
                    continue
                name = entry.get("name")
                name = name if isinstance(name, str) else str(key) if name is None else shown(name)
                if named.setdefault(key, name) != name:
                    raise DataError(f"Category {shown(key)} is both {shown(named[key])} and {shown(name)}.",
                                    where=str(file.path), next="mend the list of categories")  # fmt: skip
                if isinstance(entry.get("supercategory"), str) and entry["supercategory"] != name:
                    parents.add(entry["supercategory"])
        if not named:
            raise DataError("The JSON names no category.", where=str(files[0].path),
                            next="export the annotations again as COCO JSON")  # fmt: skip
        used = {_id(a.get("category_id")) for f in files for a in f.content["annotations"] if isinstance(a, dict)}
        heads = [k for k, n in named.items() if k not in used and n in parents]  # as Roboflow writes at id 0
        if heads and len(heads) < len(named):
            self.note = f"; {', '.join(shown(named.pop(k)) for k in heads)} is a heading, no class"
        keys = sorted(named, key=lambda k: (isinstance(k, str), k))
        self.names = [named[k] for k in keys]
        self.classes = {k: i for i, k in enumerate(keys)}

    def read_images(self, file: _File) -> None:
        """Rows for the images whose files exist, in order of path."""
        places, last = self._places(file)
        self.heads.clear()
        found: list[tuple[str, int | str]] = []
        missing: list[tuple[int | str, str]] = []
        sizes: dict[int | str, tuple[float, float]] = {}
        groups: dict[int | str, str] = {}
        for position, entry in enumerate(file.content["images"]):
            key = _id(entry.get("id")) if isinstance(entry, dict) else None
            name = entry.get("file_name") if isinstance(entry, dict) else None
            if key is None or not isinstance(name, str) or not name or key in file.rows:
                reason = "stands twice" if key is not None and key in file.rows else "has no id or no file_name"
                self._bad("missing_image", file, f"images[{position}]", f"{shown(entry)} {reason}.", lost=True)
                continue
            file.rows[key] = -1
            sizes[key] = number(entry.get("width")), number(entry.get("height"))
            if self.how.group is not None and entry.get(self.how.group) is not None:  # as video_id
                groups[key] = clean(json.dumps(entry[self.how.group], sort_keys=True))
            path = self._find(name, places)
            if path is None:
                missing.append((key, name))
            else:
                found.append((path, key))
        missing = self._by_tail(missing, places, found)
        if not found and last:  # all images are where those of another split would be
            self.heads.clear()
            found = [(p, k) for k, n in missing if (p := self._find(n, last)) is not None]
            there = {k for _, k in found}
            missing = self._by_tail([(k, n) for k, n in missing if k not in there], last, found)
        for key, name in missing:
            self._bad("missing_image", file, f"image {shown(key)}", f"{shown(name)} does not exist.", lost=True)
        source = self.samples.name(file.path)
        for path, key in sorted(found, key=lambda f: f[0]):
            self.used.add(path)
            file.rows[key] = self.samples.add(
                self.samples.name(path), file.split, source, size=sizes[key], group=groups.get(key, "")
            )

    def _find(self, name: str, places: list[str]) -> str | None:
        """A file by its name and the folders in it, as many of them as there are here: the name may be a path of the machine that
        wrote the file."""
        head, _, tail = name.replace("\\", "/").rpartition("/")
        if ".." in head.split("/") and not is_image(Path(tail)):  # no way to a file that is no image
            head = ""
        known = self.heads.get(head)
        if known is None:
            known = self.heads[head] = self._below(head, places)
        return next((found for folder in known if (found := self.listings.find(folder, tail)) is not None), None)

    def _below(self, head: str, places: list[str]) -> list[str]:
        """Folders that the folders of a name may be, those first that agree with more of them; the places themselves if it has none."""
        words = [w for w in head.split("/") if w not in ("", ".")]
        if not words:
            return places
        made = (os.path.normpath("/".join((place, *words[first:]))) for first in range(len(words)) for place in places)
        return [folder for folder in dict.fromkeys(made) if self.listings.names(folder)]

    def _by_tail(
        self, missing: list[tuple[int | str, str]], places: list[str], found: list[tuple[str, int | str]]
    ) -> list[tuple[int | str, str]]:
        """Find what no folder of its name holds by the name alone, where one file has it and no other image took that; adds to `found`.

        Returns:
            What is still missing.
        """
        taken, left = {os.path.realpath(p) for p, _ in found}, []
        for key, name in missing:
            tail = name.replace("\\", "/").rpartition("/")[2]
            there = {
                os.path.realpath(p): p
                for place in reversed(places)
                if (p := self.listings.find(place, tail)) is not None
            }
            if len(there) == 1 and not there.keys() & taken:
                taken |= there.keys()
                found.append((next(iter(there.values())), key))
            else:
                left.append((key, name))
        return left

    def _places(self, file: _File) -> tuple[list[str], list[str]]:
        """Folders that image names may start from, likely ones first; and those of other splits, for want of better."""
        beside = file.path.parent
        given = self.how.images
        if given is not None:
            chosen = [p for p in (Path(given), self.samples.root / given, beside / given) if os.path.isdir(p)]
            if not chosen:
                raise DataError("There is no such folder of images.", where=f"images={given}",
                                next="give the folder that the JSON's file names start from")  # fmt: skip
            return [str(chosen[0])], []
        anchors = list(dict.fromkeys((beside, self.samples.root, Path(os.path.abspath(beside)).parent)))
        subset = file.path.stem.partition("_")[2]  # CVAT: annotations/instances_default.json and images/default
        first: list[Path] = []
        rest: list[Path] = []
        others: list[Path] = []
        for anchor in anchors:
            for folder in [*(anchor / n for n in _IMAGE_FOLDERS), anchor]:
                below = _folders(folder)
                first += [f for f in below if file.split >= 0 and split_of(f.name) == file.split]
                first += [f for f in below if f.name == subset]
                others += [f for f in below if split_of(f.name) not in (None, file.split)]
                if folder == self.samples.root or len(below) == 1:
                    rest += [f for f in below if split_of(f.name) is None]
            first += [anchor, *(anchor / n for n in _IMAGE_FOLDERS)]
        places = [os.path.normpath(p) for p in dict.fromkeys(first + rest)]
        nested = [f"{p}/{n}" for p in places for n in _IMAGE_FOLDERS if os.path.isdir(f"{p}/{n}")]
        return list(dict.fromkeys(places + nested)), [os.path.normpath(p) for p in dict.fromkeys(others)]

    def unnamed_images(self) -> None:
        """Report the images beside the used ones that no JSON file names."""
        for folder in sorted({os.path.dirname(p) for p in self.used}):
            for name in self.listings.images(folder):
                if f"{folder}/{name}" not in self.used:
                    self.problems.append(problem("missing_label", self.samples.name(f"{folder}/{name}"),
                                                 "The image is in no annotation file: left out."))  # fmt: skip

    def read_annotations(self, file: _File) -> None:
        """Objects of the images that exist; what cannot be read is reported and not added."""
        for position, entry in enumerate(file.content["annotations"]):
            if not isinstance(entry, dict):
                self._bad("bad_box", file, f"annotations[{position}]", f"{shown(entry)} is no annotation.")
                continue
            key = _id(entry.get("id"))
            where = key if isinstance(key, int) else position
            image, kind = _id(entry.get("image_id")), _id(entry.get("category_id"))
            row = file.rows.get(image) if image is not None else None
            if row is None:
                self._bad("bad_box", file, where, f"There is no image with the id {shown(entry.get('image_id'))}.")
            elif kind is None or kind not in self.classes:
                self._bad("bad_box", file, where, f"There is no category {shown(entry.get('category_id'))}.")
            elif row >= 0:
                self._add(file, row, self.classes[kind], where, entry)

    def _add(self, file: _File, row: int, kind: int, where: int, entry: dict[str, Any]) -> None:
        mask_kind, mask, kept = NO_MASK, b"", True
        box = entry.get("bbox")
        edges = _edges(box)
        # Some tools write [] or zeros beside a mask.
        is_missing = not box or (edges is not None and edges[:2] == edges[2:])
        try:
            if self.how.task != "detect" or is_missing:  # else masks cost most of the time
                mask_kind, mask = _mask(entry.get("segmentation"))
        except ValueError as error:
            kept = False
            self._bad("bad_mask", file, where, f"{str(error)[:1].upper()}{str(error)[1:]}.")
        if is_missing and mask_kind != NO_MASK:
            edges = _bounds(mask_kind, mask, entry)
        if edges is None:
            self._bad("bad_box", file, where, f"{shown(box)} is no box of left, top, width and height.")
            return
        crowd = entry.get("iscrowd") in (1, True, "1") and self.how.crowds != "learn"
        area = number(entry.get("area"))
        self.samples.objects.add(row, edges, kind, where, crowd=crowd, kept=kept or crowd, mask_kind=mask_kind, mask=mask,
                                 area=area if area > 0 else math.nan)  # fmt: skip

    def _bad(self, kind: str, file: _File, where: object, message: str, *, lost: bool = False) -> None:
        self.problems.append(problem(kind, f"{self.samples.name(file.path)}:{where}", message, lost=lost))


def _folders(folder: Path) -> list[Path]:
    try:
        return folders(folder)
    except OSError:
        return []


def _edges(box: object) -> tuple[float, ...] | None:
    """Left, top, right, bottom of a COCO box; None for what is no list of four finite numbers."""
    if not isinstance(box, list) or len(box) != 4:
        return None
    left, top, width, height = map(number, box)
    edges = (left, top, left + width, top + height)
    return edges if all(map(math.isfinite, edges)) else None


def _mask(value: object) -> tuple[int, bytes]:
    """How the mask of an annotation is kept, and its bytes; NO_MASK where it has none.

    Raises:
        ValueError: it is neither polygons nor run lengths.
    """
    if value is None or value == [] or value == {}:
        return NO_MASK, b""
    if isinstance(value, list):
        rings = value if isinstance(value[0], list) else [value]
        points = []
        for ring in rings:
            if not isinstance(ring, list) or len(ring) % 2:
                raise ValueError(f"{shown(ring)} is no polygon: it needs pairs of x and y")
            points.append(np.array([number(v) for v in ring], np.float64).reshape(-1, 2))
        if not any(map(len, points)):
            return NO_MASK, b""
        if max(map(len, points)) < 3:
            raise ValueError("the polygon has fewer than three corners")
        return POLYGONS, pack_polygons(points)
    size = value.get("size") if isinstance(value, dict) else None
    counts = value.get("counts") if isinstance(value, dict) else None
    if not isinstance(size, list) or len(size) != 2 or not all(type(s) is int and 0 < s < 2**31 for s in size):
        raise ValueError(f"{shown(value)} is neither polygons nor run lengths with a size")
    if not isinstance(counts, list | str):
        raise ValueError(f"{shown(counts)} are no run lengths")
    return RLE, pack_rle(counts, size[0], size[1])


def _bounds(kind: int, mask: bytes, entry: dict[str, Any]) -> tuple[float, ...] | None:
    """The box around an annotation's mask, where it gives no box."""
    if kind == RLE:
        height, _, runs = rle_runs(mask)
        return rle_box(height, runs)
    rings = entry["segmentation"] if isinstance(entry["segmentation"][0], list) else [entry["segmentation"]]
    x = [number(v) for ring in rings for v in ring[::2]]
    y = [number(v) for ring in rings for v in ring[1::2]]
    edges = (min(x), min(y), max(x), max(y)) if x and y else (math.nan,) * 4
    return edges if all(map(math.isfinite, edges)) else None
