"""Boxes and masks drawn on a picture, and sheets of pictures: what a person looks at to trust the data."""

from __future__ import annotations

import colorsys
import math
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from goodfit.runtime.masks import CutMask, cut_mask

# Tableau's ten, which stay apart for most colour-blind readers; further classes get hues of their own.
_TABLEAU = (
    "#4e79a7",
    "#f28e2b",
    "#e15759",
    "#76b7b2",
    "#59a14f",
    "#edc948",
    "#b07aa1",
    "#ff9da7",
    "#9c755f",
    "#bab0ac",
)
_GOLDEN = 0.618034  # steps of the golden ratio never come close to an earlier hue
_MASK_ALPHA = 115  # of 255: the picture below stays visible
_MAX_TEXT = 200  # characters looked at: nobody reads more in a label, and measuring a million takes seconds
_SMALLEST_CELL = 128  # pixels: below this no caption fits, so smaller pictures are enlarged
_LARGEST_CELL = 640
_GAP = 8
_DRAWABLE = frozenset([chr(c) for c in range(32, 127)] + list("«»°±·‘’“”…‹›"))  # what Pillow's own font has


def class_colour(number: int) -> tuple[int, int, int]:
    """The colour of a class, the same in every picture: red, green, blue in 0–255."""
    number = max(0, int(number))
    if number < len(_TABLEAU):
        text = _TABLEAU[number]
        return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
    red, green, blue = colorsys.hsv_to_rgb((number * _GOLDEN) % 1.0, 0.65 if number % 2 else 0.85, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def drawable(text: str) -> str:
    """A text with what the font cannot draw replaced: accents are dropped, other letters become one "?" a run."""
    letters: list[str] = []
    for letter in text[:_MAX_TEXT]:
        if letter in _DRAWABLE:
            letters.append(letter)
        elif letter.isspace():
            letters.append(" ")
        elif not unicodedata.combining(letter):
            plain = [c for c in unicodedata.normalize("NFKD", letter) if c in _DRAWABLE]
            if plain or letters[-1:] != ["?"]:
                letters += plain or ["?"]
    return "".join(letters)


def draw_objects(
    image: Image.Image,
    boxes: npt.NDArray[np.floating],
    classes: npt.NDArray[np.integer] | Sequence[int],
    names: Sequence[str],
    masks: Sequence[npt.NDArray[np.bool_] | CutMask] | npt.NDArray[np.bool_] | None = None,
) -> Image.Image:
    """A copy of a picture with boxes, labels and half-transparent masks in one colour per class.

    Boxes are drawn as far as they lie in the picture; reversed ones are turned round and those that are not finite are
    skipped, since this also shows data that is wrong. Labels of larger boxes come first, and one that would hide
    another is left out; where there is one class they would say nothing, and hide small objects.

    Args:
        image: RGB, not changed.
        boxes: Left, top, right, bottom in pixels, shape (n, 4).
        classes: Position in `names` of each object, shape (n,).
        names: Names of classes; where the font can draw nothing of a name, "class 3" stands for it.
        masks: One mask per object, cut out or bool of shape (height, width).

    Raises:
        ValueError: shapes do not fit each other.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    numbers = [int(c) for c in classes]
    if len(boxes) != len(numbers) or (masks is not None and len(masks) != len(boxes)):
        raise ValueError("there must be one class, and one mask or none at all, for each box")
    picture = image.convert("RGB") if image.mode != "RGB" else image.copy()
    for mask, number in zip(() if masks is None else masks, numbers, strict=False):
        if not isinstance(mask, CutMask) and mask.shape != (picture.height, picture.width):
            raise ValueError(f"a mask of shape {mask.shape} on a picture of {picture.width}×{picture.height}")
        cut = mask if isinstance(mask, CutMask) else cut_mask(mask)
        high, wide = cut.pixels.shape
        if high and wide:
            alpha = Image.fromarray(np.where(cut.pixels, _MASK_ALPHA, 0).astype(np.uint8))
            picture.paste(class_colour(number), (cut.left, cut.top, cut.left + wide, cut.top + high), alpha)
    edges, rows = _inside(boxes, picture.size)
    pen = ImageDraw.Draw(picture)
    width = max(1, round(min(picture.size) / 200))
    for edge, row in zip(edges, rows, strict=True):
        pen.rectangle(tuple(edge), outline=class_colour(numbers[row]), width=width)
    if len(names) > 1:
        _draw_labels(pen, picture.size, edges, [numbers[row] for row in rows], names)
    return picture


def _inside(boxes: npt.NDArray[np.float64], size: tuple[int, int]) -> tuple[list[list[float]], list[int]]:
    """Finite boxes cut to the picture, and their rows; boxes wholly outside are dropped."""
    rows = np.flatnonzero(np.isfinite(boxes).all(axis=1))
    kept = boxes[rows]
    low = np.minimum(kept[:, :2], kept[:, 2:])
    high = np.maximum(kept[:, :2], kept[:, 2:])
    last = np.array(size, np.float64) - 1
    seen = ((low <= last) & (high >= 0)).all(axis=1)
    edges = np.concatenate([np.clip(low, 0, last), np.clip(high, 0, last)], axis=1)[seen]
    return edges.tolist(), [int(r) for r in rows[seen]]


def _draw_labels(
    pen: ImageDraw.ImageDraw, size: tuple[int, int], edges: list[list[float]], numbers: list[int], names: Sequence[str]
) -> None:
    font = _font(max(10, min(24, round(min(size) / 32))))
    taken = np.zeros((0, 4))
    for at in sorted(range(len(edges)), key=lambda k: -(edges[k][2] - edges[k][0]) * (edges[k][3] - edges[k][1])):
        text = _shorten(_name(numbers[at], names), font, size[0] - 4)
        wide, high = math.ceil(font.getlength(text)) + 4, font.size + 4
        left = max(0.0, min(edges[at][0], size[0] - wide))
        top = edges[at][1] - high if edges[at][1] >= high else min(edges[at][1], size[1] - high)
        plate = (left, top, left + wide, top + high)
        meets = (
            (taken[:, 0] < plate[2]) & (taken[:, 2] > plate[0]) & (taken[:, 1] < plate[3]) & (taken[:, 3] > plate[1])
        )
        if meets.any():
            continue
        taken = np.concatenate([taken, np.array([plate])])
        colour = class_colour(numbers[at])
        pen.rectangle(plate, fill=colour)
        bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]  # ITU-R BT.601 luma
        pen.text((left + 2, top + 1), text, fill="black" if bright > 120 else "white", font=font)


def _name(number: int, names: Sequence[str]) -> str:
    text = drawable(names[number]).strip() if 0 <= number < len(names) else ""
    return text if any(c.isalnum() for c in text) else f"class {number}"


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut and ended by an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:  # the longest start that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle] + "…") <= width else (low, middle - 1)
    return text[:low].rstrip() + "…"


def contact_sheet(
    images: npt.NDArray[np.uint8] | Sequence[Image.Image], captions: Sequence[str], columns: int
) -> Image.Image:
    """Pictures in rows on white, each with its caption below: what the model really sees.

    Pictures under 128 pixels are enlarged by a whole number without smoothing; those above 640 are reduced.

    Args:
        images: uint8, shape (n, 3, side, side), or pictures of any sizes.
        captions: One per picture, cut to its width; a line break makes a second line.
        columns: Pictures per row.

    Raises:
        ValueError: there is no picture, or not one caption for each.
    """
    pictures = [_cell(Image.fromarray(np.ascontiguousarray(i.transpose(1, 2, 0))) if isinstance(i, np.ndarray) else i)
                for i in images]  # fmt: skip
    if not pictures or len(pictures) != len(captions) or columns < 1:
        raise ValueError("a sheet needs at least one picture, one caption for each, and one column")
    wide, high = max(p.width for p in pictures), max(p.height for p in pictures)
    size = max(11, min(20, round(wide / 14)))
    font, line = _font(size), round(1.35 * size)
    texts = [[_shorten(drawable(part), font, wide) for part in caption.split("\n")[:2]] for caption in captions]
    text_high = line * max(len(t) for t in texts) + 4
    columns = min(columns, len(pictures))
    step = wide + _GAP, high + text_high + _GAP
    sheet = Image.new("RGB", (columns * step[0] + _GAP, -(-len(pictures) // columns) * step[1] + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        left, top = _GAP + number % columns * step[0], _GAP + number // columns * step[1]
        sheet.paste(picture, (left + (wide - picture.width) // 2, top + high - picture.height))
        for row, text in enumerate(lines):
            pen.text((left + (wide - font.getlength(text)) / 2, top + high + 2 + row * line), text, "#1c2733", font)
    return sheet


def _cell(picture: Image.Image) -> Image.Image:
    """A picture at a size that can be looked at."""
    longest = max(picture.size)
    if longest < _SMALLEST_CELL:
        factor = math.ceil(_SMALLEST_CELL / longest)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    elif longest > _LARGEST_CELL:
        picture = picture.copy()
        picture.thumbnail((_LARGEST_CELL, _LARGEST_CELL))
    return picture if picture.mode == "RGB" else picture.convert("RGB")
