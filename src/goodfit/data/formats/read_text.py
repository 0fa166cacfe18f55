"""Texts as a `DatasetIndex`: tables of texts, `label text` lines, folders of text files, and plain text.

Each row is a place in a file (offset and length) and a content hash; `records.TextRecords` reads the text again.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from goodfit.core.errors import DataError
from goodfit.data.formats.encoding import check_encoding, text_content
from goodfit.data.formats.labels import Marks, class_names_beside, given_splits
from goodfit.data.formats.plain_text import BLOCK, blocks, has_labels, read_file
from goodfit.data.formats.read_table import are_boxes
from goodfit.data.formats.read_table import recognise as recognise_images
from goodfit.data.formats.records import NESTED, Layout, explained, line_layout, records, sniff
from goodfit.data.formats.tables import (
    TABLE_SUFFIXES,
    Roles,
    Table,
    by_split,
    data_files,
    label_column,
    open_table,
    split_and_group,
    text_columns,
    the_file,
)
from goodfit.data.index import NO_GROUP, NO_SPLIT, DatasetIndex
from goodfit.data.reading import How, Problem, Reading, files_below, folders, is_image, relative, split_number

FORMATS = ("text-table", "text-lines", "text-folders", "plain-text")

_TEXT_SUFFIXES = frozenset(("", ".txt", ".text"))
_PLAIN_SUFFIXES = frozenset((".txt", ".text", ".tokens", ".raw"))
_OTHER_SUFFIXES = frozenset(
    [
        ".md",
        ".rst",
        ".py",
        ".ipynb",
        ".sh",
        ".r",
        ".js",
        ".json",
        ".yaml",
        ".yml",
        ".toml",
        ".ini",
        ".cfg",
        ".xml",
        ".html",
        ".htm",
        ".css",
        ".bib",
        ".tex",
        ".pdf",
        ".doc",
        ".docx",
        ".xls",
        ".xlsx",
        ".zip",
        ".gz",
        ".bz2",
        ".xz",
        ".7z",
        ".tar",
        ".npy",
        ".npz",
        ".pt",
        ".pth",
        ".safetensors",
        ".onnx",
        ".h5",
        ".pkl",
        ".db",
        ".sqlite",
        ".log",
        ".lock",
        ".vocab",
    ]
)
_UNLABELLED = frozenset(("unsup", "unlabeled", "unlabelled", "unsupervised"))
_MIN_BLOCKS = 3  # one for each split


def recognise(data: Path) -> str | None:
    """One line that says which texts these are; None where they are none. Never raises, opens no image."""
    try:
        if recognise_images(data) is not None:
            return None
        kind, files = _find(data, How())
        if kind == "text-table":
            table = open_table(files[0][0], How())
            if are_boxes(table) or not text_columns(table, How(), set()):
                return None
            return f"{files[0][0].name}: a table of texts"
        if kind == "plain-text" and (
            sum(path.stat().st_size for path, _ in files) < _MIN_BLOCKS * BLOCK
            or any(path.suffix.lower() not in _PLAIN_SUFFIXES for path, _ in files)
        ):
            return None
    except (DataError, OSError, ValueError):
        return None
    said = {"text-lines": "lines of a label and a text", "text-folders": "one folder of text files per class",
            "plain-text": "plain text for a language model"}[kind]  # fmt: skip
    return f"{', '.join(path.name for path, _ in files[:3])}: {said}"


def read(data: Path, how: How) -> Reading:
    """Read texts, see read_texts."""
    reading, layouts = read_texts(data, how)
    return replace(reading, layouts=layouts)


def read_texts(data: Path, how: How) -> tuple[Reading, dict[str, dict[str, Any]]]:
    """Read texts, and say how TextRecords reads them again: the layout of each file, as JSON can hold it.

    Raises:
        DataError: these are no texts, a column or the layout is in doubt, or no row can be used.
    """
    with explained(data, Layout(kind="")):
        kind, files = _find(data, how)
        if kind == "plain-text" and how.task == "text":
            raise DataError("These texts have no labels that could be recognised.", where=str(data),
                            next="for a language model say task=language; else give a table: label_column=COLUMN")  # fmt: skip
        if how.resplit:
            files = [(path, NO_SPLIT) for path, _ in files]
        reader = _Texts(data if kind == "text-folders" else files[0][0].parent, how)
        _READERS[kind](reader, files)
        return reader.finish(kind, files), {path: layout.to_dict() for path, layout in reader.layouts.items()}


class _Texts:
    """The columns of a text index as they grow: about 60 bytes a row, no text."""

    def __init__(self, root: Path, how: How) -> None:
        self.root, self.how = root, how
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.layouts: dict[str, Layout] = {}
        self.marks = Marks()
        self.names: list[str] = []
        self.files: array[int] = array("q")
        self.offsets: array[int] = array("q")
        self.lengths: array[int] = array("q")
        self.contents = bytearray()

    def open(self, path: Path, layout: Layout | None = None) -> str:
        """Begin with a file; its name in the index."""
        self.names.append(relative(path, self.root))
        if layout is not None:
            self.layouts[self.names[-1]] = layout
            if layout.encoding not in ("utf-8", "ascii") and layout.kind != "parquet":
                self.notes.append(f"{path.name} is in {layout.encoding}")
        return self.names[-1]

    def add(self, offset: int, length: int, text: str) -> None:
        """Note one text of the file that was opened last."""
        self.files.append(len(self.names) - 1)
        self.offsets.append(offset)
        self.lengths.append(length)
        self.contents += text_content(text)

    def lose(self, kind: str, item: str, message: str) -> None:
        """Note a sample that cannot be used."""
        self.problems.append(Problem(kind, item, message, lost=True))

    def finish(self, kind: str, files: list[tuple[Path, int]]) -> Reading:
        """The index of what was read."""
        if not self.contents:
            first = "".join(f"; the first problem: {p.item}: {p.message.rstrip('.')}" for p in self.problems[:1])
            raise DataError(f"There is no text that can be used{first}.", where=str(files[0][0]),
                            next="look at the file: is it in the right layout and encoding?")  # fmt: skip
        splits, names = np.asarray(self.marks.splits, np.int8), tuple[str, ...]()
        if kind == "plain-text":
            targets, said = np.full(len(self.files), -1, np.int64), ""
        else:
            renamed, said = class_names_beside(self.root, self.marks.labels)
            targets, names = self.marks.sorted_targets(renamed, self.root)
        index = DatasetIndex(
            root=self.root,
            task="language" if kind == "plain-text" else "text",
            paths=[self.names[i] for i in self.files],
            targets=targets,
            class_names=names,
            splits=splits,
            groups=np.asarray(self.marks.group_numbers, np.int64),
            contents=np.frombuffer(bytes(self.contents), np.uint8).reshape(-1, 16),
            offsets=np.asarray(self.offsets, np.int64),
            lengths=np.asarray(self.lengths, np.int64),
        )
        return Reading(index=index, format="text", note="; ".join(self.notes) + said,
                       given_splits=given_splits(splits), problems=tuple(self.problems))  # fmt: skip


def _find(data: Path, how: How) -> tuple[str, list[tuple[Path, int]]]:
    """The layout, and its files (folders, of class folders) with the splits that their names say."""
    asked = how.format if how.format in FORMATS else "plain-text" if how.task == "language" else None
    if asked is None and (how.text_column, how.label_column, how.header) != (None, None, None):
        asked = "text-table"
    if not data.is_dir() and asked != "text-folders":
        return asked or _file_kind(the_file(data), how), [(the_file(data), NO_SPLIT)]
    if asked != "text-folders" and any(is_image(Path(name)) for _, _, names in os.walk(data) for name in names):
        raise DataError("There are images in this folder, so it is not read as texts.", where=str(data),
                        next="give the text file itself, or a folder with texts alone")  # fmt: skip
    top = data_files(data) if data.is_dir() else []
    tables = [path for path in top if path.suffix.lower() in TABLE_SUFFIXES]
    if tables and asked in (None, "text-table"):
        return "text-table", by_split(data, tables, how)
    roots = _class_folders(data) if data.is_dir() and asked in (None, "text-folders") else []
    if roots:
        return "text-folders", roots
    if asked == "text-folders":
        raise DataError("There are not two folders of text files in it, one for each class.", where=str(data),
                        next="give the folder that holds one folder per class, with .txt files in each")  # fmt: skip
    texts = [path for path in top if path.suffix.lower() not in _OTHER_SUFFIXES | TABLE_SUFFIXES]
    files = by_split(data, [path for path in texts if line_layout(path, "lines", how.encoding) is not None], how)
    return asked or _file_kind(files[0][0], how), files  # train comes first, and the others are to be like it


def _file_kind(path: Path, how: How) -> str:
    """Which layout of texts one file has, by its content."""
    found = sniff(path, how.encoding)
    if path.suffix.lower() in TABLE_SUFFIXES or (found is not None and found[0].kind != "csv"):
        return "text-table"
    if found is not None and found[1] >= 0.98:
        try:
            table = open_table(path, how)
            if text_columns(table, how, {label_column(table, how, set())}):
                return "text-table"
        except DataError:
            pass  # lines that happen to have equally many delimiters
    layout = line_layout(path, "lines", how.encoding)
    if layout is None:
        raise DataError("The file is empty, or it is not text.", where=str(path),
                        next="if it is text, name its encoding: encoding=NAME")  # fmt: skip
    return "text-lines" if has_labels(path, layout) else "plain-text"


def _class_folders(data: Path) -> list[tuple[Path, int]]:
    """The folders that hold class folders of text files: split folders, or the folder itself; empty where it is not so."""
    children = folders(data)
    if len(children) == 1 and not any(_text_files(child) for child in folders(children[0])):
        children = folders(children[0])
    named = [(path, number) for path in children if (number := split_number(path.name)) is not None]
    roots = sorted(named, key=lambda item: item[1]) if len(named) > 1 else [(data, NO_SPLIT)]
    for root, _ in roots:
        if sum(bool(_text_files(folder)) for folder in folders(root)) < 2:
            return []
    return roots


def _text_files(folder: Path) -> list[Path]:
    return [path for path in files_below(folder) if path.suffix.lower() in _TEXT_SUFFIXES]


def _read_tables(reader: _Texts, files: list[tuple[Path, int]]) -> None:
    label_name = ""
    for path, split in files:
        table = open_table(path, reader.how)
        if label_name and label_name not in table.names:
            reader.problems.append(Problem("missing_label", path.name, f"It has no column {label_name!r}: not read."))
            continue
        roles, text = _text_roles(table, replace(reader.how, label_column=label_name or reader.how.label_column))
        label_name = table.names[roles.label]
        where = reader.open(path, replace(table.layout, text=text))
        names = [name if table.header or not name.isdecimal() else f"column {name}" for name in table.names]
        reader.notes.append(f"{path.name}: classes in {names[roles.label]!r}, text in "
                            + " + ".join(repr(names[i]) for i in text)
                            + (", no line of column names" if table.layout.kind == "csv" and not table.header else ""))  # fmt: skip
        for line, offset, length, cells in table.rows(reader.problems, where):
            words = " ".join([cells[i] for i in text])
            if not words or words.isspace() or NESTED in words:
                reader.lose("unreadable", f"{where}:{line}", "There is no text in this row.")
            elif reader.marks.add(table.path, roles, line, cells, split):
                reader.add(offset, length, words)
            else:
                reader.lose("missing_label", f"{where}:{line}", "There is no class in this row.")


def _text_roles(table: Table, how: How) -> tuple[Roles, tuple[int, ...]]:
    if are_boxes(table) and how.text_column is None:
        raise DataError("This table holds boxes, not texts.", where=str(table.path),
                        next="boxes are read as COCO, YOLO or VOC; for texts name the column: text_column=COLUMN")  # fmt: skip
    split, group = split_and_group(table, how)
    taken = {i for i in (split, group) if i is not None}
    asked = set(text_columns(table, how, taken)) if how.text_column is not None else set()
    label = label_column(table, how, taken | asked)
    text = text_columns(table, how, taken | {label})
    if not text or label in text:
        raise DataError(f"No column of texts was recognised among {table.listed()}.", where=str(table.path),
                        next="name it, or several joined by commas: text_column=COLUMN")  # fmt: skip
    return Roles(label=label, split=None if how.resplit else split, group=group), text


def _read_lines(reader: _Texts, files: list[tuple[Path, int]]) -> None:
    roles = Roles(label=0)
    first: set[str] = set()
    for path, split in files:
        layout = line_layout(path, "lines", reader.how.encoding)
        if layout is None:
            raise DataError("The file is empty, or it is not text.", where=str(path), next="give another file")
        where = reader.open(path, layout)
        good = bad = 0
        for line, offset, length, cells in records(path, layout):
            label = (cells[0].removeprefix("__label__").rstrip(":") or cells[0]) if isinstance(cells, list) else ""
            if isinstance(cells, list) and cells[1].startswith("__label__"):
                cells = "this line has several labels, and one is needed"
            elif isinstance(cells, list) and first and label not in first:
                cells = f"this line begins with no label of {files[0][0].name}"
            if isinstance(cells, str):
                bad += 1
                reader.lose("unreadable", f"{where}:{line}", f"{cells[:1].upper()}{cells[1:]}.")
                continue
            good += 1
            reader.marks.add(path, roles, line, [label], split)
            reader.add(offset, length, cells[1])
        first = first or set(reader.marks.labels)
        if bad > good:
            raise DataError(f"{bad} of {good + bad} lines are not a label, a space and a text.", where=str(path),
                            next="for a language model say task=language; else mend the lines")  # fmt: skip
    reader.notes.insert(0, f"{', '.join(path.name for path, _ in files)}: lines of a label and a text")


def _read_folders(reader: _Texts, files: list[tuple[Path, int]]) -> None:
    asked = check_encoding(reader.how.encoding) if reader.how.encoding is not None else ""
    reader.layouts[""] = Layout(kind="file", encoding=asked)
    encodings: Counter[str] = Counter()
    roles = Roles(label=0)
    for root, split in files:
        for folder in folders(root):
            paths = _text_files(folder)
            if folder.name.lower() in _UNLABELLED:
                reader.problems.append(Problem("missing_label", relative(folder, reader.root),
                                               f"Its {len(paths)} texts have no class: not read."))  # fmt: skip
                continue
            for path in paths:
                where = reader.open(path)
                data, encoding, wrong = read_file(path, asked)
                if wrong:
                    reader.lose("unreadable", where, wrong)
                    continue
                encodings[encoding] += 1
                reader.marks.add(path, roles, 0, [folder.name], split)
                reader.add(0, len(data), data.decode(encoding))
    reader.notes.append("one folder of text files per class")
    if set(encodings) - {"utf-8"}:
        reader.notes.append(", ".join(f"{count} files in {name}" for name, count in encodings.most_common()))


def _read_plain(reader: _Texts, files: list[tuple[Path, int]]) -> None:
    for path, split in files:
        layout = line_layout(path, "block", reader.how.encoding)
        if layout is None:
            raise DataError("The file is empty, or it is not text.", where=str(path),
                            next="if it is text, name its encoding: encoding=NAME")  # fmt: skip
        reader.open(path, layout)
        for offset, length, text in blocks(path, layout):
            if not text.isspace():
                reader.add(offset, length, text)
                reader.marks.splits.append(split)
    rows = len(reader.files)
    reader.marks.group_numbers.extend([NO_GROUP] * rows)
    names = ", ".join(path.name for path, _ in files)
    note = f"{names}: plain text, {rows} pieces of about {BLOCK} bytes"
    if len(files) == 1 or reader.how.resplit:
        if rows < _MIN_BLOCKS:
            raise DataError(f"The text is too short to be split: it makes {rows} pieces of about {BLOCK} bytes.",
                            where=names, next=f"give at least {_MIN_BLOCKS} pieces, {_MIN_BLOCKS * BLOCK} bytes")  # fmt: skip
        each = max(1, round(0.05 * rows))
        reader.marks.splits = array("b", [0] * (rows - 2 * each) + [1] * each + [2] * each)
        note += ", split by position: the first 90 % to train, then 5 % to val, then 5 % to test"
    reader.notes.insert(0, note)


_READERS = {"text-table": _read_tables, "text-lines": _read_lines, "text-folders": _read_folders,
            "plain-text": _read_plain}  # fmt: skip
