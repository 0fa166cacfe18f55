"""Records of tables and text files: how they are parsed, where each lies in its file, and reading one again."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from goodfit.core.errors import DataError
from goodfit.data.formats.encoding import BINARY, detect_encoding, file_encoding, without_mark
from goodfit.data.index import DatasetIndex

NESTED = "\0nested"  # the cell of a list, an object or bytes: neither a name nor a text

_MAX_FIELD = 1 << 22  # characters of one CSV cell: a quote that never closes ends here, not at the end of the file
_SAMPLE = 1 << 19  # bytes that decide on delimiter and quotes
_DELIMITERS = (",", ";", "\t", "|")
_QUOTINGS: dict[str, dict[str, Any]] = {
    "double": {"strict": True},
    "none": {"quoting": csv.QUOTE_NONE},
    "backslash": {"strict": True, "escapechar": "\\"},
}
Record = tuple[int, int, int, "list[str] | str"]  # line from 1, byte offset, bytes, and cells or what is wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the records of one file are parsed; plain values, so that it can be kept as JSON.

    Attributes:
        kind: "csv", "jsonl", "parquet", "lines" (label, space, text), "file" (all of it) or "block" (a piece of it).
        encoding: Codec of the bytes after the byte order mark; "" where it is detected in each file.
        start: Bytes of the byte order mark.
        delimiter, quoting: Of CSV; "double" quotes, "none" or "backslash" escapes.
        newline: What ends a line, "\\n" or "\\r".
        columns: Keys of JSON objects or names of Parquet columns, in the order of the cells.
        text: Positions of the cells that make up the text, joined by a space.
    """

    kind: str
    encoding: str = "utf-8"
    start: int = 0
    delimiter: str = ","
    quoting: str = "double"
    newline: str = "\n"
    columns: tuple[str, ...] = ()
    text: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Layout:
        """Back from to_dict, also after JSON made lists of the tuples."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    def dialect(self) -> dict[str, Any]:
        """Arguments of csv.reader."""
        return {"delimiter": self.delimiter, **_QUOTINGS[self.quoting]}


def sniff(path: Path, encoding: str | None = None) -> tuple[Layout, float] | None:
    """How a file's records are parsed, from its first 512 kB, and the share of lines that agree with it.

    Delimiter and quoting are those under which the most lines have the same number of cells, two at least. Where quotes
    stand inside of texts rather than around cells, or only join lines that agree without them, they are plain text.

    Returns:
        None where the file is not text, is empty, or no delimiter makes two columns of it.

    Raises:
        DataError: the file cannot be read, or is Parquet and pyarrow is absent.
    """
    with explained(path, Layout(kind="")), open(path, "rb") as handle:
        head = handle.read(_SAMPLE)
    if head.startswith(b"PAR1") or path.suffix.lower() == ".parquet":
        return Layout(kind="parquet", columns=tuple(_parquet(path).schema_arrow.names)), 1.0
    found = line_layout(path, "csv", encoding)
    if found is None:
        return None
    text = head[found.start :].decode(found.encoding, "replace")
    lines = [line + found.newline for line in text.split(found.newline)]
    if (len(head) == _SAMPLE and len(lines) > 1) or lines[-1] == found.newline:
        lines.pop()
    base = asdict(found)
    if text.lstrip()[:1] == "{":
        objects = [v for v in map(_json_object, lines[:1000]) if isinstance(v, dict)]
        if objects:
            columns = tuple(dict.fromkeys(str(key) for value in objects for key in value))
            return Layout(**{**base, "kind": "jsonl", "columns": columns}), 1.0
    delimiters = ("\t", ",", ";", "|") if path.suffix.lower() == ".tsv" else _DELIMITERS
    best: tuple[float, int, str, str] = (0.0, 0, "", "")
    for delimiter in (d for d in delimiters if d in text):
        share, width, joins = _agreement(lines, Layout(**{**base, "delimiter": delimiter}))
        quoting = "double"
        for other in ("none", "backslash") if '"' in text else ():
            its = _agreement(lines, Layout(**{**base, "delimiter": delimiter, "quoting": other}))
            around = other == "none" and _quotes_are_around_cells(text, delimiter)
            if (its[0] > share and not around) or (other == "none" and joins and its[0] == share):
                (share, width, joins), quoting = its, other
        if (share, width) > best[:2]:
            best = (share, width, delimiter, quoting)
    if not best[2]:
        return None
    return Layout(**{**base, "delimiter": best[2], "quoting": best[3]}), best[0]


def line_layout(path: Path, kind: str, encoding: str | None = None) -> Layout | None:
    """Encoding and line ends of a text file; None where it is empty or no text.

    Raises:
        DataError: the file cannot be read, or `encoding` is unknown.
    """
    codec = file_encoding(path, encoding)
    if codec == BINARY:
        return None
    with explained(path, Layout(kind="")), open(path, "rb") as handle:
        head = handle.read(_SAMPLE)
    codec, start = without_mark(codec, head)
    text = head[start:].decode(codec, "replace")
    if not text.strip():
        return None
    old_mac = "\r" in text and "\n" not in text
    text_cells = (1,) if kind == "lines" else ()
    return Layout(kind=kind, encoding=codec, start=start, newline="\r" if old_mac else "\n", text=text_cells)


def records(path: Path, layout: Layout) -> Iterator[Record]:
    """The records of a file, one after another; what cannot be parsed comes as a message in place of its cells.

    Raises:
        DataError: the file cannot be read or decoded, or has too many quotes that never close.
    """
    with explained(path, layout):
        if layout.kind == "parquet":
            yield from _parquet_records(path, layout)
        elif layout.kind == "csv":
            yield from _csv_records(path, layout)
        else:
            with open(path, "rb") as handle:
                lines = Lines(handle, layout)
                start = lines.offset
                for line in lines:
                    if not line.isspace():
                        yield lines.line, start, lines.offset - start, _line_cells(line, layout)
                    start = lines.offset


@contextmanager
def explained(path: Path, layout: Layout) -> Iterator[None]:
    """Makes errors of reading and decoding a file into DataErrors."""
    try:
        yield
    except OSError as error:
        raise DataError(f"The file cannot be read: {error.strerror or error}.", where=str(path),
                        next="check the file and its permissions") from error  # fmt: skip
    except UnicodeError as error:
        raise DataError(f"The file is not written in {layout.encoding}: {error}.", where=str(path),
                        next="name its encoding, as encoding=latin-1") from error  # fmt: skip


class Lines:
    """The lines of an open file as text, which knows the byte offset and number of what it has read."""

    def __init__(self, handle: BinaryIO, layout: Layout) -> None:
        self._handle, self._layout = handle, layout
        codec = layout.encoding
        self._narrow = layout.newline == "\n" and "a\n,".encode(codec) == b"a\n,"
        self.seek(layout.start, 0)

    def seek(self, offset: int, line: int) -> None:
        """Go on from a byte offset, where line number `line` has just ended."""
        self.offset, self.line = offset, line
        self._handle.seek(offset)
        if not self._narrow:  # an encoding of two or four bytes a character: lines do not end where a byte b"\n" is
            raw = io.BufferedReader(io.FileIO(self._handle.fileno(), closefd=False))
            raw.seek(offset)
            self._text = io.TextIOWrapper(raw, self._layout.encoding, newline=self._layout.newline)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._narrow:
            data = next(self._handle)
            line = data.decode(self._layout.encoding)
            self.offset += len(data)
        else:
            line = next(self._text)
            self.offset += len(line.encode(self._layout.encoding))
        self.line += 1
        return line


class TextRecords:
    """The texts of an index, each read again from its file when it is asked for.

    Args:
        index: An index of task "text" or "language".
        layouts: Layout.to_dict() of each file by its path in the index, and under "" that of all other files.
    """

    def __init__(self, index: DatasetIndex, layouts: Mapping[str, Mapping[str, Any]]) -> None:
        self._index = index
        self._layouts = {path: Layout.from_dict(values) for path, values in layouts.items()}
        self._group: tuple[Path, int, list[Any]] | None = None  # the Parquet row group read last

    def text(self, row: int) -> str:
        """The text of a row.

        Raises:
            DataError: the file is gone or is no longer what the index was made from.
        """
        index, path = self._index, self._index.paths[row]
        layout = self._layouts.get(path) or self._layouts.get("")
        assert layout is not None and index.offsets is not None and index.lengths is not None
        try:
            if layout.kind == "parquet":
                cells: list[str] | str = self._parquet_row(index.file(row), layout, int(index.offsets[row]))
            else:
                with open(index.file(row), "rb") as handle:
                    handle.seek(int(index.offsets[row]))
                    data = handle.read(int(index.lengths[row]))
                if layout.kind in ("file", "block"):
                    return data.decode(layout.encoding or detect_encoding(data))
                line = data.decode(layout.encoding)
                cells = next(csv.reader([line], **layout.dialect())) if layout.kind == "csv" else _line_cells(
                    line, layout)  # fmt: skip
            if isinstance(cells, list):
                return " ".join(cells[i] for i in layout.text)
        except (OSError, UnicodeError, LookupError, csv.Error, StopIteration) as error:
            raise DataError(f"The text cannot be read again: {error}.", where=index.name(row),
                            next="put the file back as it was, or start a new run") from error  # fmt: skip
        raise DataError(f"The text cannot be read again: {cells}.", where=index.name(row),
                        next="put the file back as it was, or start a new run")  # fmt: skip

    def _parquet_row(self, path: Path, layout: Layout, row: int) -> list[str]:
        if self._group is None or self._group[0] != path or not 0 <= row - self._group[1] < len(self._group[2]):
            file, first = _parquet(path), 0
            for number in range(file.num_row_groups):
                size = file.metadata.row_group(number).num_rows
                if row < first + size:
                    names = list(layout.columns)
                    columns = [file.read_row_group(number, columns=[n]).column(0).to_pylist() for n in names]
                    self._group = (path, first, list(zip(*columns, strict=True)))
                    break
                first += size
        assert self._group is not None
        return [_cell(value) for value in self._group[2][row - self._group[1]]]


def _csv_records(path: Path, layout: Layout) -> Iterator[Record]:
    csv.field_size_limit(max(_MAX_FIELD, csv.field_size_limit()))
    with open(path, "rb") as handle:
        lines = Lines(handle, layout)
        reader = csv.reader(lines, **layout.dialect())
        budget = max(1 << 24, path.stat().st_size)  # bytes that may be read twice, so that the time stays linear
        while True:
            start, line = lines.offset, lines.line
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                budget -= lines.offset - start
                if budget < 0:
                    raise DataError(f"Too many quotes do not close, the last from line {line + 1} on.", where=str(path),
                                    next="mend the quotes: a quote inside a cell is written twice") from error  # fmt: skip
                lines.seek(start, line)
                next(lines)  # only the line where the record began is lost
                reader = csv.reader(lines, **layout.dialect())
                yield line + 1, start, lines.offset - start, f"the quotes of this line do not match ({error})"
                continue
            if len(cells) > 1 or (cells and cells[0].strip()):
                yield line + 1, start, lines.offset - start, cells


def _parquet_records(path: Path, layout: Layout) -> Iterator[Record]:
    file, row = _parquet(path), 0
    try:
        for batch in file.iter_batches(batch_size=4096, columns=list(layout.columns)):
            columns = [batch.column(name).to_pylist() for name in layout.columns]
            for values in zip(*columns, strict=True):
                yield row + 1, row, 1, [_cell(value) for value in values]
                row += 1
    except (OSError, ValueError, KeyError, LookupError, NotImplementedError, RuntimeError, TypeError) as error:
        raise DataError(f"The Parquet file is damaged at row {row + 1}: {_first_line(error)}.", where=str(path),
                        next="write the file again") from error  # fmt: skip


def _parquet(path: Path) -> Any:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError("Reading Parquet needs the package pyarrow.", where=str(path),
                        next="pip install pyarrow") from error  # fmt: skip
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError, TypeError) as error:
        raise DataError(f"The Parquet file cannot be read: {_first_line(error)}.", where=str(path),
                        next="write the file again") from error  # fmt: skip


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _line_cells(line: str, layout: Layout) -> list[str] | str:
    if layout.kind == "jsonl":
        value = _json_object(line)
        return value if isinstance(value, str) else [_cell(value.get(key)) for key in layout.columns]
    parts = line.strip().split(None, 1)
    return parts if len(parts) == 2 else "this line has a label and no text"


def _json_object(line: str) -> dict[str, Any] | str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"this line is not JSON ({error})"
    return value if isinstance(value, dict) else "this line is not a JSON object"


def _cell(value: Any) -> str:
    if isinstance(value, str):
        # JSON can hold half of a surrogate pair, which no file name and no hash can be made of
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return NESTED if isinstance(value, list | dict | bytes) else str(value)


def _quotes_are_around_cells(text: str, delimiter: str) -> bool:
    """Whether four of five quotes begin or end a cell; doubled and escaped ones, which stand for one, do not count."""
    single = text.count('"') - 2 * text.count('""') - text.count('\\"')
    edge = re.escape(delimiter)
    around = len(re.findall(rf'(?:^|{edge})"(?!")', text, re.M)) + len(
        re.findall(rf'(?<!["\\])"(?={edge}|\r?$)', text, re.M)
    )
    return around >= 0.8 * single


def _agreement(lines: list[str], layout: Layout) -> tuple[float, int, bool]:
    """The share of lines in records of the commonest width, that width, and whether a record joins lines."""
    csv.field_size_limit(max(_MAX_FIELD, csv.field_size_limit()))
    widths: Counter[int] = Counter()
    at, joins, errors = 0, False, 0
    while at < len(lines) and errors < 50:
        reader = csv.reader(islice(lines, at, None), **layout.dialect())
        before = 0
        try:
            for cells in reader:
                if cells:
                    widths[len(cells)] += reader.line_num - before
                joins = joins or reader.line_num - before > 1
                before = reader.line_num
        except csv.Error:
            errors += 1
            at += before + 1
            continue
        break
    width, count = max(widths.items(), key=_by_count, default=(0, 0))
    total = sum(not line.isspace() for line in lines)
    return (min(1.0, count / total), width, joins) if width >= 2 and total else (0.0, 0, False)


def _by_count(item: tuple[int, int]) -> tuple[int, int]:
    return item[1], item[0]
