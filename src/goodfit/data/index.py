"""`DatasetIndex`: which samples there are, with their targets, splits and groups. Columns, no pixels."""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError

SPLITS = ("train", "val", "test")
NO_SPLIT = -1
LEFT_OUT = -2
NO_GROUP = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetIndex:
    """The samples of a classification dataset, one row each, in a stable order.

    Attributes:
        root: Folder that relative paths start from.
        paths: File of each row, relative to root (or absolute), with forward slashes.
        targets: Class of each row, int64, shape (rows,).
        class_names: Sorted names; a target is a position here.
        splits: 0 train, 1 val, 2 test, NO_SPLIT where none is given, LEFT_OUT where the audit removed the row; int8.
        groups: Rows of one group never straddle splits; NO_GROUP where a row stands alone; int64.
        contents: Hexadecimal BLAKE2b of each file's bytes, "" where it was not read.
    """

    root: Path
    paths: tuple[str, ...]
    targets: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    splits: npt.NDArray[np.int8]
    groups: npt.NDArray[np.int64]
    contents: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, row: int) -> Path:
        """The file of a row."""
        return self.root / self.paths[row]

    def rows(self, split: str) -> npt.NDArray[np.int64]:
        """The rows of a split, ascending. Shape: (rows in split,)."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def with_splits(self, splits: npt.NDArray[np.int8]) -> DatasetIndex:
        """The same samples in other splits."""
        return replace(self, splits=splits)

    def without_classes(self, targets: set[int]) -> DatasetIndex:
        """Remove classes from the list of names; their rows must have been left out."""
        kept = [t for t in range(len(self.class_names)) if t not in targets]
        renumber = np.full(len(self.class_names), -1, np.int64)
        renumber[kept] = np.arange(len(kept))
        return replace(self, class_names=tuple(self.class_names[t] for t in kept), targets=renumber[self.targets])


def data_hash(index: DatasetIndex, split: str | None = None) -> str:
    """SHA-256 over content and class of every accepted row (or of one split's), independent of names and order."""
    rows = np.flatnonzero(index.splits >= 0) if split is None else index.rows(split)
    lines = sorted(f"{index.contents[r]} {index.class_names[index.targets[r]]}" for r in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


_COLUMNS = ("path", "label", "split", "group", "content")


def write_split(index: DatasetIndex) -> str:
    """The index as the text of `split.csv`: which sample went where; an empty split means left out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row, path in enumerate(index.paths):
        split = SPLITS[index.splits[row]] if index.splits[row] >= 0 else ""
        target = index.targets[row]
        label = index.class_names[target] if target >= 0 else ""
        content = index.contents[row] if index.contents else ""
        writer.writerow([path, label, split, int(index.groups[row]), content])
    return text.getvalue()


def read_split(path: Path, root: Path) -> DatasetIndex:
    """Read back what write_split wrote; rows that were left out stay in, so that row numbers agree.

    Raises:
        DataError: the file is missing or is not a split.csv.
    """
    try:
        with open(path, encoding="utf-8", newline="") as handle:
            rows = list(csv.reader(handle))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Could not read the split: {error}.", where=str(path)) from error
    if not rows or tuple(rows[0]) != _COLUMNS or any(len(row) != len(_COLUMNS) for row in rows):
        raise DataError("This is not a split.csv of goodfit.", where=str(path))
    body = rows[1:]
    names = tuple(sorted({row[1] for row in body if row[2]}))
    number = {name: i for i, name in enumerate(names)}
    return DatasetIndex(
        root=root,
        paths=tuple(row[0] for row in body),
        targets=np.array([number.get(row[1], -1) for row in body], np.int64),
        class_names=names,
        splits=np.array([SPLITS.index(row[2]) if row[2] else LEFT_OUT for row in body], np.int8),
        groups=np.array([int(row[3]) for row in body], np.int64),
        contents=tuple(row[4] for row in body),
    )
