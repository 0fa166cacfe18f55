"""Recognise how a dataset is laid out and read it into a `DatasetIndex`, without opening an image."""

from __future__ import annotations

import csv
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from goodfit.core.errors import DataError
from goodfit.data.index import NO_GROUP, NO_SPLIT, SPLITS, DatasetIndex

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".png",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".webp",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".avif",
        ".jp2",
        ".tga",
        ".ico",
    ]
)
SPLIT_SPELLINGS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst"),
}
_PATH_COLUMNS = ("path", "image", "file", "filename", "file_name", "filepath", "image_path", "img", "image_file")
_LABEL_COLUMNS = ("label", "class", "category", "class_name", "target", "labels", "classname")
_SPLIT_COLUMNS = ("split", "subset", "set", "partition")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A dataset as read, and what was noticed on the way.

    Attributes:
        index: The samples.
        format: "folders" or "csv".
        note: How the layout was recognised, in one line.
        given_splits: Which of train, val, test the data itself names.
        not_images: Files among the images that are none.
        missing_labels: Images or rows without a class.
        missing_images: Rows whose file does not exist.
    """

    index: DatasetIndex
    format: str
    note: str
    given_splits: tuple[str, ...]
    not_images: tuple[str, ...] = ()
    missing_labels: tuple[str, ...] = ()
    missing_images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which CSV columns a person named; None where they are to be guessed."""

    image: str | None = None
    label: str | None = None
    split: str | None = None
    group: str | None = None


def read_dataset(data: Path, *, format: str | None = None, columns: Columns | None = None) -> Reading:
    """Read a folder of class folders or a CSV list.

    Raises:
        DataError: the path does not exist, holds no images, has one class only, or its layout is not known.
    """
    columns = columns or Columns()
    if not data.exists():
        raise DataError(
            "There is no such file or folder.", where=str(data), next="check the path: goodfit train FOLDER"
        )
    if data.is_file():
        if format == "folders" or data.suffix.lower() not in (".csv", ".tsv"):
            raise DataError("This is a file, and neither a CSV list nor a folder of class folders.", where=str(data),
                            next="give the folder that holds one folder per class")  # fmt: skip
        return _read_csv(data, columns)
    lists = sorted(p for p in data.glob("*.[ct]sv") if p.is_file())
    if format == "csv" or columns != Columns():
        if len(lists) != 1:
            raise DataError(
                f"The folder holds {len(lists)} CSV files, so it is not clear which one is the list.",
                where=str(data),
                next="give the CSV file itself: goodfit train FOLDER/list.csv",
            )
        return _read_csv(lists[0], columns)
    try:
        reading = _read_folders(data)
    except DataError:
        if format is None and len(lists) == 1 and not _has_images(data):
            return _read_csv(lists[0], columns)
        raise
    return reading


def _read_folders(root: Path) -> Reading:
    children = _folders(root)
    given = {split: child for child in children for split, names in SPLIT_SPELLINGS.items()
             if child.name.lower() in names}  # fmt: skip
    split_roots: list[tuple[int, Path]]
    if "train" in given and len(given) > 1:
        split_roots = [(SPLITS.index(s), given[s]) for s in SPLITS if s in given]
        extra = [c.name for c in children if c not in given.values() and _has_images(c)]
        if extra:
            raise DataError(f"Beside {', '.join(p.name for p in given.values())} there are folders with images: "
                            f"{', '.join(extra)}.", where=str(root),
                            next="move them away, or put them into one of the splits")  # fmt: skip
    else:
        split_roots = [(NO_SPLIT, root)]
        if len(children) == 1 and _folders(children[0]) and not _loose_images(children[0]):
            raise DataError("There is one folder, and it holds folders: the class folders may be one level down.",
                            where=str(root), next=f"try: goodfit train {children[0]}")  # fmt: skip
    rows: list[tuple[str, str, int]] = []
    not_images: list[str] = []
    missing_labels: list[str] = []
    for split, split_root in split_roots:
        missing_labels += [_relative(p, root) for p in _loose_images(split_root)]
        for folder in _folders(split_root):
            for file in _files(folder):
                if file.suffix.lower() in IMAGE_SUFFIXES:
                    rows.append((_relative(file, root), folder.name, split))
                else:
                    not_images.append(_relative(file, root))
    if not rows:
        _refuse_no_rows(root, missing_labels)
    index = _index(root, rows, {})
    names = [root_.name for _, root_ in split_roots]
    layout = f"class folders under {', '.join(names)}" if given and len(given) > 1 else "one folder per class"
    return Reading(
        index=index,
        format="folders",
        note=layout,
        given_splits=tuple(s for s in SPLITS if s in given) if len(given) > 1 and "train" in given else (),
        not_images=tuple(not_images),
        missing_labels=tuple(missing_labels),
    )


def _refuse_no_rows(root: Path, loose: list[str]) -> None:
    if loose:
        raise DataError(f"There are {len(loose)} images, but no class folders around them.", where=str(root),
                        next="put the images of each class into a folder of its name, or give a CSV list")  # fmt: skip
    if not any(root.iterdir()):
        raise DataError("The folder is empty.", where=str(root), next="put one folder of images per class into it")
    raise DataError("No images were found.", where=str(root),
                    next="give the folder that holds one folder per class, with images in each")  # fmt: skip


def _read_csv(path: Path, columns: Columns) -> Reading:
    header, body = _csv_rows(path)
    image = _column(path, header, columns.image, _PATH_COLUMNS, "image paths", "image_column")
    label = _column(path, header, columns.label, _LABEL_COLUMNS, "class names", "label_column")
    split = _optional_column(path, header, columns.split, _SPLIT_COLUMNS, "split_column")
    group = _optional_column(path, header, columns.group, (), "group")
    spelled = {name: i for i, s in enumerate(SPLITS) for name in SPLIT_SPELLINGS[s]}
    root = path.parent
    rows: list[tuple[str, str, int]] = []
    groups: dict[str, str] = {}
    missing_labels: list[str] = []
    missing_images: list[str] = []
    for row in body:
        file, name = row[image].strip().replace("\\", "/"), row[label].strip()
        if not file:
            continue
        if not name:
            missing_labels.append(file)
        elif not (root / file).is_file():
            missing_images.append(file)
        else:
            number = NO_SPLIT
            if split is not None:
                word = row[split].strip().lower()
                if word and word not in spelled:
                    raise DataError(f"The split {row[split]!r} of {file} is none of train, val, test.", where=str(path))
                number = spelled.get(word, NO_SPLIT)
            rows.append((file, name, number))
            if group is not None and row[group].strip():
                groups[file] = row[group].strip()
    if not rows:
        detail = f"; {len(missing_images)} files named in it do not exist" if missing_images else ""
        raise DataError(f"The list names no image with a class{detail}.", where=str(path),
                        next="paths in the list start from its own folder")  # fmt: skip
    rows = list(dict.fromkeys(rows))
    given = tuple(s for i, s in enumerate(SPLITS) if any(r[2] == i for r in rows))
    chosen = f"columns {header[image]!r} and {header[label]!r}"
    return Reading(
        index=_index(root, rows, groups),
        format="csv",
        note=f"{path.name}: {chosen}" + (f", splits from {header[split]!r}" if split is not None and given else ""),
        given_splits=tuple(s for s in SPLITS if s in given or s == "train") if given else (),
        missing_labels=tuple(missing_labels),
        missing_images=tuple(missing_images),
    )


def _csv_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The list cannot be read: {error}.", where=str(path), next="save it as UTF-8") from error
    first = text.splitlines()[0] if text.strip() else ""
    delimiter = max((",", ";", "\t"), key=first.count)
    rows = [row for row in csv.reader(text.splitlines(), delimiter=delimiter) if row]
    if len(rows) < 2:
        raise DataError("The list is empty: it needs a line of column names and one line per image.", where=str(path))
    header = [name.strip() for name in rows[0]]
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise DataError(f"Line {number} has {len(row)} columns, not {len(header)}.", where=str(path),
                            next="mend that line; quote names that contain the delimiter")  # fmt: skip
    return header, rows[1:]


def _column(path: Path, header: list[str], asked: str | None, guesses: tuple[str, ...], what: str, option: str) -> int:
    found = _optional_column(path, header, asked, guesses, option)
    if found is None:
        raise DataError(f"No column of {what} was recognised among {', '.join(header)}.", where=str(path),
                        next=f"name it: {option}=COLUMN")  # fmt: skip
    return found


def _optional_column(
    path: Path, header: list[str], asked: str | None, guesses: tuple[str, ...], option: str
) -> int | None:
    if asked is not None:
        if asked not in header:
            raise DataError(f"{option}={asked}: the columns are {', '.join(header)}.", where=str(path))
        return header.index(asked)
    lower = [name.lower() for name in header]
    return next((lower.index(guess) for guess in guesses if guess in lower), None)


def _index(root: Path, rows: list[tuple[str, str, int]], groups: dict[str, str]) -> DatasetIndex:
    rows.sort()
    names = tuple(sorted({name for _, name, _ in rows}))
    if len(names) < 2:
        raise DataError(f"There is one class only: {names[0]}.", where=str(root),
                        next="a classifier needs at least two class folders")  # fmt: skip
    number = {name: i for i, name in enumerate(names)}
    group_number = {name: i for i, name in enumerate(sorted(set(groups.values())))}
    return DatasetIndex(
        root=root,
        paths=tuple(path for path, _, _ in rows),
        targets=np.array([number[name] for _, name, _ in rows], np.int64),
        class_names=names,
        splits=np.array([split for _, _, split in rows], np.int8),
        groups=np.array([group_number[groups[p]] if p in groups else NO_GROUP for p, _, _ in rows], np.int64),
    )


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX")))


def _loose_images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and _is_regular(p))


def _has_images(folder: Path) -> bool:
    return any(p.suffix.lower() in IMAGE_SUFFIXES for p in _files(folder))


def _files(folder: Path) -> list[Path]:
    """Regular files below a folder, sorted; hidden ones are skipped, and a loop of links is walked once."""
    found = []
    seen = set()
    for base, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(base) / f for f in files if not f.startswith(".") and _is_regular(Path(base) / f)]
    return sorted(found)


def _is_regular(path: Path) -> bool:
    """True for a plain file: opening a FIFO would wait for ever."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False
