"""Per-sample augmentation that moves pixels: a pure function of (seed, epoch, sample), on uint8."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from goodfit.core.random import stream, uniform

_CROP = stream("crop")
_COLOUR = stream("colour")
_FLIP = stream("flip")
_TRIES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentPreset:
    """How strongly a preset moves and recolours a picture.

    Attributes:
        area: Smallest and largest share of the picture's area that is cut out (Inception-style random crop, Szegedy et
            al. 2015); None leaves the crop to `zoom` and `shift`.
        zoom: The centre square is scaled by 1 ± zoom.
        shift: ... and moved by up to this share of its side, in both directions.
        colour: Brightness and contrast vary by ± this share, saturation by as much.
    """

    area: tuple[float, float] | None = None
    zoom: float = 0.0
    shift: float = 0.0
    colour: float = 0.0


PRESETS = {
    "off": AugmentPreset(),
    "light": AugmentPreset(zoom=0.15, shift=0.1),
    "standard": AugmentPreset(area=(0.35, 1.0), colour=0.2),
}


def crop_boxes(
    preset: AugmentPreset, *, seed: int, epoch: int, samples: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64],
    size: int, resize: int,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """Which part of each picture becomes the input.

    Args:
        samples: Row of each sample in the index, shape (N,).
        sizes: Width and height of each picture, pixels, shape (N, 2).
        size, resize: As in Preprocessing, for presets that start from the centre square.

    Returns:
        Left, top, right, bottom in pixels, shape (N, 4); may reach over the border for `zoom` and `shift`.
    """
    draws = uniform(_CROP, seed, epoch, samples[:, None], np.arange(4 * _TRIES))
    width, height = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    if preset.area is None:
        side = np.minimum(width, height) * size / resize * (1 + preset.zoom * (2 * draws[:, 0] - 1))
        x = width / 2 + preset.shift * side * (2 * draws[:, 1] - 1)
        y = height / 2 + preset.shift * side * (2 * draws[:, 2] - 1)
        return np.stack([x - side / 2, y - side / 2, x + side / 2, y + side / 2], axis=1)
    area = width[:, None] * height[:, None] * (preset.area[0] + (preset.area[1] - preset.area[0]) * draws[:, 0::4])
    ratio = np.exp(math.log(3 / 4) + math.log(16 / 9) * draws[:, 1::4])
    w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
    fits = (w <= width[:, None]) & (h <= height[:, None])
    first = fits.argmax(axis=1)
    rows = np.arange(len(samples))
    square = np.minimum(width, height)
    w = np.where(fits.any(axis=1), w[rows, first], square)
    h = np.where(fits.any(axis=1), h[rows, first], square)
    left = (width - w) * draws[rows, 4 * first + 2]
    top = (height - h) * draws[rows, 4 * first + 3]
    return np.stack([left, top, left + w, top + h], axis=1)


def cut(picture: npt.NDArray[np.uint8], box: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.uint8]:
    """Scale a box of a picture to (size, size) with an antialiased bilinear filter; beyond the border its edge is repeated.

    Args:
        picture: uint8, shape (height, width, 3).
        box: Left, top, right, bottom in pixels.

    Returns:
        uint8, shape (3, size, size).
    """
    height, width = picture.shape[:2]
    left, top, right, bottom = (float(v) for v in box)
    pad = math.ceil(max(0.0, -left, -top, right - width, bottom - height))
    if pad:
        picture = np.pad(picture, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
        left, top, right, bottom = left + pad, top + pad, right + pad, bottom + pad
    height, width = picture.shape[:2]
    inside = (max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom))
    scaled = Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR, box=inside)
    return np.asarray(scaled, dtype=np.uint8).transpose(2, 0, 1)


def colour_factors(
    strength: float, *, seed: int, epoch: int, samples: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Brightness, contrast and saturation factors of each sample, around 1. Shape (N, 3), float32."""
    draws = uniform(_COLOUR, seed, epoch, samples[:, None], np.arange(3))
    return (1 + strength * (2 * draws - 1)).astype(np.float32)


def flips(probability: float, *, seed: int, epoch: int, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which samples are mirrored. Shape (N,)."""
    return uniform(_FLIP, seed, epoch, samples) < probability
