"""Read and decode every image once, and keep what the audit asks about it in columns."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from goodfit.core.machine import num_cores
from goodfit.core.random import permutation, stream
from goodfit.data.checks.duplicates import SIDE, thumbnail
from goodfit.data.checks.shift import picture_statistics
from goodfit.data.index import DatasetIndex
from goodfit.runtime.images import ImageError, damage, decode_bytes, decode_image, open_image, read_file

GREY_SPREAD = 8  # largest difference of two channels in a picture that counts as grey
STATISTICS_SIDE = 128
MAX_STATISTICS = 5000  # pictures whose statistics are taken; more would not tell distributions apart better
_SAMPLE = stream("scan")


@dataclass(frozen=True, slots=True)
class FileScan:
    """What one file is. `error` is a kind of finding, "" for a picture that can be used."""

    content: bytes = bytes(16)
    pixels: bytes = bytes(16)
    width: int = 0
    height: int = 0
    num_bytes: int = 0
    format: str = ""
    mode: str = ""
    grey: bool = False
    wrong_suffix: str = ""
    damaged: str = ""
    error: str = ""
    message: str = ""
    seconds: float = 0.0
    thumbnail: npt.NDArray[np.uint8] | None = None
    statistics: dict[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """The scans of all rows, in columns; texts are in dictionaries by row, since few rows have one.

    Attributes:
        contents, pixels: 128-bit BLAKE2b of each file's bytes and of its decoded pixels, uint8, shape (rows, 16).
        sizes: Width and height of the upright picture, int32, shape (rows, 2); 0 where it cannot be decoded.
        num_bytes: Size of each file, int64, shape (rows,).
        grey: bool, shape (rows,).
        formats, modes: Names by row number, as codes into `names`; int16, shape (rows,).
        names: What the codes mean.
        errors: Kind and message by row.
        wrong_suffix, damaged: Messages by row.
        thumbnails: uint8, shape (rows, T, T), in a temporary file that has no name.
        statistics: Column of each picture statistic over the rows `sampled`.
        seconds: Seconds to decode a picture, median.
    """

    contents: npt.NDArray[np.uint8]
    pixels: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int32]
    num_bytes: npt.NDArray[np.int64]
    grey: npt.NDArray[np.bool_]
    formats: npt.NDArray[np.int16]
    modes: npt.NDArray[np.int16]
    names: list[str] = field(default_factory=list)
    errors: dict[int, tuple[str, str]] = field(default_factory=dict)
    wrong_suffix: dict[int, str] = field(default_factory=dict)
    damaged: dict[int, str] = field(default_factory=dict)
    thumbnails: npt.NDArray[np.uint8]
    sampled: npt.NDArray[np.int64]
    statistics: dict[str, npt.NDArray[np.float64]]
    seconds: float = 0.0

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """Which rows could be decoded, bool, shape (rows,)."""
        return np.asarray(self.sizes[:, 0] > 0)


_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "MPO": (".jpg", ".jpeg", ".jpe", ".mpo"), "PNG": (".png",),
    "BMP": (".bmp",), "GIF": (".gif",), "TIFF": (".tif", ".tiff"), "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}  # fmt: skip


def scan_file(path: Path, *, with_statistics: bool = False) -> FileScan:
    """Read and decode one file. Never raises: what is wrong is in the result."""
    try:
        data = read_file(path, where=str(path))
    except ImageError as error:
        return FileScan(error=error.kind, message=error.message)
    content = hashlib.blake2b(data, digest_size=16).digest()
    try:
        opened = open_image(data, where=str(path))
        name, mode = opened.format or "", opened.mode
        suffixes = _SUFFIXES.get(name, ())
        wrong = name if suffixes and path.suffix.lower() not in suffixes else ""
        start = time.perf_counter()
        image = decode_bytes(opened, data, where=str(path))
        seconds = time.perf_counter() - start
        pixels = np.ascontiguousarray(image, dtype=np.uint8)
        digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=16)
        digest.update(pixels.data)
        part = pixels[:: max(1, pixels.shape[0] // 64), :: max(1, pixels.shape[1] // 64)].astype(np.int16)
        return FileScan(
            content, digest.digest(), image.width, image.height, len(data), name, mode,
            bool(np.ptp(part, axis=2).max() <= GREY_SPREAD), wrong, damage(opened), "", "", seconds,
            thumbnail(pixels), _statistics(image) if with_statistics else None,
        )  # fmt: skip
    except ImageError as error:
        return FileScan(content, num_bytes=len(data), error=error.kind, message=error.message)
    except Exception as error:  # a decoder met bytes that nobody foresaw
        return FileScan(content, num_bytes=len(data), error="unreadable", message=f"The image is damaged: {error}.")


def _statistics(image: Image.Image) -> dict[str, float]:
    """Of the picture at one size, so that sharpness can be compared."""
    factor = STATISTICS_SIDE / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return picture_statistics(np.asarray(image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)))


def scan_images(index: DatasetIndex, progress: Callable[[int, int], None] | None = None) -> Scan:
    """Scan the files of all rows on all cores, in one pass, in memory of tens of bytes a row and the thumbnails on disk."""
    num = len(index)
    sampled = np.sort(permutation(num, _SAMPLE)[:MAX_STATISTICS])
    wanted = np.zeros(num, bool)
    wanted[sampled] = True
    found = Scan(
        contents=np.zeros((num, 16), np.uint8), pixels=np.zeros((num, 16), np.uint8),
        sizes=np.zeros((num, 2), np.int32), num_bytes=np.zeros(num, np.int64), grey=np.zeros(num, bool),
        formats=np.zeros(num, np.int16), modes=np.zeros(num, np.int16), thumbnails=_nameless((num, SIDE, SIDE)),
        sampled=sampled, statistics={},
    )  # fmt: skip
    codes: dict[str, int] = {}
    seconds: list[float] = []
    position = 0
    with ThreadPoolExecutor(num_cores()) as pool:
        scans = pool.map(lambda row: scan_file(index.file(row), with_statistics=bool(wanted[row])), range(num))
        for row, scan in enumerate(scans):
            _enter(found, row, scan, codes)
            if len(seconds) < MAX_STATISTICS and not scan.error:
                seconds.append(scan.seconds)
            if wanted[row]:
                for name, value in (scan.statistics or {}).items():
                    found.statistics.setdefault(name, np.full(len(sampled), np.nan))[position] = value
                position += 1
            if progress is not None:
                progress(row + 1, num)
    found.names.extend(codes)
    object.__setattr__(found, "seconds", float(np.median(seconds)) if seconds else 0.0)
    return found


def _enter(found: Scan, row: int, scan: FileScan, codes: dict[str, int]) -> None:
    found.contents[row] = np.frombuffer(scan.content, np.uint8)
    found.pixels[row] = np.frombuffer(scan.pixels, np.uint8)
    found.num_bytes[row] = scan.num_bytes
    if scan.error:
        found.errors[row] = (scan.error, scan.message)
        return
    found.sizes[row] = scan.width, scan.height
    found.grey[row] = scan.grey
    found.formats[row] = codes.setdefault(scan.format, len(codes))
    found.modes[row] = codes.setdefault(scan.mode, len(codes))
    if scan.thumbnail is not None:
        found.thumbnails[row] = scan.thumbnail
    if scan.wrong_suffix:
        found.wrong_suffix[row] = scan.wrong_suffix
    if scan.damaged:
        found.damaged[row] = scan.damaged


def _nameless(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """An array in a temporary file: the memory can be taken away under pressure, and nothing is left behind."""
    if not np.prod(shape):
        return np.zeros(shape, np.uint8)
    with tempfile.TemporaryFile() as handle:
        return np.memmap(handle, np.uint8, "w+", shape=shape)


def small_picture(path: Path, side: int) -> Image.Image | None:
    """A picture reduced to fit `side` x `side` pixels, for pages; None where it cannot be read."""
    try:
        image = decode_image(path, min_side=side)
        image.thumbnail((side, side), Image.Resampling.BILINEAR)
        return image
    except Exception:
        return None
