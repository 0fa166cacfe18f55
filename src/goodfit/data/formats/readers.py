"""Recognise how a dataset is laid out, and read it into a `DatasetIndex`, without opening an image."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from goodfit.core.errors import DataError, RequestError
from goodfit.data.formats import read_coco, read_folders, read_masks, read_table, read_text, read_voc, read_yolo
from goodfit.data.reading import How, Reading, folders

# Most telling first. Each module has recognise(data) -> note or None, and read(data, how) -> Reading.
READERS: dict[str, ModuleType] = {
    "yolo": read_yolo, "voc": read_voc, "masks": read_masks, "coco": read_coco, "table": read_table,
    "folders": read_folders, "text": read_text,
}  # fmt: skip
TASKS = {"folders": ("classify",), "table": ("classify",), "text": ("text", "language"),
         "yolo": ("detect", "segment"), "voc": ("detect",), "coco": ("detect", "segment"), "masks": ("segment", "detect")}  # fmt: skip
USED = {  # options of reading that mean something, by layout; tables and texts know all that are for tables
    "folders": ("group",), "yolo": ("group", "annotations", "encoding"), "voc": ("group", "encoding", "crowds"), "masks": ("group",),
    "coco": ("group", "images", "annotations", "encoding", "crowds"),
}  # fmt: skip
_READING = (
    "image_column",
    "text_column",
    "label_column",
    "split_column",
    "group",
    "header",
    "images",
    "annotations",
    "encoding",
    "crowds",
)
_FOR_TABLES = tuple(option for option in _READING if option != "crowds")
MAX_CHILDREN = 20  # folders that are looked into; more are classes
_TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_COMMON = ("folders", "text")  # an annotation format beside these tells more: its images or texts lie in folders anyway


def read_dataset(data: Path, how: How | None = None) -> Reading:
    """Read a dataset in the format that is asked for, or else in the one that it shows.

    Raises:
        DataError: the path does not exist, holds nothing to learn from, or could be read in several ways.
    """
    how = how or How()
    if not data.exists():
        raise DataError("There is no such file or folder.", where=str(data),
                        next="check the path: goodfit train FOLDER")  # fmt: skip
    name = how.format or recognise(data, how)
    _refuse_unused(name, how)
    return READERS.get(name, read_text).read(data, how)  # the text formats have names of their own


def _refuse_unused(name: str, how: How) -> None:
    """Nothing that was asked for is silently ignored.

    Raises:
        RequestError: an option means nothing for this layout.
        DataError: the task is none that its annotations are for.
    """
    used = USED.get(name, _FOR_TABLES)
    unused = [option for option in _READING if getattr(how, option) is not None and option not in used]
    if unused:
        raise RequestError(f"{unused[0]}= means nothing for a dataset of the layout {name}.", where=f"{unused[0]}=",
                           next=f"leave it out; for {name} there are {', '.join(f'{option}=' for option in used)}")  # fmt: skip
    if how.task is not None and name in USED and how.task not in TASKS[name]:
        raise DataError(f"A dataset of the layout {name} has nothing for the task {how.task}.", where="task=",
                        next=" or ".join(f"task={task}" for task in TASKS[name]))  # fmt: skip


def recognise(data: Path, how: How) -> str:
    """The name of the format that a dataset shows.

    Raises:
        DataError: none, or more than one that is telling.
    """
    fits = [name for name in READERS if how.task is None or how.task in TASKS[name]]
    found = {name: note for name in fits if (note := READERS[name].recognise(data)) is not None}
    telling = [name for name in found if name not in _COMMON] or list(found)
    if how.image_column is not None and "table" in found:
        telling = ["table"]
    if len(telling) > 1:
        ways = "; ".join(f"{name} ({found[name]})" for name in telling)
        raise DataError(f"This could be read in {len(telling)} ways: {ways}.", where=str(data),
                        next=" or ".join(f"format={name}" for name in telling))  # fmt: skip
    if telling:
        if telling[0] in _COMMON and data.is_dir():
            _refuse_several(data)
        return telling[0]
    others = [name for name, reader in READERS.items() if name not in fits and reader.recognise(data) is not None]
    if others:
        name = next((n for n in others if n not in _COMMON), others[0])
        raise DataError(f"This is {READERS[name].recognise(data)}, which has nothing for the task {how.task}.", where=str(data),
                        next=" or ".join(f"task={task}" for task in TASKS[name]))  # fmt: skip
    if data.suffix.lower() in _TABLE_SUFFIXES:
        return "table"  # whose reader says best what is missing, as the reader of folders does for folders
    _refuse_unknown(data)
    return "folders"


def _refuse_several(data: Path) -> None:
    """Folders that are datasets of their own, with annotations, are no classes."""
    children = folders(data)
    telling = [name for name in READERS if name not in (*_COMMON, "table")]
    below = {
        f.name: name for f in children[:MAX_CHILDREN] for name in telling if READERS[name].recognise(f) is not None
    }
    if below:
        told = ", ".join(f"{name} ({format})" for name, format in below.items())
        raise DataError(f"There are several datasets here: {told}.", where=str(data),
                        next=f"give one of them: goodfit train {data / next(iter(below))}")  # fmt: skip


def _refuse_unknown(data: Path) -> None:
    """Point at what lies one level down, if a dataset does."""
    if data.is_file():
        raise DataError("This file is no list of images or texts, and no annotation file that is known.",
                        where=str(data), next="give the folder of the dataset, or say format=")  # fmt: skip
    below = {}
    for folder in folders(data):
        names = [name for name, reader in READERS.items() if reader.recognise(folder) is not None]
        if names:
            below[folder.name] = " or ".join(n for n in names if n not in _COMMON or len(names) == 1) or names[0]
    if below:
        told = ", ".join(f"{name} ({formats})" for name, formats in below.items())
        raise DataError(f"There is no dataset here, but there are some one level down: {told}.", where=str(data),
                        next=f"try: goodfit train {data / next(iter(below))}")  # fmt: skip
