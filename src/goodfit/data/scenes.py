"""Pictures with objects as training sees them: zoomed, moved, mirrored, four to a mosaic. Pure functions of (seed, epoch, sample).

Where pixels go is described by `Paste`s, so that boxes, points and masks go the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from goodfit.core.random import stream, uniform
from goodfit.data.augment import crop, fit_into, mirror_into
from goodfit.runtime.letterbox import FILL
from goodfit.runtime.masks import CutMask

_PLACE = stream("scene place")
_PARTNERS = stream("scene partners")
_MOSAIC = stream("scene mosaic")
_FLIP = stream("scene flip")
SEEN = 0.25  # of an object's area that must be left of it ...
LEAST_SIDE = 2.0  # ... and pixels of its shorter side
TILES = 4
MIDDLE = (0.3, 0.7)  # where the four pictures of a mosaic meet, as shares of the input


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenePreset:
    """How strongly a preset moves and recolours a picture with objects.

    Attributes:
        zoom: The picture is scaled by 1 ± zoom of its letterboxed size.
        mosaic: Probability that four pictures share the input (Bochkovskiy et al. 2020, YOLOv4).
        copy_paste: Probability that objects with masks of another picture lie upon it.
        colour: Brightness and contrast vary by ± this share, saturation by as much.
    """

    zoom: float = 0.0
    mosaic: float = 0.0
    copy_paste: float = 0.0
    colour: float = 0.0

    def closing(self) -> ScenePreset:
        """What is left at the end of a run: whole pictures, a little zoomed."""
        return replace(self, zoom=self.zoom / 3, mosaic=0.0, copy_paste=0.0)


SCENE_PRESETS = {
    "off": ScenePreset(),
    "light": ScenePreset(zoom=0.15, colour=0.1),
    "standard": ScenePreset(zoom=0.4, colour=0.2),
    "strong": ScenePreset(zoom=0.5, mosaic=0.5, copy_paste=0.5, colour=0.3),
}


@dataclass(frozen=True, slots=True)
class Paste:
    """A box of a picture that is scaled into a box of the input, and perhaps mirrored in it.

    Attributes:
        row: Of the picture in the index.
        source: Left, top, right, bottom in the kept picture, pixels.
        target: Left, top, right, bottom in the input, pixels.
        mirrored: Left and right are exchanged.
    """

    row: int
    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int]
    mirrored: bool

    def boxes(self, boxes: npt.NDArray[np.floating], shares: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Boxes of the upright picture as they lie in the input, not cut.

        Args:
            boxes: Left, top, right, bottom, shape (B, 4).
            shares: Width and height of the kept picture over those of the upright one, shape (2,).
        """
        s, t = self.source, self.target
        scale = np.tile(self.scale(np.ones(2)), 2)
        moved = (boxes * np.tile(shares, 2) - np.tile(s[:2], 2)) * scale + np.tile(t[:2], 2)
        if self.mirrored:
            moved = np.stack([t[0] + t[2] - moved[:, 2], moved[:, 1], t[0] + t[2] - moved[:, 0], moved[:, 3]], axis=1)
        return moved

    def scale(self, shares: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Pixels of the input for one of the upright picture, across and down. shares: as in `boxes`. Shape: (2,)."""
        s, t = self.source, self.target
        return np.array([(t[2] - t[0]) / (s[2] - s[0]), (t[3] - t[1]) / (s[3] - s[1])]) * shares

    def mask(self, mask: CutMask, shares: npt.NDArray[np.floating], out: npt.NDArray[np.uint8]) -> None:
        """Draw an object's mask into an input of shape (height, width), from the nearest pixel of the upright picture.

        Args:
            shares: As in `boxes`.
        """
        s, t = self.source, self.target
        x, y = np.arange(t[0], t[2]), np.arange(t[1], t[3])
        across = t[0] + t[2] - 1 - x if self.mirrored else x
        picture_x = ((across + 0.5 - t[0]) * (s[2] - s[0]) / (t[2] - t[0]) + s[0]) / shares[0]
        picture_y = ((y + 0.5 - t[1]) * (s[3] - s[1]) / (t[3] - t[1]) + s[1]) / shares[1]
        mask.draw(
            np.floor(picture_x).astype(np.int64), np.floor(picture_y).astype(np.int64), out[t[1] : t[3], t[0] : t[2]]
        )


def compose(
    preset: ScenePreset, *, seed: int, epoch: int, sample: int, row: int, rows: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.integer], shape: tuple[int, int], flip: float,
) -> list[Paste]:  # fmt: skip
    """Which pictures a training sample is made of, and where they go.

    Args:
        sample: What the sample is known by.
        row: Its picture.
        rows: Pictures that a mosaic may take in, of which its three partners are drawn.
        sizes: Width and height of every kept picture of the index, pixels, shape (rows of the index, 2).
        shape: Height and width of the input.
        flip: Probability that a picture is mirrored.
    """
    height, width = shape
    if float(uniform(_MOSAIC, seed, epoch, sample, 0)) >= preset.mosaic:
        return _pasted(preset, (seed, epoch, sample, 0), row, sizes[row], (0, 0, width, height), flip, shape=shape)
    draws = uniform(_MOSAIC, seed, epoch, sample, np.arange(1, 3))
    x, y = (
        round(side * (MIDDLE[0] + (MIDDLE[1] - MIDDLE[0]) * float(d)))
        for side, d in zip((width, height), draws, strict=True)
    )
    partners = rows[(uniform(_PARTNERS, seed, epoch, sample, np.arange(TILES - 1)) * len(rows)).astype(np.int64)]
    tiles = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
    first = int(float(uniform(_MOSAIC, seed, epoch, sample, 3)) * TILES)  # the sample's own place
    members = [*partners[:first].tolist(), row, *partners[first:].tolist()]
    return [paste for number, (tile, member) in enumerate(zip(tiles, members, strict=True))
            for paste in _pasted(preset, (seed, epoch, sample, number + 1), member, sizes[member], tile, flip, shape=shape, fills=True)]  # fmt: skip


def _pasted(
    preset: ScenePreset, key: tuple[int, int, int, int], row: int, size: npt.NDArray[np.integer], region: tuple[int, int, int, int],
    flip: float, *, shape: tuple[int, int], fills: bool = False,
) -> list[Paste]:  # fmt: skip
    """A picture in a region of an input of this height and width, scaled as it is served, and zoomed; where it `fills` the region, at
    least as large as that takes. Cut at the region's edges, moved anywhere else."""
    zoom, x, y = (float(d) for d in uniform(_PLACE, *key, np.arange(3)))
    mirrored = bool(uniform(_FLIP, *key) < flip)
    left, top, right, bottom = region
    scale = float(min(shape[1] / size[0], shape[0] / size[1])) * (1 + preset.zoom * (2 * zoom - 1))
    if fills:  # not shrunk to the tile: objects would come at half of the size that they are served at
        scale = max(scale, float((right - left) / size[0]), float((bottom - top) / size[1]))
    wide, high = max(1.0, size[0] * scale), max(1.0, size[1] * scale)
    spare = (right - left) - wide, (bottom - top) - high  # negative where the picture reaches over
    at = left + spare[0] * (x if preset.zoom or fills else 0.5), top + spare[1] * (y if preset.zoom or fills else 0.5)
    target = (
        max(left, round(at[0])),
        max(top, round(at[1])),
        min(right, round(at[0] + wide)),
        min(bottom, round(at[1] + high)),
    )
    source = tuple(
        min(int(limit), max(0, round((edge - start) / length * int(limit))))
        for edge, start, length, limit in zip(target, (*at, *at), (wide, high, wide, high), (*size, *size), strict=True)
    )
    if min(target[2] - target[0], target[3] - target[1], source[2] - source[0], source[3] - source[1]) < 1:
        return []
    return [Paste(row, (source[0], source[1], source[2], source[3]), target, mirrored)]


def draw_scene(pastes: list[Paste], pictures: list[npt.NDArray[np.uint8]], out: npt.NDArray[np.uint8]) -> None:
    """Draw the pixels into an input of shape (height, width, 3)."""
    out[...] = FILL
    canvas = torch.from_numpy(out).permute(2, 0, 1).unsqueeze(0)
    for paste, picture in zip(pastes, pictures, strict=True):
        left, top, right, bottom = paste.target
        into = canvas[:, :, top:bottom, left:right]
        part = crop(picture, paste.source)
        made = torch.empty((1, bottom - top, right - left, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        fit_into(part, made)
        if paste.mirrored:
            mirror_into(made.clone(memory_format=torch.preserve_format), made)
        into.copy_(made)


def cut_boxes(
    boxes: npt.NDArray[np.floating], region: tuple[int, int, int, int]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Boxes cut at a region's edges, and which of them are still to be seen: a quarter of the area, and two pixels."""
    cut = np.clip(boxes.astype(np.float64), np.tile(region[:2], 2), np.tile(region[2:], 2))
    whole, left = (np.clip(b[:, 2:] - b[:, :2], 0, None) for b in (boxes, cut))
    seen = (left.min(axis=1, initial=np.inf) >= LEAST_SIDE) & (left.prod(axis=1) >= SEEN * whole.prod(axis=1))
    return cut, seen
