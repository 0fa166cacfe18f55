"""What a YOLO dataset's yaml or folders say: where images and labels are, the classes, and the form of a label line."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from goodfit.config.yaml12 import read_yaml
from goodfit.core.errors import DataError, RequestError
from goodfit.data.formats.read_objects import followed, read_text, shown, split_of
from goodfit.data.index import NO_SPLIT, SPLITS
from goodfit.data.masks import pack_polygons
from goodfit.data.reading import How, Problem, clean, folders, is_image, is_regular, problem

NO_LABELS = frozenset(  # texts that stand among label files
    ("classes.txt", "train.txt", "val.txt", "valid.txt", "test.txt", "readme.txt", "license.txt", "requirements.txt")
)
_KEYS = re.compile(r"^\s*[\"']?(train|val|names|nc)[\"']?\s*:", re.MULTILINE)
_NAME_FILES = ("classes.txt", "obj.names", "labels/classes.txt", "data/obj.names")
_MAX_CLASSES = 100_000


@dataclass(slots=True)
class Layout:
    """Where a dataset's images and labels are, and what its classes are called."""

    root: Path
    file: Path | None  # the yaml
    bases: list[Path]  # what the yaml's paths may start from
    sources: list[tuple[int, str]]  # split, and a folder or list of images
    title: str
    names: dict[int, str] | None = None  # by class number; None where nothing names the classes
    skip_missing: bool = False
    boxes_only: bool = False  # lines go on with key points
    encoding: str | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def is_yolo_yaml(path: Path) -> bool:
    """Whether a yaml has keys of YOLO's; False also for what cannot be read. Never raises."""
    try:
        return _has_keys(path)
    except (OSError, ValueError):
        return False


def _has_keys(path: Path) -> bool:
    if path.suffix.lower() not in (".yaml", ".yml") or not is_regular(path):
        return False
    found = set(_KEYS.findall(read_text(path, limit=1_000_000)))
    return bool(found & {"train", "val"} and found & {"names", "nc"})


def yamls(data: Path) -> list[Path]:
    """The YOLO yaml files at the top of a folder, sorted.

    Raises:
        OSError: the folder cannot be read.
    """
    return sorted(p for p in data.iterdir() if is_yolo_yaml(p)) if data.is_dir() else []


def layout_of(data: Path, how: How) -> Layout:
    """What a yaml says, or the folder that holds one, or the folders images/ and labels/.

    Raises:
        DataError: none of these is there, several are, or the yaml cannot be used.
        OSError: the folder cannot be read.
    """
    if data.is_file():
        return _from_yaml(data, how)
    found = yamls(data)
    if how.annotations is not None:
        found = [p for p in found if how.annotations in p.name] or [p for p in (data / how.annotations,) if p.is_file()]
    if len(found) > 1:
        names = clean(", ".join(p.name for p in found))
        raise DataError(f"There are several YOLO yaml files, and it is not clear which to use: {names}.",
                        where=str(data), next=f"say which: annotations={clean(found[0].name)}")  # fmt: skip
    if found:
        return _from_yaml(found[0], how)
    pairs = pairs_of(data) if data.is_dir() else []
    if not pairs:
        raise DataError("There is neither a YOLO yaml nor a folder images/ beside labels/.", where=str(data),
                        next="give the yaml, or the folder that holds it")  # fmt: skip
    return _from_folders(data, pairs, how)


def _from_folders(data: Path, pairs: list[tuple[int, Path]], how: How) -> Layout:
    layout = Layout(data, None, [data], [(s, str(p)) for s, p in pairs], "images/ and labels/ without a yaml")
    layout.encoding = how.encoding
    if (
        len(pairs) == 1
        and pairs[0][0] == NO_SPLIT
        and any(split_of(f.name) is not None for f in folders(followed(data / "images")))
    ):
        layout.notes.append("images lie also outside of folders that are named as splits: all are split anew")
    for other in sorted(p for p in data.iterdir() if p.suffix.lower() in (".yaml", ".yml") and p.is_file()):
        text = "It is not a readable YOLO yaml with train or val, and names: not used."
        layout.problems.append(problem("wrong_type", other.name, text))
    file = next((data / n for n in _NAME_FILES if is_regular(data / n)), None)
    if file is None:
        layout.notes.append("nothing names the classes: they are called by their numbers")
        return layout
    try:
        lines = [line.strip() for line in read_text(file, how.encoding).splitlines()]
    except ValueError as error:
        raise DataError(str(error), where=str(file), next="save it as UTF-8, one class per line") from error
    while lines and not lines[-1]:
        lines.pop()
    layout.names = dict(enumerate(lines))
    layout.notes.append(f"class names from {file.name}")
    return layout


def pairs_of(data: Path) -> list[tuple[int, Path]]:
    """Folders of images with labels beside them, and their splits: images/train + labels/train, or train/images."""
    if not data.is_dir():
        return []
    images, labels = followed(data / "images"), data / "labels"
    if images.is_dir() and labels.is_dir():
        named = [(split, f) for f in folders(images) if (split := split_of(f.name)) is not None]
        loose = [f for f in folders(images) if split_of(f.name) is None]
        if named and not loose and not any(is_image(p) for p in images.iterdir()):
            return [(split, data / "images" / f.name) for split, f in named]
        return [(NO_SPLIT, data / "images")]
    return [(split, f / "images") for f in folders(data) if (split := split_of(f.name)) is not None
            and followed(f / "images").is_dir() and (f / "labels").is_dir()]  # fmt: skip


def labels_of(images: Path) -> Path:
    """The folder of the labels of a folder of images."""
    return Path(label_path(f"{images}/x")).parent


def has_labels(folder: Path) -> bool:
    """Whether one of the first text files begins with a label line, or all are empty."""
    texts = [p for p in sorted(folder.iterdir())[:50] if p.suffix == ".txt" and p.name.lower() not in NO_LABELS]
    lines = []
    for path in texts:
        try:
            lines.append((read_text(path).splitlines() or [""])[0] if is_regular(path) else "?")
        except ValueError:
            lines.append("?")
    full = [line for line in lines if line.strip()]
    return bool(lines) and (not full or any(isinstance(parse_line(line), tuple) for line in full))


def _from_yaml(file: Path, how: How) -> Layout:
    try:
        content = read_yaml(file)
    except RequestError as error:
        raise DataError(clean(error.message), where=str(file), next="mend the yaml") from error
    except Exception as error:  # PyYAML raises many kinds for odd tags and numbers
        raise DataError(f"The yaml cannot be read: {clean(str(error))}.", where=str(file), next="mend it") from error
    folder = file.parent
    layout = Layout(folder, file, _bases(folder, content.get("path")), [], file.name)
    layout.encoding = how.encoding
    layout.names = _names(file, content, layout)
    layout.skip_missing = content.get("skip_if_label_file_missing") is True
    if "kpt_shape" in content:
        layout.boxes_only = True
        layout.notes.append("key points are not read")
    for split, name in enumerate(SPLITS):
        value = content.get(name, content.get("valid") if name == "val" else None)
        if value is None or value == "":
            continue
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, str) and "\0" not in v for v in values):
            raise DataError(f"`{name}` is neither a folder nor a list of images: {shown(value)}.", where=str(file),
                            next=f"write: {name}: images/{name}")  # fmt: skip
        layout.sources += [(split, v) for v in values]
    if not layout.sources:
        raise DataError("The yaml names no images: it has none of train, val, test.", where=str(file),
                        next="write: train: images/train")  # fmt: skip
    return layout


def _bases(folder: Path, path: object) -> list[Path]:
    """What the yaml's paths may start from: its `path`, or what is left of that on this machine."""
    bases = [folder]
    if isinstance(path, str) and path and "\0" not in path:
        path = path.replace("\\", "/")
        bases = [folder / path, folder / path.rstrip("/").rpartition("/")[2], folder, folder.parent / path]
    return [b for b in dict.fromkeys(bases) if os.path.isdir(followed(b))] or [folder]


def _names(file: Path, content: dict[str, Any], layout: Layout) -> dict[int, str] | None:
    names, num = content.get("names"), content.get("nc")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if isinstance(names, dict) and names:
        made: dict[int, str] = {}
        for key, name in names.items():
            number = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else key
            if type(number) is not int or not 0 <= number < 2**31 or isinstance(name, list | dict) or number in made:
                raise DataError(f"`names` has an entry that is no class: {shown(key)}: {shown(name)}.", where=str(file),
                                next="write one line per class: 0: name")  # fmt: skip
            made[number] = "null" if name is None else str(name)
        if num is not None and num != len(made):
            item = problem("wrong_type", file.name, f"nc is {shown(num)}, but there are {len(made)} names: nc ignored.")
            layout.problems.append(item)
        return made
    if names is not None:
        raise DataError(f"`names` is no list of classes: {shown(names)}.", where=str(file),
                        next="write one line per class: 0: name")  # fmt: skip
    layout.notes.append("nothing names the classes: they are called by their numbers")
    if type(num) is int and 0 < num <= _MAX_CLASSES:
        return {i: str(i) for i in range(num)}
    return None


def label_path(image: str) -> str:
    """Where an image's label file is: the last /images/ of its path made /labels/, and .txt."""
    stem = os.path.splitext(image)[0]
    at = stem.rfind("/images/")
    return f"{stem[:at]}/labels/{stem[at + 8 :]}.txt" if at >= 0 else f"{stem}.txt"


def parse_line(line: str, boxes_only: bool = False) -> tuple[int, tuple[float, ...], bytes] | str:
    """Class number, box (left, top, right, bottom) and polygon of a line, or what is wrong with it."""
    words = line.split()
    if boxes_only:
        words = words[:5]
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        last = "; is the last a confidence, as predictions have it?" if len(words) >= 6 and len(words) % 2 == 0 else ""
        return f"{len(words)} numbers are neither a box (5) nor a polygon (1 and 3 or more pairs){last}"
    try:
        if "_" in line or not line.isascii():  # float() takes 1_0, and digits of other scripts
            raise ValueError
        values = [float(word) for word in words]
    except ValueError:
        return "not all are numbers"
    if not all(math.isfinite(v) and abs(v) < 3e38 for v in values):
        return "a number is not finite"
    kind = values[0]
    if not kind.is_integer() or not 0 <= kind < 2**31:
        return f"{shown(words[0])} is no class number"
    if len(values) == 5:
        x, y, width, height = values[1:]
        return int(kind), (x - width / 2, y - height / 2, x + width / 2, y + height / 2), b""
    points = np.array(values[1:]).reshape(-1, 2)
    try:
        mask = pack_polygons([points])
    except ValueError as error:
        return str(error)
    return int(kind), (*points.min(axis=0).tolist(), *points.max(axis=0).tolist()), mask
