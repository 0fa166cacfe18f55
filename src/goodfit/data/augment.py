"""Per-sample augmentation that moves pixels: a pure function of (seed, epoch, sample), on uint8.

Where pixels go is described by `Placement`, so that boxes, points and masks can go the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

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
        policy: "off", "trivial" or "rand": see policy.py.
        erase: Probability that a rectangle is erased (Zhong et al. 2020).
    """

    area: tuple[float, float] | None = None
    zoom: float = 0.0
    shift: float = 0.0
    colour: float = 0.0
    policy: str = "off"
    erase: float = 0.0

    def zoomed(self, scale: float) -> AugmentPreset:
        """With another zoom, where `scale` is not 0: the side of a random crop is at least 1 - scale of the largest
        possible one, the centre square is scaled by 1 ± scale."""
        if scale == 0:
            return self
        if self.area is not None:
            return replace(self, area=((1 - scale) ** 2, self.area[1]))
        return replace(self, zoom=scale)

    def closing(self) -> AugmentPreset:
        """What is left of the preset at the end of a run, when the model settles on undistorted pictures: small moves."""
        if self.area is not None:
            return AugmentPreset(area=(max(self.area[0], 0.7), self.area[1]))
        return AugmentPreset(zoom=self.zoom / 3, shift=self.shift / 3)


PRESETS = {
    "off": AugmentPreset(),
    "light": AugmentPreset(zoom=0.15, shift=0.1),
    "standard": AugmentPreset(area=(0.35, 1.0), colour=0.2),
    "strong": AugmentPreset(area=(0.2, 1.0), policy="trivial", erase=0.25),
}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the pixels of some pictures go: a box of each is scaled to the square input, and may be mirrored.

    Attributes:
        boxes: Left, top, right, bottom in pixels of the picture, int64, shape (N, 4); may reach over the border.
        mirrored: bool, shape (N,).
        size: Side of the input, pixels.
    """

    boxes: npt.NDArray[np.int64]
    mirrored: npt.NDArray[np.bool_]
    size: int

    def points(self, number: int, points: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Points (x, y) of picture `number` as they lie in the input. Shape: (P, 2)."""
        left, top, right, bottom = self.boxes[number].tolist()
        moved = (points - (left, top)) * (self.size / (right - left), self.size / (bottom - top))
        if self.mirrored[number]:
            moved[:, 0] = self.size - moved[:, 0]
        return moved

    def objects(self, number: int, boxes: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Boxes (left, top, right, bottom) of picture `number` as they lie in the input, not clipped. Shape: (B, 4)."""
        moved = self.points(number, boxes.reshape(-1, 2)).reshape(-1, 4)
        if self.mirrored[number]:
            moved = moved[:, [2, 1, 0, 3]]
        return moved


def place(
    preset: AugmentPreset, *, seed: int, epoch: int, samples: npt.NDArray[np.int64], sizes: npt.NDArray[np.integer],
    size: int, share: float, flip: float,
) -> Placement:  # fmt: skip
    """Draw which part of each picture becomes the input, and whether it is mirrored.

    Args:
        preset: How strongly.
        samples: Row of each sample in the index, shape (N,).
        sizes: Width and height of each picture, pixels, shape (N, 2).
        size: Side of the input, pixels; the boxes do not depend on it.
        share: Side of the centre square over the picture's shorter side, for presets that start from that square.
        flip: Probability of a mirror image.
    """
    boxes = _crop_boxes(preset, seed, epoch, samples, sizes, share)
    low = np.rint(boxes[:, :2]).astype(np.int64)
    high = np.maximum(low + 1, np.rint(boxes[:, 2:]).astype(np.int64))
    return Placement(np.concatenate([low, high], axis=1), uniform(_FLIP, seed, epoch, samples) < flip, size)


def _crop_boxes(
    preset: AugmentPreset, seed: int, epoch: int, samples: npt.NDArray[np.int64], sizes: npt.NDArray[np.integer],
    share: float,
) -> npt.NDArray[np.float64]:  # fmt: skip
    width, height = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    if preset.area is None:
        draws = uniform(_CROP, seed, epoch, samples[:, None], np.arange(3))
        side = np.minimum(width, height) * share * (1 + preset.zoom * (2 * draws[:, 0] - 1))
        x = width / 2 + preset.shift * side * (2 * draws[:, 1] - 1)
        y = height / 2 + preset.shift * side * (2 * draws[:, 2] - 1)
        return np.stack([x - side / 2, y - side / 2, x + side / 2, y + side / 2], axis=1)
    draws = uniform(_CROP, seed, epoch, samples[:, None], np.arange(4 * _TRIES))
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


_resize = torch.ops.aten._upsample_bilinear2d_aa.out  # what interpolate(antialias=True) calls, into memory of ours
_flip = torch.ops.aten.flip.out


def crop(picture: npt.NDArray[np.uint8], box: Sequence[int]) -> torch.Tensor:
    """A box of a picture, as a view; beyond the border the picture's edge is repeated, in a copy.

    Args:
        picture: uint8, shape (height, width, 3).
        box: Left, top, right, bottom in pixels.

    Returns:
        uint8, shape (1, 3, box height, box width), in channels-last order.
    """
    height, width = picture.shape[:2]
    left, top, right, bottom = box
    if left < 0 or top < 0 or right > width or bottom > height:
        rows = np.clip(np.arange(top, bottom), 0, height - 1)
        columns = np.clip(np.arange(left, right), 0, width - 1)
        part = picture[rows[:, None], columns]
    else:
        part = picture[top:bottom, left:right]
    return torch.from_numpy(part).permute(2, 0, 1).unsqueeze(0)


def fit_into(part: torch.Tensor, out: torch.Tensor) -> None:
    """Scale a crop to the input with an antialiased bilinear filter.

    Torch's kernel for uint8 images in channels-last order takes 80 µs for 200 × 200 to 160 × 160 pixels, and writes
    straight into the batch; Pillow takes 450 µs, and grid_sample more.

    Args:
        part: uint8, shape (1, 3, height, width), in channels-last order.
        out: Where it goes: uint8, shape (1, 3, size, size), in channels-last order.
    """
    if part.shape == out.shape:
        out.copy_(part)
    else:
        _resize(part, out.shape[2:], False, None, None, out=out)


def mirror_into(picture: torch.Tensor, out: torch.Tensor) -> None:
    """Exchange left and right: 13 µs for 160 × 160 pixels, where numpy takes 120. Shapes as in fit_into."""
    _flip(picture, [3], out=out)


def colour_factors(
    strength: float, *, seed: int, epoch: int, samples: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Brightness, contrast and saturation factors of each sample, around 1. Shape (N, 3), float32."""
    draws = uniform(_COLOUR, seed, epoch, samples[:, None], np.arange(3))
    return (1 + strength * (2 * draws - 1)).astype(np.float32)
