"""Pascal VOC: one XML file of boxes per image, and the lists of ImageSets/Main."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from goodfit.core.errors import DataError
from goodfit.data.formats.read_objects import (
    Listings,
    Samples,
    decode_text,
    read_bytes,
    read_text,
    shown,
    split_of,
    wants_masks,
)
from goodfit.data.index import NO_SPLIT, SPLITS
from goodfit.data.reading import (
    How,
    Problem,
    Reading,
    folders,
    is_image,
    is_regular,
    problem,
    unread_picture,
    unread_pictures,
)

_ANNOTATION_FOLDERS = ("annotations", "annotation", "xml", "xmls", "labels")
_IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img")
_SETS = ("train", "val", "test", "trainval")
_DECLARED = re.compile(rb"<\?xml[^>]*encoding\s*=\s*[\"']([A-Za-z0-9._-]+)[\"']")
_DECLARATION = re.compile(r"^\s*<\?xml[^>]*\?>")


def recognise(data: Path) -> str | None:
    """One line on the folders found, or None where no XML file of boxes is. Never raises."""
    try:
        places = _places(data)
    except (OSError, ValueError):
        return None
    return f"Pascal VOC: {_titles(places, data)}" if places else None


def read(data: Path, how: How) -> Reading:
    """Read Pascal VOC: Annotations/ and JPEGImages/ (here, or in each folder one level down), or XML files beside their images.

    Corners are whole pixels counted from 1, the last included, so left is xmin - 1 and right is xmax; where any xmin or
    ymin of the dataset is 0, they are taken as edges counted from 0. A box whose corners are the same pixel, or
    reversed, stays so for the audit. Objects marked `difficult` are crowds: nothing is learned from them, and what
    is found within one is ignored, by the share of it that lies inside, as COCO's crowds are (VOC's own figures go by the overlap).
    Where ImageSets/Main has lists, they say what belongs to the dataset.

    Raises:
        DataError: there is no XML file of boxes, or no image that belongs to one.
    """
    try:
        places = _places(data)
    except OSError as error:
        raise DataError(f"The folder cannot be read: {error.strerror}.", where=str(data)) from error
    if not places:
        raise DataError("There is no Pascal VOC XML file here.", where=str(data),
                        next="give the folder that holds Annotations and JPEGImages")  # fmt: skip
    reader = _Reader(Samples(data), how)
    for place in places:
        reader.read_place(place)
    samples = reader.samples
    if not samples.paths:
        reason = f"; the first problem is {reader.problems[0].item}: {reader.problems[0].message}"
        raise DataError(f"No image with a readable XML file was found{reason if reader.problems else '.'}",
                        where=str(data), next="put the images into JPEGImages, beside Annotations")  # fmt: skip
    wants_masks(how, 0, len(samples.objects), str(data))
    zero_based = reader.make_edges()
    names = sorted(reader.classes)
    class_map = np.empty(len(names), np.int64)
    class_map[[reader.classes[name] for name in names]] = np.arange(len(names))
    base = "corners counted from 0, as one of them is 0" if zero_based else "corners are pixels counted from 1"
    return samples.reading(
        format="voc",
        note="; ".join([f"Pascal VOC: {_titles(places, data)}", f"boxes of {len(names)} classes", base, *reader.notes]),
        problems=reader.problems,
        class_names=names or ["object"],
        how=how,
        with_masks=False,
        class_map=class_map,
    )


@dataclass(frozen=True, slots=True)
class _Place:
    annotations: Path
    images: Path
    sets: Path | None
    split: int


def _places(data: Path) -> list[_Place]:
    if not data.is_dir():
        return []
    below = folders(data)
    whole = _inside(data, below)
    if whole is not None:
        return [whole]
    parts = [(f, place) for f in below if (place := _inside(f, folders(f))) is not None]
    if len(parts) == 1:
        return [parts[0][1]]
    if parts:  # a folder for each split, or for each year, which all belong to the dataset
        return [
            replace(place, split=split if (split := split_of(f.name)) is not None else NO_SPLIT) for f, place in parts
        ]
    if _has_boxes(data):
        return [_Place(data, data, None, NO_SPLIT)]
    return [_Place(f, f, None, split) for f in below if (split := split_of(f.name)) is not None and _has_boxes(f)]


def _inside(root: Path, inner: list[Path]) -> _Place | None:
    """A folder that holds one of annotations and one of images."""
    annotations, images = _named(inner, _ANNOTATION_FOLDERS), _named(inner, _IMAGE_FOLDERS)
    if annotations is None or images is None or not _has_boxes(annotations):
        return None
    if annotations.name.lower() == "labels" and any(p.suffix == ".txt" for p in annotations.iterdir()):
        return None  # YOLO's, beside which XML lies
    sets = root / "ImageSets" / "Main"
    return _Place(annotations, images, sets if sets.is_dir() else None, NO_SPLIT)


def _named(candidates: list[Path], names: tuple[str, ...]) -> Path | None:
    return next((f for name in names for f in candidates if f.name.lower() == name), None)


def _xmls(folder: Path) -> Iterator[Path]:
    return (p for p in folder.iterdir() if p.suffix.lower() == ".xml" and p.name[0] != "." and is_regular(p))


def _has_boxes(folder: Path) -> bool:
    """Whether one of some XML files is an annotation, by its first 64 kilobytes."""
    for path in islice(_xmls(folder), 20):
        with open(path, "rb") as handle:
            head = handle.read(65536).replace(b"\0", b"")
        if b"<annotation" in head or b"<bndbox" in head:
            return True
    return False


def _titles(places: list[_Place], data: Path) -> str:
    return ", ".join(dict.fromkeys(_title(place, data) for place in places))


def _title(place: _Place, data: Path) -> str:
    if place.annotations == place.images:
        return "XML files beside their images"
    names = [place.annotations.relative_to(data).as_posix(), place.images.relative_to(data).as_posix()]
    return " and ".join(names) + (" with ImageSets" if place.sets is not None else "")


class _Reader:
    """One reading: what has been found in the places so far."""

    def __init__(self, samples: Samples, how: How) -> None:
        self.samples = samples
        self.how = how
        self.listings = Listings()
        self.problems: list[Problem] = []
        self.classes: dict[str, int] = {}
        self.notes: list[str] = []

    def read_place(self, place: _Place) -> None:
        """A row for every annotated image that belongs to the dataset."""
        stems = {p.stem: p for p in sorted(_xmls(place.annotations))}
        wanted = self._wanted(place, stems)
        by_stem = {Path(n).stem: n for n in reversed(self.listings.images(str(place.images)))}
        files = [place.images / n for n in self.listings.names(str(place.images))]
        unread = {p.stem: p for p in unread_pictures(files)}
        used = set()
        for stem, split in wanted:
            root, file = self._parse(stems[stem])
            name = by_stem.get(stem)
            path = f"{place.images}/{name}" if name else self._by_filename(place, root)
            if path is not None:
                used.add(path)
            if root is None:
                continue
            if path is None and stem in unread:
                self.problems.append(unread_picture(self.samples.name(unread[stem]), unread[stem]))
                continue
            if path is None:
                self._bad("missing_image", file, "There is no image of this name.", lost=True)
                continue
            size = (
                _number((root.findtext("size/width") or "").strip()),
                _number((root.findtext("size/height") or "").strip()),
            )
            self._read_objects(self.samples.add(self.samples.name(path), split, file, size=size), root)
        for name in self.listings.images(str(place.images)):
            path = f"{place.images}/{name}"
            if path not in used and Path(name).stem not in stems:
                self._bad("missing_label", self.samples.name(path), "There is no XML file for the image: left out.")

    def _wanted(self, place: _Place, stems: dict[str, Path]) -> list[tuple[str, int]]:
        """Annotated stems with their splits, as the lists say where there are any, ordered by split."""
        lists = {name: self._list(place.sets / f"{name}.txt") for name in _SETS} if place.sets is not None else {}
        if not lists.get("train") and not lists.get("val") and lists.get("trainval"):
            lists["train"] = lists["trainval"]
            self.notes.append("trainval.txt taken as train")
        chosen = [(stem, i) for i, name in enumerate(SPLITS) for stem in dict.fromkeys(lists.get(name) or ())]
        if not chosen:
            return [(stem, place.split) for stem in stems]
        for stem, split in chosen:
            if stem not in stems:
                item = f"{self.samples.name(place.sets or '')}/{SPLITS[split]}.txt: {stem}"
                self._bad("missing_label", item, "The list names what has no XML file.", lost=True)
        listed = {stem for stem, _ in chosen}
        extra = [stem for stem in stems if stem not in listed]
        for stem in extra:
            self._bad("missing_label", self.samples.name(stems[stem]),
                      "It is annotated, but in no list of ImageSets/Main: left out.")  # fmt: skip
        if extra:
            self.notes.append(f"{len(extra)} annotated images are in no list of ImageSets/Main and left out")
        return [(stem, split) for stem, split in chosen if stem in stems]

    def _list(self, path: Path) -> list[str]:
        if not is_regular(path):
            return []
        try:
            lines = read_text(path, self.how.encoding, 1_000_000_000).splitlines()
        except ValueError as error:
            raise DataError(str(error), where=str(path), next="save the list as UTF-8, one name per line") from error
        names = [line.split() for line in lines if line.strip()]
        names = [words for words in names if len(words) < 2 or words[-1] != "-1"]  # -1: the class is not in the image
        known = [" ".join(words[:-1]) if len(words) > 1 and words[-1] in ("0", "1") else " ".join(words)
                 for words in names]  # fmt: skip
        return [Path(name).stem if is_image(Path(name)) or name.lower().endswith(".xml") else name for name in known]

    def _parse(self, path: Path) -> tuple[ElementTree.Element | None, str]:
        file = self.samples.name(path)
        try:
            return _parse_xml(path, self.how.encoding), file
        except ValueError as error:
            self._bad("unreadable", file, str(error), lost=True)
            return None, file

    def _by_filename(self, place: _Place, root: ElementTree.Element | None) -> str | None:
        name = (
            (root.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2] if root is not None else ""
        )
        return self.listings.find(str(place.images), name) if name else None

    def _read_objects(self, row: int, root: ElementTree.Element) -> None:
        file = self.samples.files[row]
        objects = root.findall("object")
        others = sum(1 for _ in root.iter("bndbox")) - sum(1 for e in objects for _ in e.iter("bndbox"))
        if others > 0:
            self._bad("bad_box", file, f"{others} boxes stand outside of an object: left out.")
        for position, entry in enumerate(objects, start=1):
            name = (entry.findtext("name") or "").strip()
            texts = [(entry.findtext(f"bndbox/{key}") or "").strip() for key in ("xmin", "ymin", "xmax", "ymax")]
            box = [_number(text) for text in texts]
            if not name:
                self._bad("bad_box", f"{file}:{position}", "The object has no name.")
            elif not all(map(math.isfinite, box)):
                self._bad("bad_box", f"{file}:{position}", f"{shown(' '.join(texts))} is no box of four numbers.")
            else:
                kind = self.classes.setdefault(name, len(self.classes))
                difficult = (entry.findtext("difficult") or "").strip() == "1" and self.how.crowds != "learn"
                self.samples.objects.add(row, box, kind, position, crowd=difficult)

    def make_edges(self) -> bool:
        """Turn corners into edges; returns whether they are counted from 0."""
        boxes = np.frombuffer(self.samples.objects.boxes, np.float64).reshape(-1, 4)  # changes them in place
        if (boxes[:, :2] == 0).any():
            return True
        boxes[:, :2] -= 1
        for low, high in ((0, 2), (1, 3)):
            flat = boxes[:, high] <= boxes[:, low] + 1  # the same pixel, or reversed: no object, left to the audit
            boxes[flat, high] -= 1
        return False

    def _bad(self, kind: str, item: str, message: str, *, lost: bool = False) -> None:
        self.problems.append(problem(kind, item, message, lost=lost))


def _number(text: str) -> float:
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan
    return value if abs(value) < 3e38 else math.nan


def _parse_xml(path: Path, encoding: str | None) -> ElementTree.Element:
    """The root of an annotation file.

    Raises:
        ValueError: it cannot be read, is no XML, is no annotation, or declares types or entities (a few lines of them
            can expand to gigabytes, or name other files).
    """
    data = read_bytes(path)
    declared = _DECLARED.match(data.lstrip())
    try:
        text = decode_text(data, encoding)
        if declared is not None and encoding is None and not data.isascii():
            text = decode_text(data, declared[1].decode("ascii"))
    except ValueError:
        text = decode_text(data)
    text = _DECLARATION.sub("", text.removeprefix("\ufeff"), count=1)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("The XML declares a document type or entities, which are not read.")
    try:
        root = ElementTree.fromstring(text)  # noqa: S314 - without entities, and of 10 MB at most
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise ValueError(f"The file is no whole XML: {error}.") from error
    if root.tag != "annotation":
        raise ValueError(f"The XML is of {shown(root.tag)}, not an annotation.")
    return root
