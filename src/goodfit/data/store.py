"""Decoded training pictures, from memory, from a file that is mapped, or from their own files: the same pixels."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image

from goodfit.core.errors import StorageError
from goodfit.core.places import cache_folder, free_bytes
from goodfit.core.safeio import TEMPORARY, storage_errors
from goodfit.data.index import DatasetIndex
from goodfit.runtime.images import ImageError, decode_image

RESERVE = 1.5  # pictures are kept at this multiple of the input size, so that a crop of half the area keeps its detail
FORMAT = "pictures-1"  # changes whenever the same file would be decoded to other pixels
ABANDONED_SECONDS = 3600.0  # without a touch, after which a half-written cache whose writer is gone is deleted
KEEP_SHARE = 0.5  # of the free disk that caches may take together; the least recently used leave first

Pixels = npt.NDArray[np.uint8]


class PictureStore:
    """The training pictures as uint8 arrays, reduced to a shorter side of at most 1.5 times the input size.

    Args:
        index: The dataset; its `sizes` say how large each picture will be.
        rows: The rows to keep; others are decoded at every use.
        imgsz: Side of the largest model input that they must be good for, pixels.
        cache: "ram" keeps them in memory that loader processes share; "disk" in one file that is mapped, and shared
            by processes and by runs on the same pictures at the same size; "off" decodes at every use.
    """

    def __init__(self, index: DatasetIndex, rows: npt.NDArray[np.int64], *, imgsz: int, cache: str) -> None:
        self._index = index
        self._side = round(RESERVE * imgsz)
        self._cache = cache if index.sizes is not None and len(rows) else "off"
        self._rows = rows
        self._kept: Pixels | None = None
        if index.sizes is not None:
            self._shapes = reduced_sizes(index.sizes, self._side)
        if self._cache != "off":
            sizes = np.zeros(len(index), np.int64)
            sizes[rows] = 3 * self._shapes[rows].astype(np.int64).prod(axis=1)
            self._ends = np.cumsum(sizes)
            self._held = sizes > 0

    def __getstate__(self) -> dict[str, Any]:
        """For loader processes that are started anew: memory stays behind, a file is mapped again."""
        state = dict(self.__dict__)
        state["_kept"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._cache == "disk" and self.path.is_file():
            self._kept = _map_file(self.path)

    @property
    def is_warm(self) -> bool:
        """Whether the pictures are kept, so that `get` decodes nothing."""
        return self._kept is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of all kept pictures; 0 without a cache."""
        return int(self._ends[-1]) if self._cache != "off" else 0

    @property
    def kept_sizes(self) -> npt.NDArray[np.int32]:
        """Width and height that `get` gives for each row of the index, pixels, shape (rows, 2); the audit must have been made."""
        assert self._index.sizes is not None
        return self._shapes

    @property
    def path(self) -> Path:
        """The file of a disk cache, named by the content of its pictures and by how they were made."""
        digest = hashlib.blake2b(f"{FORMAT} {self._side}".encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self._index.contents[self._rows]).tobytes())
        digest.update(np.ascontiguousarray(self._shapes[self._rows]).tobytes())
        return cache_folder() / f"{FORMAT}-{digest.hexdigest()}.bin"

    def get(self, row: int) -> Pixels:
        """One picture, uint8, shape (height, width, 3); a view of the cache, not to be written to.

        Raises:
            ImageError: the file changed since the audit and can no longer be read.
        """
        if self._kept is None or not self._held[row]:
            return self._decode(row)
        width, height = self._shapes[row]
        end = int(self._ends[row])
        return self._kept[end - 3 * int(width) * int(height) : end].reshape(int(height), int(width), 3)

    def warm(self, threads: int, progress: Callable[[int, int], None] | None = None) -> str:
        """Decode all rows to be kept, on several threads. Returns how, in a few words for people.

        Raises:
            ImageError: a file changed since the audit and can no longer be read.
            StorageError: the cache file cannot be written.
        """
        if self._cache == "off" or self._kept is not None:
            return "no cache" if self._cache == "off" else "cache in place"
        if self._cache == "ram":
            kept = np.frombuffer(mmap.mmap(-1, self.num_bytes), np.uint8)
            self._fill(kept, threads, progress)
            self._kept = kept
            return f"{len(self._rows):,} pictures decoded into memory, {self.num_bytes / 1e6:,.1f} MB"
        if self.path.is_file() and self.path.stat().st_size == self.num_bytes:
            with contextlib.suppress(OSError):
                os.utime(self.path)  # it was used: others leave before it
            self._kept = _map_file(self.path)
            return f"{len(self._rows):,} pictures from an earlier run's cache"
        self._write(threads, progress)
        return f"{len(self._rows):,} pictures decoded to disk, {self.num_bytes / 1e6:,.1f} MB in {self.path}"

    def _fill(self, kept: Pixels, threads: int, progress: Callable[[int, int], None] | None) -> None:
        def place(row: int) -> None:
            end = int(self._ends[row])
            picture = self._decode(row).reshape(-1)
            kept[end - picture.size : end] = picture

        with ThreadPoolExecutor(threads) as pool:
            for done, _ in enumerate(pool.map(place, self._rows.tolist()), start=1):
                if progress is not None:
                    progress(done, len(self._rows))

    def _write(self, threads: int, progress: Callable[[int, int], None] | None) -> None:
        """Fill a file under a temporary name and rename it: another process sees all of it or nothing."""
        path = self.path
        temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _make_room(path.parent, self.num_bytes)
            try:
                with open(temporary, "wb+") as handle:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(handle.fileno(), 0, self.num_bytes)  # a full disk shows now, not as SIGBUS
                    else:
                        handle.truncate(self.num_bytes)
                    mapped = np.memmap(handle, np.uint8, "r+", shape=(self.num_bytes,))
                    self._fill(mapped, threads, progress)
                    mapped.flush()
                    os.fsync(handle.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        self._kept = _map_file(path)

    def _decode(self, row: int) -> Pixels:
        with as_audited():
            image = decode_image(self._index.file(row), min_side=2 * self._side)
        if self._cache != "off":
            size = (int(self._shapes[row, 0]), int(self._shapes[row, 1]))
        else:
            width, height = image.size if self._index.sizes is None else self._index.sizes[row]
            ((w, h),) = reduced_sizes(np.array([[width, height]]), self._side)
            size = (int(w), int(h))
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return np.array(image, dtype=np.uint8)  # a copy: torch warns of Pillow's read-only memory


@contextlib.contextmanager
def as_audited() -> Iterator[None]:
    """Around reading a file that could be read before: what helps is that file as it was, since a run goes on with no other."""
    try:
        yield
    except ImageError as error:
        error.next = "put the file back as it was, then goodfit resume RUN"
        raise


def reduced_sizes(sizes: npt.NDArray[np.integer], side: int) -> npt.NDArray[np.int32]:
    """Width and height of pictures whose shorter side is reduced to `side`, never enlarged. Shape: that of sizes."""
    factor = np.minimum(1.0, side / np.maximum(1, sizes.min(axis=1, keepdims=True)))
    return np.maximum(1, np.rint(sizes * factor)).astype(np.int32)


def _map_file(path: Path) -> Pixels:
    """A file's bytes, mapped; private to this process if anything wrote to them."""
    with storage_errors(path), open(path, "rb") as handle:
        return np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)


def _remove_abandoned(folder: Path) -> None:
    """Delete what writers that were killed left. Another machine may write into the same folder, whose processes are not seen here:
    what was touched within the last hour stays."""
    for path in folder.glob(f"{TEMPORARY}pictures-*"):
        number = path.name.rpartition("-")[2]
        with contextlib.suppress(OSError):
            alive = number.isdigit() and psutil.pid_exists(int(number))
            if not alive and time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()


def _make_room(folder: Path, num_bytes: int) -> None:
    """Delete caches that were least recently used until this one takes no more than half of what is free.

    Raises:
        StorageError: it would not fit even then.
    """
    _remove_abandoned(folder)
    older = sorted((p.stat().st_mtime, p) for p in folder.glob("pictures-*.bin"))
    taken = sum(p.stat().st_size for _, p in older)
    while older and num_bytes + taken > KEEP_SHARE * (free_bytes(folder) + taken):
        _, oldest = older.pop(0)
        taken -= oldest.stat().st_size
        oldest.unlink()
    if num_bytes > free_bytes(folder):
        raise StorageError(f"The cache needs {num_bytes / 1e9:.1f} GB, and {free_bytes(folder) / 1e9:.1f} GB are free.",
                           where=str(folder), kept="everything but the cache",
                           next="use cache=off, or another GOODFIT_CACHE_DIR")  # fmt: skip
