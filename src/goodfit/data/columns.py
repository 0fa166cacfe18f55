"""Columns of variable length: strings, bytes, and the objects (boxes and masks) of each sample, without one Python
object per row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

NO_MASK, POLYGONS, RLE, MASK_FILE = range(4)  # how one object's mask is kept, see Objects


class Blobs(Sequence[bytes]):
    """A column of byte strings: one array of bytes, and where each entry ends (8 bytes an entry)."""

    def __init__(self, values: Iterable[bytes] = ()) -> None:
        values = list(values)
        self._ends = np.cumsum(np.fromiter((len(v) for v in values), np.int64, len(values)), dtype=np.int64)
        self._data = b"".join(values)

    @classmethod
    def of(cls, data: bytes, ends: npt.NDArray[np.int64]) -> Blobs:
        """The inverse of `parts`."""
        made = cls()
        made._data, made._ends = data, ends
        return made

    @property
    def parts(self) -> tuple[bytes, npt.NDArray[np.int64]]:
        """All bytes one after another, and where each entry ends, int64."""
        return self._data, self._ends

    @property
    def nbytes(self) -> int:
        """Bytes that the column takes."""
        return len(self._data) + self._ends.nbytes

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> bytes: ...

    @overload
    def __getitem__(self, row: slice) -> list[bytes]: ...

    def __getitem__(self, row: int | slice) -> bytes | list[bytes]:
        if isinstance(row, slice):
            return [self[r] for r in range(*row.indices(len(self)))]
        row = int(row)
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._data[int(self._ends[row - 1]) if row else 0 : int(self._ends[row])]

    def __iter__(self) -> Iterator[bytes]:
        start = 0
        for end in self._ends.tolist():
            yield self._data[start:end]
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blobs) and self._data == other._data and bool(np.array_equal(self._ends, other._ends))

    __hash__ = None  # type: ignore[assignment]


class Strings(Sequence[str]):
    """A column of strings, kept as UTF-8 (file names that are none survive as surrogates)."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._blobs = Blobs(v.encode("utf-8", "surrogateescape") for v in values)

    @property
    def nbytes(self) -> int:
        """Bytes that the column takes."""
        return self._blobs.nbytes

    def __len__(self) -> int:
        return len(self._blobs)

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> list[str]: ...

    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [b.decode("utf-8", "surrogateescape") for b in self._blobs[row]]
        return self._blobs[row].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (b.decode("utf-8", "surrogateescape") for b in self._blobs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Strings) and self._blobs == other._blobs

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objects:
    """The boxes and masks of all samples: the objects of row r are starts[r] to starts[r + 1].

    Attributes:
        starts: int64, shape (rows + 1,).
        boxes: Left, top, right, bottom; float32, shape (objects, 4); pixels of the upright image, or shares of its
            width and height where `relative`. As annotated: the audit, not the reader, judges them.
        classes: Position in the index's class names, int32, shape (objects,).
        crowd: Whether an object is a crowd that evaluation ignores, bool, shape (objects,).
        kept: False where the audit dropped the object, bool, shape (objects,).
        masks: One mask per object, b"" where there is none; its form is in `mask_kinds` (see data/masks.py).
        mask_kinds: NO_MASK, POLYGONS, RLE or MASK_FILE; uint8, shape (objects,).
        files: The annotation file of each row, relative to the index's root, "" where there is none.
        numbers: Line (YOLO), position (VOC, mask files) or annotation id (COCO) of each object, int64.
        areas: Square pixels of each object as COCO's files state them, which sort objects into small, medium and large; NaN where
            none is stated, None where no object has one. float64, shape (objects,).
        declared: Width and height of each row's image as its annotation states them, NaN where it does not; float64, shape
            (rows, 2). None where there are none, and after the audit.
        relative: Coordinates of boxes and polygons are shares of the image's width and height.
    """

    starts: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int32]
    crowd: npt.NDArray[np.bool_]
    kept: npt.NDArray[np.bool_]
    masks: Blobs
    mask_kinds: npt.NDArray[np.uint8]
    files: Strings
    numbers: npt.NDArray[np.int64]
    areas: npt.NDArray[np.float64] | None = None
    declared: npt.NDArray[np.float64] | None = None
    relative: bool = False

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """The sample of each object, int64, shape (objects,)."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def of(self, row: int) -> slice:
        """The objects of one sample."""
        return slice(int(self.starts[row]), int(self.starts[row + 1]))

    def where(self, number: int) -> str:
        """An object's place, for messages: annotation file, and line or number in it."""
        row = int(np.searchsorted(self.starts, number, side="right")) - 1
        return f"{self.files[row]}:{int(self.numbers[number])}"
