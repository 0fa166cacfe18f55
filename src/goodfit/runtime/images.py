"""From the bytes of an image file to the array a model takes: the one serving path."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from goodfit.core.errors import DataError

try:
    import simplejpeg as _simplejpeg
except ImportError:  # Pillow gives the same pixels
    _simplejpeg = None

MAX_PIXELS = 89_478_485  # Pillow's own limit: a 24-bit picture of a quarter of a gigabyte

_DAMAGE = "goodfit damage"  # key in Image.info

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class ImageError(DataError):
    """One image cannot be read; `kind` is the audit's word for it: unreadable, truncated, wrong_type or huge."""

    def __init__(self, message: str, *, kind: str = "unreadable", where: str = "") -> None:
        super().__init__(message, where=where, next="leave the file out, or replace it by a readable image")
        self.kind = kind


def read_file(source: Path | bytes, *, where: str = "") -> bytes:
    """The bytes of an image file; raises ImageError if it cannot be read."""
    try:
        return source.read_bytes() if isinstance(source, Path) else source
    except OSError as error:
        raise ImageError(f"The file cannot be read: {error.strerror}.", kind="unreadable", where=where) from error


def open_image(source: Path | bytes, *, where: str = "") -> Image.Image:
    """Open an image by its header, without decoding it.

    Raises:
        ImageError: there is no such file, it is empty, it is not an image, or it has more than 89 million pixels.
    """
    where = where or (str(source) if isinstance(source, Path) else "")
    data = read_file(source, where=where)
    if not data:
        raise ImageError("The file is empty (zero bytes).", kind="unreadable", where=where)
    try:
        image = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("The image is over the limit of 89 million pixels.", kind="huge", where=where) from error
    except UnidentifiedImageError as error:
        raise ImageError("The file is not an image.", kind="wrong_type", where=where) from error
    except Exception as error:  # a decoder met bytes that it cannot handle
        raise ImageError(f"The file is damaged: {error}.", kind="unreadable", where=where) from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"The image has {image.width * image.height / 1e6:.0f} million pixels, over the limit of 89.",
            kind="huge",
            where=where,
        )
    return image


def decode_image(source: Path | bytes, *, min_side: int | None = None, where: str = "") -> Image.Image:
    """Decode to upright 8-bit RGB: EXIF orientation applied, grey, palette, CMYK and 16-bit converted, transparency on
    white, the first frame of animations. The one function through which every picture is decoded.

    JPEGs go through simplejpeg where it is installed (a quarter faster), else through Pillow, with equal pixels.

    Args:
        source: A path or the bytes of a file.
        min_side: If the caller needs no more than this shorter side (pixels), a JPEG may be decoded at a half, a
            quarter or an eighth of its size (DCT scaling, 6 times faster on 12-megapixel photos).

    Raises:
        ImageError: the file cannot be opened, or is cut off or damaged.
    """
    where = where or (str(source) if isinstance(source, Path) else "")
    data = read_file(source, where=where)
    return decode_bytes(open_image(data, where=where), data, min_side=min_side, where=where)


def decode_bytes(image: Image.Image, data: bytes, *, min_side: int | None = None, where: str = "") -> Image.Image:
    """As decode_image, for an image that was opened from `data`."""
    try:
        factor = _draft_factor(image, min_side)
        fast = _decode_jpeg(image, data, factor)
        if fast is not None:
            return upright(fast, image.getexif)
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
        image.load()
        return to_rgb(upright(image, image.getexif))
    except Exception as error:
        raise decoding_error(error, where) from error


def damage(image: Image.Image) -> str:
    """What was found wrong in an opened JPEG that decoded nevertheless; "" if nothing (or without simplejpeg)."""
    return str(image.info.get(_DAMAGE, ""))


def decoding_error(error: Exception, where: str = "") -> ImageError:
    """What a decoder raised, as an ImageError of kind truncated or unreadable."""
    truncated = isinstance(error, OSError | SyntaxError | IndexError | EOFError)
    return ImageError(f"The image is cut off or damaged: {error}.", kind="truncated" if truncated else "unreadable",
                      where=where)  # fmt: skip


def _draft_factor(image: Image.Image, min_side: int | None) -> int:
    """By how much a JPEG may be reduced while it is decoded: 1, 2, 4 or 8, as Pillow's draft mode chooses."""
    if min_side is None or image.format != "JPEG":
        return 1
    scale = min(image.width // min_side, image.height // min_side)
    return next((f for f in (8, 4, 2) if scale >= f), 1)


def _decode_jpeg(image: Image.Image, data: bytes, factor: int) -> Image.Image | None:
    """Pixels of a plain JPEG by libjpeg-turbo itself, reduced by the factor; None where Pillow must decide."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or _simplejpeg is None:
        return None
    height, width = -(-image.height // factor), -(-image.width // factor)
    try:
        pixels = _simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError as error:  # it is stricter than Pillow, which reads on after small damage
        image.info[_DAMAGE] = str(error)
        return None
    return Image.fromarray(pixels) if pixels.shape[:2] == (height, width) else None


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def orientation(exif: Callable[[], Any]) -> int:
    """The EXIF orientation, 1 to 8; 1 where the EXIF block says nothing or cannot be read."""
    try:
        value = exif().get(0x0112, 1)
    except Exception:  # Pillow raises many kinds for broken EXIF
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(image: Image.Image, exif: Callable[[], Any]) -> Image.Image:
    """Turned as the EXIF orientation of its file says."""
    turn = _TURNS.get(orientation(exif))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as 8-bit RGB; what is transparent becomes white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):
        return _wide_to_grey(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _wide_to_grey(image: Image.Image) -> Image.Image:
    """16-bit and wider grey values to 8 bits: scaled by the type's range, or by 255 where no value is above it."""
    values = np.asarray(image, dtype=np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=65535.0, neginf=0.0)
    largest = float(values.max()) if values.size else 0.0
    if image.mode.startswith("I;16") or largest > 255.0:
        values = values / 257.0  # 65535 -> 255
    elif image.mode == "F" and largest <= 1.0:
        values = values * 255.0
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How a decoded image becomes model input; the same in validation, test, export and serving.

    Attributes:
        size: Side of the square input, pixels.
        resize: The shorter side is scaled to this many pixels before the centre `size` x `size` is cut out.
        interpolation: nearest, bilinear, bicubic or lanczos, each with antialiasing.
        mean, std: Per channel (RGB), for values scaled to [0, 1].
    """

    size: int
    resize: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Preprocessing:
        """The inverse of to_dict.

        Raises:
            DataError: an entry is missing or out of range.
        """
        try:
            made = cls(
                size=int(value["size"]),
                resize=int(value["resize"]),
                interpolation=str(value["interpolation"]),
                mean=(float(value["mean"][0]), float(value["mean"][1]), float(value["mean"][2])),
                std=(float(value["std"][0]), float(value["std"][1]), float(value["std"][2])),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"The preprocessing description is incomplete: {error}.") from error
        if not 1 <= made.size <= made.resize <= 16384 or made.interpolation not in RESAMPLING or min(made.std) <= 0:
            raise DataError(f"The preprocessing description cannot be used: {value}.")
        return made

    def at(self, size: int) -> Preprocessing:
        """The same at another input size, the shorter side scaled in the same ratio."""
        return replace(self, size=size, resize=max(size, round(self.resize * size / self.size)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def pixels(self, source: Path | bytes, *, where: str = "") -> npt.NDArray[np.uint8]:
        """Decode, scale and cut one image. Returns uint8 of shape (3, size, size).

        Raises:
            ImageError: the image cannot be read.
        """
        return self.fit(decode_image(source, min_side=2 * self.resize, where=where))

    def fit(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Scale and cut a decoded RGB image. Returns uint8 of shape (3, size, size).

        The centre square is cut from the source and scaled in one step, so that a picture of 1 x 20,000 pixels costs no
        more than another.
        """
        side = min(image.size) * self.size / self.resize
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        scaled = image.resize((self.size, self.size), RESAMPLING[self.interpolation], box=box)
        return np.asarray(scaled, dtype=np.uint8).transpose(2, 0, 1)
