"""`DatasetIndex`: which samples there are, with their targets, splits and groups. Columns, no pixels, no texts."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError
from goodfit.data.columns import Objects, Strings

SPLITS = ("train", "val", "test")
NO_SPLIT = -1
LEFT_OUT = -2
NO_GROUP = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetIndex:
    """The samples of a dataset, one row each, in a stable order; tens of bytes a row.

    Attributes:
        root: Folder that relative paths start from.
        task: "classify", "detect", "segment", "text" or "language".
        paths: File of each row, relative to root (or absolute), with forward slashes.
        targets: Class of each row, int64, shape (rows,); -1 where a row has objects, or no class, instead of one class.
        class_names: Sorted names for classes of samples, the annotation's order for those of objects.
        splits: 0 train, 1 val, 2 test, NO_SPLIT where none is given, LEFT_OUT where the audit removed the row; int8.
        groups: Rows of one group never straddle splits; NO_GROUP where a row stands alone; int64.
        contents: 128-bit BLAKE2b of each sample's bytes, uint8, shape (rows, 16); shape (0, 16) before they are read.
        offsets, lengths: Where a row is a part of its file, its bytes there (a line or record); None where it is all.
        sizes: Width and height of each upright image, int32, shape (rows, 2); None before the audit.
        objects: Boxes and masks, for detection and segmentation.
    """

    root: Path
    task: str = "classify"
    paths: Sequence[str]
    targets: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    splits: npt.NDArray[np.int8]
    groups: npt.NDArray[np.int64]
    contents: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 16), np.uint8))
    offsets: npt.NDArray[np.int64] | None = None
    lengths: npt.NDArray[np.int64] | None = None
    sizes: npt.NDArray[np.int32] | None = None
    objects: Objects | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.paths, Strings):
            object.__setattr__(self, "paths", Strings(self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def nbytes(self) -> int:
        """Bytes that the columns take, without objects."""
        columns = (self.targets, self.splits, self.groups, self.contents, self.offsets, self.lengths, self.sizes)
        assert isinstance(self.paths, Strings)
        return self.paths.nbytes + sum(c.nbytes for c in columns if c is not None)

    def file(self, row: int) -> Path:
        """The file of a row."""
        return self.root / self.paths[row]

    def name(self, row: int) -> str:
        """What a person calls a row: its path, with the byte offset where it is a part of a file."""
        path = self.paths[row]
        return path if self.offsets is None else f"{path}@{int(self.offsets[row])}"

    def rows(self, split: str) -> npt.NDArray[np.int64]:
        """The rows of a split, ascending. Shape: (rows in split,)."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def keys(self) -> npt.NDArray[np.int64]:
        """63 bits of each row's content, for orders that do not depend on names. Shape: (rows,)."""
        return (np.ascontiguousarray(self.contents[:, :8]).view("<u8")[:, 0] >> np.uint64(1)).astype(np.int64)

    def with_splits(self, splits: npt.NDArray[np.int8]) -> DatasetIndex:
        """The same samples in other splits."""
        return replace(self, splits=splits)

    def without_classes(self, targets: set[int]) -> DatasetIndex:
        """Remove classes of samples from the list of names; their rows must have been left out."""
        kept = [t for t in range(len(self.class_names)) if t not in targets]
        renumber = np.full(len(self.class_names), -1, np.int64)
        renumber[kept] = np.arange(len(kept))
        return replace(
            self,
            class_names=tuple(self.class_names[t] for t in kept),
            targets=np.where(self.targets < 0, -1, renumber[self.targets]),
        )


def class_counts(index: DatasetIndex, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How often each class occurs in these rows: samples, or kept objects that are no crowds. Shape: (classes,)."""
    num = len(index.class_names)
    if index.objects is None:
        targets = index.targets[rows]
        return np.bincount(targets[targets >= 0], minlength=num)
    chosen = np.zeros(len(index), bool)
    chosen[rows] = True
    counted = chosen[index.objects.rows] & index.objects.kept & ~index.objects.crowd
    return np.bincount(index.objects.classes[counted], minlength=num)


def data_hash(index: DatasetIndex, split: str | None = None) -> str:
    """SHA-256 over content and label of every accepted row (or of one split's), independent of names and order."""
    rows = np.flatnonzero(index.splits >= 0) if split is None else index.rows(split)
    labels = [name.encode("utf-8", "surrogateescape") for name in index.class_names]
    if index.objects is None:
        lines = sorted(
            index.contents[r].tobytes().hex().encode() + b" " + (labels[t] if t >= 0 else b"")
            for r, t in zip(rows, index.targets[rows], strict=True)
        )
    else:
        lines = sorted(index.contents[r].tobytes().hex().encode() + b" " + _objects_digest(index, int(r)) for r in rows)
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def _objects_digest(index: DatasetIndex, row: int) -> bytes:
    objects = index.objects
    assert objects is not None
    digest = hashlib.blake2b(digest_size=16)
    for number in range(*objects.of(row).indices(len(objects))):
        if objects.kept[number]:
            digest.update(index.class_names[objects.classes[number]].encode("utf-8", "surrogateescape"))
            digest.update(objects.boxes[number].astype("<f4").tobytes() + bytes([bool(objects.crowd[number])]))
            digest.update(objects.masks[number])
    return digest.hexdigest().encode()


_COLUMNS = ("path", "label", "split", "group", "content", "width", "height")


def write_split(index: DatasetIndex) -> str:
    """The index as the text of `split.csv`: which sample went where; an empty split means left out."""
    text = io.StringIO()
    odd = any("\r" in name for name in (*index.class_names, *index.paths))  # which Python quotes from 3.13 on
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL)
    writer.writerow(_COLUMNS)
    for row, path in enumerate(index.paths):
        split = SPLITS[index.splits[row]] if index.splits[row] >= 0 else ""
        target = index.targets[row]
        label = index.class_names[target] if target >= 0 else ""
        content = index.contents[row].tobytes().hex() if len(index.contents) else ""
        width, height = (0, 0) if index.sizes is None else index.sizes[row].tolist()
        writer.writerow([path, label, split, int(index.groups[row]), content, width, height])
    return text.getvalue()


def read_split(path: Path, root: Path) -> DatasetIndex:
    """Read back what write_split wrote; rows that were left out stay in, so that row numbers agree.

    Raises:
        DataError: the file is missing or is not a split.csv.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as handle:  # file names may be no UTF-8
            rows = list(csv.reader(handle))
    except (OSError, csv.Error) as error:
        raise DataError(f"Could not read the split: {error}.", where=str(path)) from error
    if not rows or tuple(rows[0]) != _COLUMNS or any(len(row) != len(_COLUMNS) for row in rows):
        raise DataError("This is not a split.csv of goodfit.", where=str(path))
    body = rows[1:]
    try:
        numbers = np.array([[int(row[k]) for k in (3, 5, 6)] for row in body], np.int64).reshape(-1, 3)
    except (ValueError, OverflowError) as error:
        raise DataError(f"This is not a split.csv of goodfit: {error}.", where=str(path)) from error
    names = tuple(sorted({row[1] for row in body if row[2]}))
    number = {name: i for i, name in enumerate(names)}
    return DatasetIndex(
        root=root,
        paths=tuple(row[0] for row in body),
        targets=np.array([number.get(row[1], -1) for row in body], np.int64),
        class_names=names,
        splits=np.array([SPLITS.index(row[2]) if row[2] else LEFT_OUT for row in body], np.int8),
        groups=numbers[:, 0].copy(),
        contents=_contents([row[4] for row in body], path),
        sizes=numbers[:, 1:].astype(np.int32),
    )


def _contents(words: list[str], path: Path) -> npt.NDArray[np.uint8]:
    try:
        data = b"".join(bytes.fromhex(word or "0" * 32) for word in words)
    except ValueError as error:
        raise DataError(f"This is not a split.csv of goodfit: {error}.", where=str(path)) from error
    if len(data) != 16 * len(words):
        raise DataError("This is not a split.csv of goodfit: a content is not of 128 bits.", where=str(path))
    return np.frombuffer(data, np.uint8).reshape(-1, 16)
