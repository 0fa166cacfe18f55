"""Table files (CSV, TSV, JSON lines, Parquet): which there are, and which column holds label, split, group and text.

A column is recognised by its name, else by what is in it; where that leaves a doubt, the error asks for the option that
settles it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from goodfit.core.errors import DataError
from goodfit.data.formats.records import NESTED, Layout, records, sniff
from goodfit.data.index import NO_SPLIT
from goodfit.data.reading import How, Problem, folders, is_image, is_regular, split_number

TABLE_SUFFIXES = frozenset([".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"])
IMAGE_NAMES = (
    "path",
    "image",
    "file",
    "filename",
    "file_name",
    "filepath",
    "image_path",
    "img",
    "image_file",
    "img_path",
)
_LABEL = ("label", "class", "category", "class_name", "target", "labels", "classname", "class_index", "class index",
          "sentiment", "intent", "topic")  # fmt: skip
_SPLIT = ("split", "subset", "set", "partition")
_TEXT = ("text", "sentence", "review", "message", "sms", "tweet", "content", "comment", "comment_text", "body",
         "document", "question", "utterance", "title", "headline", "description")  # fmt: skip
_USUAL = frozenset(IMAGE_NAMES + _LABEL + _SPLIT + _TEXT + ("id", "group"))
_NOT_DATA = re.compile(r"readme|licen[cs]e|copying|notice|changelog|citation|authors|requirements|sample_submission|"
                       r"(class(es|_names)?|labels?_names|labels|vocab(ulary)?)\.txt$", re.IGNORECASE)  # fmt: skip
_SAMPLE = 1000  # rows that show what a column holds
_MAX_COLUMNS = 1000  # a list of samples has a handful; looking at a hundred thousand would take minutes
_MAX_CLASSES = 1000  # different values up to which a column can hold classes
_MAX_LABEL = 100  # characters of a class name


class Table:
    """One table file: its columns, and a sample of its rows.

    Attributes:
        path, layout: The file, and how it is parsed.
        names: Of the columns; "1", "2", … where there is no line of names.
        header: Whether the first line holds names (of CSV; JSON and Parquet name their columns themselves).
        sample: The first rows that have as many cells as there are names.
    """

    def __init__(self, path: Path, layout: Layout, header: bool | None) -> None:
        self.path, self.layout = path, layout
        self._values: list[set[str]] | None = None
        self._rows = 0
        head = list(islice(records(path, layout), _SAMPLE))
        found = [cells for *_, cells in head if isinstance(cells, list)]
        if not found:
            raise DataError("No row of the table can be read.", where=str(path), next="write the file again")
        if layout.kind == "csv":
            first, self.sample = (found[0], found[1:]) if isinstance(head[0][3], list) else ([], found)
            width = Counter(map(len, self.sample)).most_common(1)[0][0] if self.sample else len(first)
            _check_width(path, max(width, len(first)))
            self.names, self.header = tuple(str(i + 1) for i in range(width)), False
            named = len(first) != width and any(c.strip().lower() in _USUAL for c in first)
            if header or (header is None and (named or (len(first) == width and self._looks_like_names(first)))):
                self.names, self.header = tuple(cell.strip() for cell in first), True
            elif len(first) == width:
                self.sample = found
        else:
            self.names, self.header, self.sample = layout.columns, False, found
        fitting = [row for row in self.sample if len(row) == len(self.names)]
        if self.sample and not fitting:
            raise DataError(f"The rows have {len(self.sample[0])} columns, but the first line names {len(self.names)}.",
                            where=str(path), next="mend the first line; quote names that contain the delimiter")  # fmt: skip
        self.sample = fitting

    def rows(self, problems: list[Problem], where: str) -> Iterator[tuple[int, int, int, list[str]]]:
        """Line, byte offset, bytes and cells of each row; what has another number of cells becomes a problem.

        Raises:
            DataError: more than half of the rows cannot be read.
        """
        good = bad = 0
        for line, offset, length, cells in islice(records(self.path, self.layout), int(self.header), None):
            if isinstance(cells, list) and len(cells) == len(self.names):
                good += 1
                yield line, offset, length, cells
                continue
            bad += 1
            message = f"it has {len(cells)} columns, not {len(self.names)}" if isinstance(cells, list) else cells
            problems.append(Problem("unreadable", f"{where}:{line}", f"{message[:1].upper()}{message[1:]}.", lost=True))
        if bad > good:
            raise DataError(
                f"{bad} of {good + bad} rows cannot be read; the first: {problems[-bad].item}: {problems[-bad].message}",
                where=str(self.path), next="mend the table; quote names that contain the delimiter",
            )  # fmt: skip

    def column(self, asked: str, option: str) -> int:
        """The position of a column that a person named by name or by number from 1.

        Raises:
            DataError: there is no such column.
        """
        lower = [name.lower() for name in self.names]
        for names, name in ((self.names, asked), (lower, asked.lower())):
            if name in names:
                return names.index(name)
        if asked.isdecimal() and len(asked) < 6 and 1 <= int(asked) <= len(self.names):
            return int(asked) - 1
        raise DataError(f"{option}={asked}: the columns are {self.listed()}.", where=str(self.path),
                        next=f"name one of them, or give its number: {option}=1")  # fmt: skip

    def listed(self, columns: list[int] | None = None) -> str:
        """Column names for a message, twenty at most."""
        names = [
            " ".join(self.names[i].split())[:40] or str(i + 1)
            for i in (range(len(self.names)) if columns is None else columns)
        ]
        return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")

    def sampled(self, column: int) -> list[str]:
        """The values of a column in the sample that are not empty."""
        return [row[column].strip() for row in self.sample if row[column].strip()]

    def is_few(self, column: int, least: int = 2) -> bool:
        """Whether the column has few different, short values, as classes are; looks at every row of the table."""
        if self._values is None:
            self._values, self._rows = self._distinct()
        values, seen = self._values[column], self.sampled(column)
        return (
            least <= len(values) <= min(_MAX_CLASSES, self._rows // 2)
            and 2 * len(seen) > len(self.sample)
            and NESTED not in values
            and max(map(len, values)) <= _MAX_LABEL
            and not self.is_prose(column)
        )

    def is_prose(self, column: int) -> bool:
        """Whether the column holds texts: three words or more on average, and mostly different ones."""
        seen = self.sampled(column)
        return (
            2 * len(seen) > len(self.sample)
            and NESTED not in seen
            and sum(len(value.split()) for value in seen) >= 3 * len(seen)
            and 2 * len(set(seen)) > len(seen)
        )

    def _distinct(self) -> tuple[list[set[str]], int]:
        values: list[set[str]] = [set() for _ in self.names]
        active, count = list(range(len(self.names))), 0
        for *_, cells in islice(records(self.path, self.layout), int(self.layout.kind == "csv"), None):
            if not isinstance(cells, list) or len(cells) != len(self.names):
                continue
            count += 1
            full = False
            for column in active:
                seen = values[column]
                seen.add(cells[column])
                full = full or len(seen) > _MAX_CLASSES
            if full:
                active = [column for column in active if len(values[column]) <= _MAX_CLASSES]
        return [{value.strip() for value in seen} - {""} for seen in values], count

    def _looks_like_names(self, first: list[str]) -> bool:
        cells = [cell.strip() for cell in first]
        if any(_is_number(cell) or is_image(Path(cell)) for cell in cells) or len(set(cells)) == 1 < len(cells):
            return False
        if any(cell.lower() in _USUAL for cell in cells):
            return True
        if any(len(cell.split()) > 4 for cell in cells):
            return False
        self.sample = [row for row in self.sample if len(row) == len(self.names)]
        few = [column for column in range(len(cells)) if self.is_few(column, least=1)]
        assert self._values is not None
        return not any(cells[column] in self._values[column] for column in few)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Which column holds what, by position; None where there is none."""

    label: int
    split: int | None = None
    group: int | None = None


def open_table(path: Path, how: How) -> Table:
    """Recognise delimiter, encoding and columns.

    Raises:
        DataError: the file is no table with two columns and a row.
    """
    found = sniff(path, how.encoding)
    if found is None:
        raise DataError("This is no table: no delimiter makes at least two columns of it, or it is not text.",
                        where=str(path), next="save it as CSV in UTF-8, or name its encoding: encoding=NAME")  # fmt: skip
    _check_width(path, len(found[0].columns))  # before a row is read: each would be that wide
    table = Table(path, found[0], how.header)
    if not table.sample:
        raise DataError("The list is empty: it needs a line of column names and one line per sample.", where=str(path),
                        next="add a line for each sample")  # fmt: skip
    return table


def _check_width(path: Path, width: int) -> None:
    if width > _MAX_COLUMNS:
        raise DataError(f"The table has {width} columns, more than {_MAX_COLUMNS}.", where=str(path),
                        next="keep the columns of paths or texts, labels, splits and groups")  # fmt: skip


def find_tables(data: Path, how: How, suffixes: frozenset[str] = TABLE_SUFFIXES) -> list[tuple[Path, int]]:
    """The table files of a path, each with the split that its name says (NO_SPLIT for a single one).

    Raises:
        DataError: there is none, or there are several that are not splits of one another.
    """
    if not data.is_dir():
        return [(the_file(data), NO_SPLIT)]
    found = [path for path in data_files(data) if path.suffix.lower() in suffixes]
    return by_split(data, found, how)


def by_split(data: Path, found: list[Path], how: How) -> list[tuple[Path, int]]:
    """Files with the splits that their names say; the others are left out where these are two or more.

    Raises:
        DataError: there is no file, or the names do not say what belongs together.
    """
    if how.annotations is not None:
        asked = how.annotations
        found = [p for p in found if fnmatch(p.name, asked) or asked in p.name]
    named = [(path, number) for path in found if (number := file_split(path)) is not None]
    numbers = [number for _, number in named]
    if len(named) > 1 and len(set(numbers)) == len(numbers) and 0 in numbers:
        return sorted(named, key=lambda item: item[1])
    if len(found) == 1:
        return [(found[0], NO_SPLIT)]
    names = ", ".join(path.name for path in found[:10])
    raise DataError(f"The folder holds {len(found)} files that could be the data{': ' * bool(names)}{names}.",
                    where=str(data), next=f"give the file itself, as {data / (found[0].name if found else 'list.csv')}, "
                         "or part of its name: annotations=NAME")  # fmt: skip


def the_file(path: Path) -> Path:
    """The path, if it is that of a plain file.

    Raises:
        DataError: there is none, or it is a device or a pipe, which opening would wait for.
    """
    if not is_regular(path):
        raise DataError("There is no such file.", where=str(path), next="check the path: goodfit train FILE")
    return path


def file_split(path: Path) -> int | None:
    """The split that a file's name says, as train.csv or data_dev.tsv; None where it says none or two."""
    words = {split_number(word) for word in re.split(r"[^a-z]+", path.name.lower())} - {None}
    return words.pop() if len(words) == 1 else None


def data_files(folder: Path) -> list[Path]:
    """Visible files at the top of a folder that are no notes; of its only folder where there are none."""
    for _ in range(4):
        found = sorted(
            p for p in folder.iterdir() if not p.name.startswith(".") and is_regular(p) and not _NOT_DATA.match(p.name)
        )
        below = folders(folder)
        if found or len(below) != 1:
            return found
        folder = below[0]
    return []


def split_and_group(table: Table, how: How) -> tuple[int | None, int | None]:
    """The columns of splits and groups; splits also by content, where each value is a spelling of train, val or test."""
    group = None if how.group is None else table.column(how.group, "group")
    if how.split_column is not None:
        return table.column(how.split_column, "split_column"), group
    split = next((i for i, name in enumerate(table.names) if name.lower() in _SPLIT), None)
    if split is None:
        columns = [i for i in range(len(table.names)) if (seen := set(table.sampled(i))) and table.names[i].lower()
                   not in _LABEL and len(seen) > 1 and all(split_number(v) is not None for v in seen)]  # fmt: skip
        split = columns[0] if len(columns) == 1 else None
    return split, group


def label_column(table: Table, how: How, taken: set[int]) -> int:
    """The column of classes: as asked, by name, or the only one left with few different values.

    Raises:
        DataError: there is none, or several could be it.
    """
    if how.label_column is not None:
        label = table.column(how.label_column, "label_column")
    else:
        found = [i for i, name in enumerate(table.names) if name.lower() in _LABEL and i not in taken]
        exact = [i for i in found if table.names[i].lower() == "label"]
        if not found:
            found = [i for i in range(len(table.names)) if i not in taken and table.is_few(i)]
        if len(found) != 1 and len(exact) != 1:
            raise DataError(
                f"Several columns could hold the class names: {table.listed(found)}."
                if found else f"No column of class names was recognised among {table.listed()}.",
                where=str(table.path), next="name it, or give its number from 1: label_column=COLUMN",
            )  # fmt: skip
        label = (exact or found)[0]
    if any(row[label] == NESTED for row in table.sample):
        raise DataError(f"The column {table.names[label]!r} holds lists or objects, not one class per row.",
                        where=str(table.path), next="name another one: label_column=COLUMN")  # fmt: skip
    return label


def text_columns(table: Table, how: How, taken: set[int]) -> tuple[int, ...]:
    """The columns of the text: as asked (joined by commas), by name, or all that hold prose."""
    if how.text_column is not None:
        if how.text_column in table.names:
            return (table.names.index(how.text_column),)
        return tuple(table.column(name.strip(), "text_column") for name in how.text_column.split(","))
    left = [i for i in range(len(table.names)) if i not in taken]
    named = [i for i in left if table.names[i].lower() in _TEXT]
    return tuple(named or [i for i in left if table.is_prose(i)])


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
