"""`Letterbox`: a picture of any shape scaled into an input of one shape, with nothing cut off; and the way back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from goodfit.core.errors import DataError
from goodfit.runtime.images import RESAMPLING, decode_bytes, decoding_error, open_image, orientation, read_file

FILL = 114  # grey of the bars, as in YOLO's letterbox
KIND = "letterbox"  # `fit` of the description


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a picture lies in the input: x goes to `scale_x * x + left`, y to `scale_y * y + top`."""

    scale_x: float
    scale_y: float
    left: int
    top: int
    width: int  # of the scaled picture, pixels
    height: int

    def boxes_in(self, boxes: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Boxes (left, top, right, bottom) of the picture as they lie in the input. Shape: (B, 4)."""
        return boxes.astype(np.float64) * self._scales + self._offsets

    def boxes_out(self, boxes: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Boxes of the input as they lie in the picture; what lies in the bars is beyond its edges. Shape: (B, 4)."""
        return np.asarray((boxes.astype(np.float64) - self._offsets) / self._scales)

    @property
    def _scales(self) -> npt.NDArray[np.float64]:
        return np.array([self.scale_x, self.scale_y] * 2)

    @property
    def _offsets(self) -> npt.NDArray[np.float64]:
        return np.array([self.left, self.top] * 2, np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Letterbox:
    """How a decoded image becomes a detector's input; the same in validation, test, export and serving.

    The picture is scaled, up or down, to the largest size that fits, put into the middle, and the rest is grey.

    Attributes:
        width, height: Of the input, pixels.
        interpolation: nearest, bilinear, bicubic or lanczos, each with antialiasing.
        mean, std: Per channel (RGB), for values scaled to [0, 1].
    """

    width: int
    height: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Letterbox:
        """The inverse of to_dict.

        Raises:
            DataError: an entry is missing or out of range.
        """
        try:
            if value["fit"] != KIND:
                raise ValueError(f"fit is {value['fit']}")
            mean, std = ((float(v[0]), float(v[1]), float(v[2])) for v in (value["mean"], value["std"]))
            made = cls(width=int(value["width"]), height=int(value["height"]), interpolation=str(value["interpolation"]),
                       mean=mean, std=std)  # fmt: skip
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"The preprocessing description is incomplete: {error}.") from error
        sides_fit = min(made.width, made.height) >= 1 and max(made.width, made.height) <= 16384
        if not sides_fit or made.interpolation not in RESAMPLING or min(made.std) <= 0:
            raise DataError(f"The preprocessing description cannot be used: {value}.")
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"fit": KIND, **asdict(self)}

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the input, pixels."""
        return self.height, self.width

    def at(self, longest: int, step: int) -> Letterbox:
        """The same with another longer side, both sides in multiples of `step` pixels."""
        scale = longest / max(self.width, self.height)
        sides = (max(step, round(side * scale / step) * step) for side in (self.width, self.height))
        width, height = sides
        return replace(self, width=width, height=height)

    def place(self, size: tuple[int, int]) -> Place:
        """Where a picture of this width and height (pixels) comes to lie."""
        scale = min(self.width / size[0], self.height / size[1])
        width, height = (max(1, min(limit, round(side * scale)))
                         for side, limit in zip(size, (self.width, self.height), strict=True))  # fmt: skip
        return Place(scale_x=width / size[0], scale_y=height / size[1], left=(self.width - width) // 2,
                     top=(self.height - height) // 2, width=width, height=height)  # fmt: skip

    def read(self, source: Path | bytes, *, where: str = "") -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
        """Decode and scale one image. Returns uint8 of shape (3, height, width), and the upright picture's width and height.

        Raises:
            ImageError: the image cannot be read.
        """
        where = where or (str(source) if isinstance(source, Path) else "")
        data = read_file(source, where=where)
        image = open_image(data, where=where)
        size = upright_size(image)
        place = self.place(size)
        decoded = decode_bytes(image, data, min_side=2 * min(place.width, place.height), where=where)
        return self.fit(decoded, place), size

    def fit(self, image: Image.Image, place: Place) -> npt.NDArray[np.uint8]:
        """Scale a decoded RGB image to its place. Returns uint8 of shape (3, height, width)."""
        made = np.full((self.height, self.width, 3), FILL, np.uint8)
        scaled = image.resize((place.width, place.height), RESAMPLING[self.interpolation])
        made[place.top : place.top + place.height, place.left : place.left + place.width] = np.asarray(scaled)
        return made.transpose(2, 0, 1)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image as it will stand after its EXIF orientation, pixels; ImageError for a damaged TIFF."""
    if image.format == "TIFF":  # Pillow turns these itself, while it loads them
        try:
            image.load()
        except Exception as error:  # loaded again, a damaged one would pass for whole
            raise decoding_error(error) from error
        return image.width, image.height
    return (image.height, image.width) if orientation(image.getexif) >= 5 else (image.width, image.height)
