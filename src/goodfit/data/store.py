"""Decoded training pictures, from memory or from their files: the same pixels either way."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from PIL import Image

from goodfit.data.index import DatasetIndex
from goodfit.runtime.images import decode_image

RESERVE = 1.5  # pictures are kept at this multiple of the input size, so that a crop of half the area keeps its detail


class PictureStore:
    """The training pictures as uint8 arrays, reduced to a shorter side of at most 1.5 times the input size.

    With `cache="ram"` each picture is decoded once and kept (loader processes inherit what was there when they
    started); with "off" it is decoded at every use.
    """

    def __init__(self, index: DatasetIndex, *, imgsz: int, cache: str) -> None:
        self._index = index
        self._side = round(RESERVE * imgsz)
        self._kept: dict[int, npt.NDArray[np.uint8]] | None = {} if cache == "ram" else None

    def get(self, row: int) -> npt.NDArray[np.uint8]:
        """One picture, uint8, shape (height, width, 3).

        Raises:
            ImageError: the file changed since the audit and can no longer be read.
        """
        if self._kept is not None and row in self._kept:
            return self._kept[row]
        picture = self._decode(row)
        if self._kept is not None:
            self._kept[row] = picture
        return picture

    def warm(self, rows: npt.NDArray[np.int64], threads: int) -> None:
        """Decode these rows now, on several threads (no operation without a cache)."""
        if self._kept is not None:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(self.get, (int(r) for r in rows if int(r) not in self._kept)))

    def _decode(self, row: int) -> npt.NDArray[np.uint8]:
        image = decode_image(self._index.file(row), min_side=2 * self._side)
        factor = self._side / min(image.size)
        if factor < 1:
            size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            image = image.resize(size, Image.Resampling.BICUBIC)
        return np.asarray(image, dtype=np.uint8)
