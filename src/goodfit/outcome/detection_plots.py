"""The pictures of a detector's run: batches with their boxes, what was found beside what is there, and curves over the confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from goodfit.data.checks.draw import class_colour, contact_sheet, draw_objects
from goodfit.data.index import DatasetIndex
from goodfit.data.objects import MaskBook, objects_of
from goodfit.metrics.coco import ImageObjects, overlaps_of
from goodfit.metrics.detection import LEVELS, NEAR, DetectionMeter
from goodfit.outcome.plots import plain
from goodfit.runtime.images import decode_image
from goodfit.runtime.letterbox import Letterbox
from goodfit.runtime.masks import CutMask

MAX_PICTURES = 16  # of a batch
NUM_SIDE_BY_SIDE = 6
NUM_WORST = 12
MOST_SIDE = 480  # pixels of a picture on a sheet; smaller pictures are enlarged to that ...
ENLARGED = 3.0  # ... by so much at most
MARGIN = 1.0  # of an object's longer side, around it
CUT_SIDE = 200
MAX_CURVES = 20  # classes with curves of their own


def plot_scenes(batch: Mapping[str, Any], class_names: Sequence[str], letterbox: Letterbox, path: Path) -> None:
    """The input of a model as pictures with their boxes: what it really sees, after augmentation.

    Args:
        batch: `image`, normalised, float32, (N, 3, H, W); `boxes` (N, G, 4) and `classes` (N, G), -1 where there is none; perhaps
            `masks`, for each image uint8 (its objects, H, W).
        letterbox: Whose normalisation is undone.
    """
    images = batch["image"][:MAX_PICTURES].float().cpu().numpy()
    mean, std = np.array(letterbox.mean).reshape(3, 1, 1), np.array(letterbox.std).reshape(3, 1, 1)
    pixels = np.clip(np.rint(255 * (images * std + mean)), 0, 255).astype(np.uint8)
    boxes, classes = batch["boxes"].cpu().numpy(), batch["classes"].cpu().numpy()
    made, captions = [], []
    for number, picture in enumerate(pixels):
        there = classes[number] >= 0
        image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
        masks = batch["masks"][number][: int(there.sum())].cpu().numpy() > 0 if "masks" in batch else None
        made.append(draw_objects(image, boxes[number][there], classes[number][there], class_names, masks))
        captions.append(f"{(num := int(there.sum()))} object{'' if num == 1 else 's'}")
    contact_sheet(made, captions, columns=4).save(path)


def most_mistakes(images: Sequence[ImageObjects], threshold: float) -> list[int]:
    """The numbers of the images with the most mistakes, those first."""
    counts = [sum(map(len, _mistakes(image, threshold))) for image in images]
    return sorted(range(len(images)), key=lambda n: (-counts[n], n))[:NUM_SIDE_BY_SIDE]


def plot_found(
    index: DatasetIndex, rows: npt.NDArray[np.int64], meter: DetectionMeter, threshold: float, path: Path
) -> None:
    """Some pictures with what is there, and beside it with what was found, boxes and masks.

    Args:
        rows: The pictures, as `meter` has judged them.
        meter: One that kept the masks found, where there are some.
    """
    book = MaskBook(index) if meter.masks else None
    sheet, captions = [], []
    for number, (row, image) in enumerate(zip(rows.tolist(), meter.images, strict=True)):
        picture = decode_image(index.file(row))
        ratio = min(ENLARGED, MOST_SIDE / max(picture.size))
        small = picture.resize(
            [max(1, round(s * ratio)) for s in picture.size], Image.Resampling.BILINEAR, reducing_gap=2.0
        )
        sure = np.flatnonzero(image.scores >= threshold)
        there = [book.get(row, int(n)) for n in objects_of(index, row).numbers] if book is not None else None
        found = [meter.kept[number][k] for k in sure] if book is not None else None
        for boxes, classes, masks in (
            (image.true_boxes, image.true_classes, there),
            (image.boxes[sure], image.classes[sure], found),
        ):
            drawn = None if masks is None else [_reduced(m, ratio, small.size) for m in masks]
            sheet.append(draw_objects(small, boxes * ratio, classes, index.class_names, drawn))
        missed, alarms = _mistakes(image, threshold)
        captions += [f"there: {len(image.true_boxes)}\n{index.name(row)}",
                     f"found: {len(sure)}\nmissed {len(missed)}, false alarms {len(alarms)}"]  # fmt: skip
    if sheet:
        contact_sheet(sheet, captions, columns=2).save(path)


def plot_mistakes(
    index: DatasetIndex, rows: npt.NDArray[np.int64], images: Sequence[ImageObjects], threshold: float, folder: Path
) -> None:
    """missed.png and false_alarms.png: the worst of both, cut out."""
    judged = [_mistakes(image, threshold) for image in images]
    lost = [(_area(images[n].true_boxes[k]), n, k) for n, (missing, _) in enumerate(judged) for k in missing]
    wrong = [(float(images[n].scores[k]), n, k) for n, (_, found) in enumerate(judged) for k in found]
    for name, chosen, truth in (
        ("missed", sorted(lost, reverse=True), True),
        ("false_alarms", sorted(wrong, reverse=True), False),
    ):
        (folder / f"{name}.png").unlink(missing_ok=True)  # of the weights before an extension
        cuts, texts = [], []
        for value, n, k in chosen[:NUM_WORST]:
            box = images[n].true_boxes[k] if truth else images[n].boxes[k]
            kind = int(images[n].true_classes[k] if truth else images[n].classes[k])
            cuts.append(_cut(decode_image(index.file(int(rows[n]))), box, class_colour(kind)))
            texts.append(
                f"{index.class_names[kind]}"
                + ("" if truth else f" {value:.2f}")
                + f"\n{Path(index.name(int(rows[n]))).name}"
            )
        if cuts:
            contact_sheet(cuts, texts, columns=4).save(folder / f"{name}.png")


def _mistakes(image: ImageObjects, threshold: float) -> tuple[list[int], list[int]]:
    """Objects that were not found, and detections where no such object is that has none yet, at an IoU of 0.5, of masks where the
    image is judged by them."""
    sure = np.flatnonzero(image.scores >= threshold)
    sure = sure[np.argsort(-image.scores[sure], kind="stable")]
    overlaps = overlaps_of(image, sure, np.arange(len(image.true_boxes)))
    left, alarms = ~image.crowd, []
    for row, number in enumerate(sure):
        same = (image.true_classes == image.classes[number]) & (overlaps[row] >= NEAR)
        free = np.where(same & left, overlaps[row], -1.0)
        if len(free) and free.max() >= NEAR:
            left[int(free.argmax())] = False
        elif not (same & image.crowd).any():
            alarms.append(int(number))
    return [int(k) for k in np.flatnonzero(left)], alarms


def _area(box: npt.NDArray[np.floating]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _reduced(mask: CutMask, ratio: float, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """A mask as it lies in the picture made smaller, by the nearest pixel. Shape: (height, width)."""
    x, y = (np.floor((np.arange(side) + 0.5) / ratio).astype(np.int64) for side in size)
    return mask.at(x, y)


def _cut(picture: Image.Image, box: npt.NDArray[np.floating], colour: tuple[int, int, int]) -> Image.Image:
    """A box with its surroundings, drawn into it, at one size."""
    side = max(box[2] - box[0], box[3] - box[1], 1.0) * (1 + 2 * MARGIN)
    left, top = (box[0] + box[2] - side) / 2, (box[1] + box[3] - side) / 2
    scale = CUT_SIDE / side
    made = picture.transform(
        (CUT_SIDE, CUT_SIDE), Image.Transform.EXTENT, (left, top, left + side, top + side), Image.Resampling.BILINEAR
    )
    edges = [float((box[k] - (left, top)[k % 2]) * scale) for k in range(4)]
    ImageDraw.Draw(made).rectangle(edges, outline=colour, width=2)
    return made


def plot_confidence(curves: Mapping[str, Mapping[str, Sequence[float]]], threshold: float, path: Path) -> None:
    """Precision against recall, and F1 against the confidence, of each class and of their mean, at an IoU of 0.5."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    shown = list(curves.items())[:MAX_CURVES]
    for number, (name, curve) in enumerate(shown):
        colour = [c / 255 for c in class_colour(number)]
        axes[0].plot(curve["recall"], curve["precision"], color=colour, linewidth=1.4, label=plain(name))
        axes[1].plot(LEVELS, curve["f1"], color=colour, linewidth=1.4, label=plain(name))
    if curves:
        mean = np.mean([curve["f1"] for curve in curves.values()], axis=0)
        axes[1].plot(LEVELS, mean, color="black", linewidth=2.2, label="mean")
    axes[1].axvline(threshold, color="#777777", linestyle="--", linewidth=1)
    axes[1].annotate(
        f"threshold {threshold:.2f}", (threshold, 0.02), xytext=(4, 0), textcoords="offset points", fontsize=8
    )
    for axis, (title, x, y) in zip(
        axes, (("precision and recall", "recall", "precision"), ("F1 by confidence", "confidence", "F1")), strict=True
    ):
        axis.set(title=title, xlabel=x, ylabel=y, xlim=(0, 1.02), ylim=(0, 1.02))
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if shown:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
