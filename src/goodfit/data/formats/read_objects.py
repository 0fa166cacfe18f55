"""What the readers of boxes and masks share: building columns of objects, finding files, decoding texts."""

from __future__ import annotations

import codecs
import math
import os
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError
from goodfit.data.columns import NO_MASK, POLYGONS, Blobs, Objects, Strings
from goodfit.data.formats.groups import group_names, group_numbers
from goodfit.data.index import NO_GROUP, SPLITS, DatasetIndex
from goodfit.data.masks import unpack_polygons
from goodfit.data.reading import How, Problem, Reading, clean, is_image, split_number

MAX_LABEL_BYTES = 10_000_000  # of one image's annotation file; the largest honest ones have some hundred kilobytes
MASKS_SHARE = 0.95  # of the objects that must have a mask for masks to be learned where no task is asked for
CLOSE = 1e-5  # of the largest coordinate: what 32 bits and six decimals may differ by
RECTANGLE_BYTES = 8 + 5 * 8  # of one ring with five points at most, as pack_polygons has it
_MAX_SHOWN = 60  # characters of a user's text within a message
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def shown(value: object) -> str:
    """A value from a user's file for a message: printable, and cut to 60 characters."""
    try:
        text = ascii(value) if not isinstance(value, str) else repr(value[: 2 * _MAX_SHOWN])
    except (ValueError, RecursionError):  # a whole number of over 4,300 digits, or lists in lists
        text = f"a {type(value).__name__}"
    return clean(text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "...")


def read_bytes(path: Path, limit: int = MAX_LABEL_BYTES) -> bytes:
    """The bytes of an annotation file.

    Raises:
        ValueError: it cannot be read or is larger than `limit` bytes; the message says which.
    """
    try:
        with open(path, "rb") as handle:
            data = handle.read(limit + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"The file cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if len(data) > limit:
        raise ValueError(f"The file is larger than {limit // 1_000_000} MB.")
    return data


def decode_text(data: bytes, encoding: str | None = None) -> str:
    """Text by its byte order mark, else in the encoding asked for, else as UTF-8, else as Latin-1.

    Raises:
        ValueError: the bytes are not in the encoding asked for, or not what their mark says, or hold a NUL.
    """
    marked = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    try:
        text = data.decode(marked or encoding or "utf-8")
    except UnicodeDecodeError as error:
        if marked or encoding:
            raise ValueError(f"The file is not in {marked or encoding}: {error.reason}.") from error
        text = data.decode("latin-1")
    except LookupError as error:
        raise ValueError(f"There is no encoding {shown(encoding)}.") from error
    if "\0" in text:
        raise ValueError("The file is not text: it holds zero bytes.")
    return text


def read_text(path: Path, encoding: str | None = None, limit: int = MAX_LABEL_BYTES) -> str:
    """read_bytes, then decode_text.

    Raises:
        ValueError: as those.
    """
    return decode_text(read_bytes(path, limit), encoding)


def number(value: object) -> float:
    """A coordinate as a float; NaN for what is no number or does not fit 32 bits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        made = float(value)
    except OverflowError:
        return math.nan
    return made if abs(made) < 3e38 else math.nan


def real_path(path: Path) -> Path:
    """A path with links that an unpacker wrote out as one-line text files followed (some zip tools and git do so)."""
    if os.path.exists(path):  # unlike Path.exists, False for a name that is too long
        return path
    for part in reversed(path.parents):
        try:
            if not os.path.isfile(part) or part.stat().st_size > 1024:
                continue
            target = part.parent / part.read_text("utf-8").strip()
            if os.path.isdir(target):
                return target / path.relative_to(part)
        except (OSError, ValueError):
            return path
    return path


def followed(path: Path) -> Path:
    """real_path, also where the path itself is such a written-out link."""
    return real_path(path / "x").parent if os.path.isfile(path) and not path.suffix else real_path(path)


class Listings:
    """Which files are in which folder: each folder is listed once, so a million look-ups cost no file access each."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, str]] = {}
        self._folded: dict[str, dict[str, str]] = {}

    def names(self, folder: str) -> dict[str, str]:
        """Regular files directly in a folder, by name; empty where there is no such folder."""
        known = self._names.get(folder)
        if known is None:
            try:
                with os.scandir(folder) as entries:
                    known = {e.name: e.name for e in entries if e.is_file()}
            except (OSError, ValueError):  # ValueError: a NUL or what cannot be encoded in the name
                known = {}
            self._names[folder] = known
        return known

    def find(self, folder: str, name: str) -> str | None:
        """The path of a file by a name that may hold folders, or None.

        Case and Unicode composition are forgiven where that leaves one file, as for data made on another system.
        """
        head, _, tail = name.rpartition("/")
        if head:
            folder = os.path.normpath(f"{folder}/{head}")
        names = self.names(folder)
        if not names:
            return None
        found = names.get(tail) or self._fold(folder).get(_folded(tail))
        return f"{folder}/{found}" if found else None

    def _fold(self, folder: str) -> dict[str, str]:
        known = self._folded.get(folder)
        if known is None:
            known = {}
            for name in self.names(folder):
                key = _folded(name)
                known[key] = "" if key in known else name
            self._folded[folder] = known
        return known

    def images(self, folder: str) -> list[str]:
        """Visible files in a folder that are named as images, sorted."""
        return sorted(n for n in self.names(folder) if not n.startswith(".") and is_image(Path(n)))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


class ObjectsBuilder:
    """Collects objects in any order of their samples; tens of bytes each."""

    def __init__(self) -> None:
        self.rows, self.numbers = array("q"), array("q")
        self.boxes = array("d")
        self.classes = array("q")
        self.crowd, self.kept, self.kinds = array("B"), array("B"), array("B")
        self.areas = array("d")
        self.masks: list[bytes] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(
        self, row: int, box: Sequence[float], kind: int, where: int, *, crowd: bool = False, kept: bool = True,
        mask_kind: int = NO_MASK, mask: bytes = b"", area: float = math.nan,
    ) -> None:  # fmt: skip
        """One object: its sample, box (left, top, right, bottom), class, number in the annotation file, and its area as stated there."""
        self.rows.append(row)
        self.boxes.extend(box)
        self.classes.append(kind)
        self.numbers.append(where)
        self.crowd.append(crowd)
        self.kept.append(kept)
        self.kinds.append(mask_kind)
        self.masks.append(mask)
        self.areas.append(area)

    def num_masks(self) -> tuple[int, int]:
        """How many objects have a mask, and of how many of these it is their box again, a polygon of four corners."""
        masks = boxes = 0
        for number, (kind, mask) in enumerate(zip(self.kinds, self.masks, strict=True)):
            masks += kind != NO_MASK
            if kind == POLYGONS and len(mask) <= RECTANGLE_BYTES:
                boxes += _is_box(unpack_polygons(mask), np.array(self.boxes[4 * number : 4 * number + 4]))
        return masks, boxes

    def build(
        self, files: Iterable[str], *, class_map: npt.NDArray[np.int64] | None, relative: bool, with_masks: bool,
        declared: Sequence[tuple[float, float]],
    ) -> Objects:  # fmt: skip
        """The columns, ordered by sample and else as added.

        Args:
            files: Annotation file of each sample.
            declared: Width and height that the annotations say of each sample, NaN where they do not.
            class_map: New number of each class number used so far; None keeps them.
            relative: As Objects.relative.
            with_masks: False drops the masks, for detection.
        """
        files = Strings(files)
        rows = np.array(self.rows, np.int64)
        order = np.argsort(rows, kind="stable")
        classes = np.array(self.classes, np.int64)[order]
        if class_map is not None and len(classes):
            classes = class_map[classes]
        kinds = np.array(self.kinds, np.uint8)[order]
        with np.errstate(over="ignore"):
            boxes = np.array(self.boxes, np.float64).reshape(-1, 4)[order].astype(np.float32)
        return Objects(
            starts=np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=len(files))))).astype(np.int64),
            boxes=boxes,
            classes=classes.astype(np.int32),
            crowd=np.array(self.crowd, np.uint8)[order].astype(bool),
            kept=np.array(self.kept, np.uint8)[order].astype(bool) if with_masks else np.ones(len(rows), bool),
            masks=Blobs([self.masks[i] for i in order.tolist()] if with_masks else [b""] * len(rows)),
            mask_kinds=kinds if with_masks else np.zeros_like(kinds),
            files=files,
            numbers=np.array(self.numbers, np.int64)[order],
            areas=np.array(self.areas, np.float64)[order] if not np.isnan(np.array(self.areas)).all() else None,
            declared=np.array(declared, np.float64).reshape(-1, 2),
            relative=relative,
        )


def _is_box(rings: list[npt.NDArray[np.float32]], box: npt.NDArray[np.float64]) -> bool:
    """Whether polygons are the four corners of a box, and nothing else."""
    if len(rings) != 1 or not 4 <= len(rings[0]) <= 5 or not np.isfinite(box).all():
        return False
    limit = CLOSE * max(1.0, float(np.abs(box).max()))
    near = np.abs(rings[0][:, [0, 1, 0, 1]] - box) <= limit  # left, top, right, bottom
    at_corner = (near[:, 0] | near[:, 2]) & (near[:, 1] | near[:, 3])
    return bool(at_corner.all()) and len({(bool(right), bool(low)) for right, low in near[:, 2:]}) == 4


@dataclass(slots=True)
class Samples:
    """The samples found so far: path, split and annotation file of each, and their objects."""

    root: Path
    paths: list[str] = field(default_factory=list)
    splits: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    sizes: list[tuple[float, float]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)  # as annotations have them
    objects: ObjectsBuilder = field(default_factory=ObjectsBuilder)

    def add(
        self, path: str, split: int, file: str, *, size: tuple[float, float] = (math.nan, math.nan), group: str = ""
    ) -> int:
        """One more sample; returns its row.

        Args:
            size: Width and height that the annotation says, pixels.
            group: What the annotation says of where it belongs to.
        """
        self.groups.append(group)
        self.paths.append(path)
        self.splits.append(split)
        self.files.append(file)
        self.sizes.append(size)
        return len(self.paths) - 1

    def name(self, path: str | Path) -> str:
        """A path relative to the root, with forward slashes."""
        return os.path.relpath(path, self.root).replace(os.sep, "/")

    def reading(
        self, *, format: str, note: str, problems: list[Problem], class_names: Sequence[str], how: How,
        with_masks: bool, relative: bool = False, class_map: npt.NDArray[np.int64] | None = None,
    ) -> Reading:  # fmt: skip
        """The finished reading, rows as added; with how.resplit the splits are forgotten."""
        splits = np.array(self.splits, np.int8)
        if how.resplit:
            splits[:] = -1
        index = DatasetIndex(
            root=self.root,
            task="segment" if with_masks else "detect",
            paths=Strings(self.paths),
            targets=np.full(len(splits), -1, np.int64),
            class_names=_distinct([clean(n) for n in class_names]),
            splits=splits,
            groups=self._groups(how),
            objects=self.objects.build(self.files, class_map=class_map, relative=relative, with_masks=with_masks,
                                       declared=self.sizes),
        )  # fmt: skip
        given = tuple(s for i, s in enumerate(SPLITS) if (splits == i).any())
        return Reading(index=index, format=format, note=clean(note), given_splits=given, problems=tuple(problems))

    def _groups(self, how: How) -> npt.NDArray[np.int64]:
        """As the annotations have them, else by the paths; none where none were asked for."""
        if how.group is None:
            return np.full(len(self.paths), NO_GROUP, np.int64)
        return group_numbers(self.groups if any(self.groups) else group_names(self.paths, how.group))


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """The same names, with a number after one that stands there again: results are told apart by names."""
    made: dict[str, None] = {}
    for name in names:
        number = 2
        shown_as = name
        while shown_as in made:
            shown_as, number = f"{name} ({number})", number + 1
        made[shown_as] = None
    return tuple(made)


def wants_masks(how: How, masks: int, objects: int, where: str, *, boxes: int = 0) -> tuple[bool, str]:
    """Whether the task is segmentation: as asked, else where nearly all objects have a mask, since those without are nothing that masks
    could be learned from. And what is to be said of it.

    Args:
        masks: Objects that have one.
        boxes: Of these, the masks that are their boxes again, as some tools write them beside every box.

    Raises:
        DataError: the task asked for is none of boxes or masks, or there is no mask at all.
    """
    if how.task not in (None, "detect", "segment"):
        raise DataError(f"The annotations are of boxes or masks, which the task {how.task} does not use.", where=where,
                        next="try: task=detect or task=segment")  # fmt: skip
    if how.task == "segment" and objects and not masks:
        raise DataError("There are boxes, but no masks.", where=where, next="try: task=detect")
    if how.task is None and masks and boxes >= MASKS_SHARE * masks:
        return False, "; the polygons are the boxes once more (task=segment learns them as masks)"
    with_masks = how.task == "segment" or (how.task is None and masks > 0 and masks >= MASKS_SHARE * objects)
    some = f"; {masks:,} of {objects:,} objects have a mask" if 0 < masks < objects and how.task != "detect" else ""
    left = "the others are dropped" if with_masks else "too few to learn them (task=segment drops the others)"
    return with_masks, f"{some}, {left}" if some else ""


def split_words(text: str) -> Iterator[int]:
    """The split numbers of the words in a name: 0 for `instances_train2017`."""
    word = ""
    for letter in f"{text.lower()} ":
        if letter.isalpha():
            word += letter
        elif word:
            found = split_number(word)
            if found is not None:
                yield found
            word = ""


def split_of(name: str) -> int | None:
    """The split that a file's or folder's name holds as a word; None where there is none, or more than one."""
    found = set(split_words(name))
    return found.pop() if len(found) == 1 else None
