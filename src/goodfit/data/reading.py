"""What every reader of a dataset format takes and returns."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from goodfit.data.index import DatasetIndex

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
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
# Pictures all the same, which a person has to convert: no decoder is here.
UNREAD_SUFFIXES = frozenset((".heic", ".heif", ".hif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".jxl", ".psd"))
SPLIT_SPELLINGS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that a reader noticed: one item of a finding.

    Attributes:
        kind: A kind of finding: missing_label, missing_image, wrong_type, unreadable, bad_box, bad_mask,
            other_size, turned.
        item: The file, or file:line, that a person can open.
        message: What is wrong there, in one sentence; may be empty where the kind says all.
        lost: Whether a sample was lost by it, which counts towards the limit of `max_bad`.
    """

    kind: str
    item: str
    message: str = ""
    lost: bool = False


def clean(text: str) -> str:
    """Text that any stream can print and any hash encode: lone surrogates written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def problem(kind: str, item: str, message: str = "", *, lost: bool = False) -> Problem:
    """A Problem whose texts can be printed."""
    return Problem(kind, clean(item), clean(message), lost)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A dataset as read, without opening an image, and what was noticed on the way.

    Attributes:
        index: The samples.
        format: The layout's name, as `format=` takes it.
        note: How the layout was recognised, in one line.
        given_splits: Which of train, val, test the data itself names.
        problems: What a person should know; nothing here stops a run by itself.
        layouts: Of each text file, as JSON can hold it, for TextRecords to read its texts again; {} for images.
    """

    index: DatasetIndex
    format: str
    note: str
    given_splits: tuple[str, ...]
    problems: tuple[Problem, ...] = ()
    layouts: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """What a person said about how to read; None where it is to be recognised.

    Attributes:
        format: Name of the layout.
        task: "classify", "detect", "segment", "text" or "language".
        image_column, text_column, label_column, split_column, group: Columns of a table, by name or 1-based number; without a table,
            group is a key of COCO's images, "folder", or a pattern of paths (see formats/groups.py).
        header: Whether a table's first line holds column names.
        images: Folder that image names start from.
        annotations: Which annotation files, by name or pattern, where a folder holds several sets.
        crowds: "learn" takes what is marked as a crowd or as difficult for objects like others; else it is ignored.
        encoding: Of text files.
        resplit: Ignore the splits that the data names.
    """

    format: str | None = None
    task: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    group: str | None = None
    header: bool | None = None
    images: str | None = None
    annotations: str | None = None
    crowds: str | None = None
    encoding: str | None = None
    resplit: bool = False


def split_number(word: str) -> int | None:
    """0 train, 1 val, 2 test for any usual spelling, in any case; None for another word."""
    word = word.strip().lower()
    return next((i for i, names in enumerate(SPLIT_SPELLINGS.values()) if word in names), None)


def relative(path: Path, root: Path) -> str:
    """A path as the index holds it: relative to root, with forward slashes."""
    return Path(os.path.relpath(path, root)).as_posix()


def folders(root: Path) -> list[Path]:
    """Visible folders directly below, sorted; goodfit's own runs are none of the data."""
    found = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX")))
    return [p for p in found if not is_run(p) and not _holds_runs(p)]


def is_run(folder: Path) -> bool:
    """Whether a folder was made by `goodfit train` or `goodfit audit`, as those lie in data that they were started in (`goodfit train .`)."""
    with contextlib.suppress(OSError):  # a folder that cannot be entered
        if (folder / "events.jsonl").is_file():
            return (folder / "audit.json").is_file() or (folder / "request.yaml").is_file()
        return all((folder / name).is_file() for name in ("audit.json", "audit.html", "split.csv"))
    return False


def _holds_runs(folder: Path) -> bool:
    """Whether runs are all that a folder holds."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        first = next((entry for entry in entries if not entry.name.startswith(".")), None)
        return (
            first is not None and is_run(Path(first)) and all(is_run(p) for p in folder.iterdir() if p.name[0] != ".")
        )
    return False


def files_below(folder: Path) -> list[Path]:
    """Regular files below a folder, sorted; hidden ones are skipped, and a loop of links is walked once."""
    found = []
    seen = set()
    for base, names, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(n for n in names if not n.startswith((".", "__MACOSX")) and not is_run(Path(base) / n))
        found += [Path(base) / f for f in files if not f.startswith(".") and is_regular(Path(base) / f)]
    return sorted(found)


def is_regular(path: Path) -> bool:
    """True for a plain file: opening a FIFO would wait for ever."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def unread_picture(item: str, path: Path) -> Problem:
    """A sample that is lost as its picture is in a format that is not read."""
    return problem(
        "unreadable",
        item,
        f"Pictures of the kind {path.suffix.lower()} are not read: convert it to JPEG or PNG.",
        lost=True,
    )


def unread_pictures(files: Iterable[Path]) -> list[Path]:
    """Files that are named as images of a kind that is not read, but for those beside one that is, as a camera's JPEG beside its raw file."""
    files = list(files)
    read = {path.with_suffix("") for path in files if is_image(path)}
    return [p for p in files if p.suffix.lower() in UNREAD_SUFFIXES and p.with_suffix("") not in read]


def is_image(path: Path) -> bool:
    """True for a file that is named as an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES
