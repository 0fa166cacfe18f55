"""What a detector is judged by: COCO's average precision, curves over the confidence, and the confusion of classes."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from goodfit.core.random import derive_seed, stream
from goodfit.metrics.coco import (
    IOUS,
    MOST,
    Evaluation,
    ImageObjects,
    Matches,
    evaluate_coco,
    interpolate,
    match_class,
    overlaps_of,
)
from goodfit.runtime.masks import CutMask, mask_overlaps, paste_mask

LEVELS = np.arange(1, 100) / 100  # confidences that a threshold is chosen from
NEAR = 0.5  # IoU from which a detection is right, for curves, confusion and threshold
RESAMPLES = 1000
RESAMPLED_VALUES = 1 << 22  # at once, of which some eight arrays of float64 are alive: 270 MB
_BOOTSTRAP = stream("bootstrap")
Floats = npt.NDArray[np.float64]
_COLUMNS = ("boxes", "scores", "classes", "true_boxes", "true_classes", "crowd", "areas", "overlaps", "own_areas")


class DetectionMeter:
    """Collects detections and objects image by image, in pixels of the pictures, and the terms of the loss.

    Args:
        num_classes: How many there are.
        masks: Whether objects have masks, which are judged too.
        keep: Keep the masks found, to draw them; for a few pictures.
        most: Detections of a class in an image that AP looks at: COCO's hundred, or what is reported where that is more.

    Attributes:
        kept: The masks found in each image, where they are kept.
        images: What was found and what is there, by boxes.
        masked: The same by masks; empty without them.
    """

    def __init__(self, num_classes: int, *, masks: bool = False, keep: bool = False, most: int = MOST) -> None:
        self.num_classes = num_classes
        self.masks = masks
        self.most = max(MOST, most)
        self.images: list[ImageObjects] = []
        self.masked: list[ImageObjects] = []
        self.kept: list[list[CutMask]] = []
        self._keep = keep
        self._terms: dict[str, list[float]] = {}

    def update(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Add a batch.

        Args:
            outputs: `boxes` (N, K, 4) in the input, `scores` (N, K), `classes` (N, K), -1 where there is none, `masks`, if there
                are some, within the boxes (N, K, M, M), and `terms`, the sum and count of each term of the loss.
            batch: `place` (N, 4): scales of x and y, left and top of the picture in the input; `size` (N, 2): width and
                height of the picture; `true_boxes` (N, G, 4) in the picture, `true_classes` (N, G), -1 where there is none,
                and `crowd` (N, G); perhaps `areas` (N, G), square pixels as the annotations state them, NaN where they do not,
                which then count for small, medium and large, as in COCO's own evaluation; with masks `true_masks`, a list of
                `CutMask` for each image.
        """
        for name, (total, count) in outputs["terms"].items():
            held = self._terms.setdefault(name, [0.0, 0.0])
            held[0] += float(total)
            held[1] += float(count)
        given = {**{k: outputs[k] for k in ("boxes", "scores", "classes")},
                 **{k: batch[k] for k in ("place", "size", "true_boxes", "true_classes", "crowd")}}  # fmt: skip
        given["areas"] = batch["areas"] if "areas" in batch else torch.full_like(batch["true_boxes"][..., 0], math.nan)
        arrays = {k: v.detach().cpu().to(torch.float64).numpy() for k, v in given.items()}
        for n in range(len(arrays["boxes"])):
            whole = _boxes_out(arrays["boxes"][n][arrays["classes"][n] >= 0], arrays["place"][n])
            image = _image(whole, *(arrays[k][n] for k in given if k not in ("boxes", "place")))
            self.images.append(image)
            if self.masks:
                found = outputs["masks"][n].detach().float().cpu().numpy()[arrays["classes"][n] >= 0]
                width, height = arrays["size"][n]
                pasted = [paste_mask(p, box, (int(width), int(height))) for p, box in zip(found, whole, strict=True)]
                self.masked.append(
                    _by_masks(image, pasted, batch["true_masks"][n], arrays["areas"][n][arrays["true_classes"][n] >= 0])
                )
                if self._keep:
                    self.kept.append(pasted)

    def state(self) -> dict[str, Any]:
        """Everything as plain values and arrays."""
        return {
            "terms": self._terms,
            "images": [_columns(i) for i in self.images],
            "masked": [_columns(i) for i in self.masked],
        }

    def merge(self, states: list[dict[str, Any]]) -> None:
        """Replace the state by those of several meters, one after another."""
        names = dict.fromkeys(name for state in states for name in state["terms"])
        self._terms = {
            n: [math.fsum(s["terms"][n][k] for s in states if n in s["terms"]) for k in range(2)] for n in names
        }
        self.images = [ImageObjects(**columns) for state in states for columns in state["images"]]
        self.masked = [ImageObjects(**columns) for state in states for columns in state["masked"]]

    def compute(self) -> dict[str, float]:
        """The loss, and AP over IoU 0.5 to 0.95, at 0.5 and at 0.75, of boxes and of masks; 0 where there is nothing to be found."""
        terms = {name: total / (count or 1.0) for name, (total, count) in self._terms.items()}
        judged = {"": evaluate_coco(self.images, self.num_classes, by_size=False, most=self.most).summary()}
        if self.masks:
            judged["mask_"] = evaluate_coco(self.masked, self.num_classes, by_size=False, most=self.most).summary()
        figures = {f"{kind}{k}": max(0.0, found[k]) for kind, found in judged.items() for k in ("ap", "ap50", "ap75")}
        return {"loss": sum(terms.values()) if terms else math.nan, **figures}

    def evaluation(self, *, masks: bool = False, most: int = MOST) -> Evaluation:
        """Precision and recall of every class, by boxes or by masks; as COCO has them, unless `most` is another."""
        return evaluate_coco(self.masked if masks else self.images, self.num_classes, most=most)


def _columns(image: ImageObjects) -> dict[str, Any]:
    return {k: getattr(image, k) for k in _COLUMNS}


def _by_masks(image: ImageObjects, pasted: Sequence[CutMask], there: Sequence[CutMask], stated: Floats) -> ImageObjects:
    """The same image judged by its masks. stated: areas, shape (G,)."""
    drawn = np.array([m.area for m in there], np.float64)
    return replace(image, overlaps=mask_overlaps(pasted, there, image.crowd), areas=np.where(np.isnan(stated), drawn, stated),
                   own_areas=np.array([m.area for m in pasted], np.float64))  # fmt: skip


def _boxes_out(boxes: Floats, place: Floats) -> Floats:
    """Boxes of the input as they lie in the picture, not cut at its edges: their masks belong to the whole of them."""
    return (boxes - np.tile(place[2:], 2)) / np.tile(place[:2], 2)


def _image(
    boxes: Floats, scores: Floats, classes: Floats, size: Floats, true_boxes: Floats, true_classes: Floats, crowd: Floats,
    stated: Floats,
) -> ImageObjects:  # fmt: skip
    found, there = classes >= 0, true_classes >= 0
    kept = true_boxes[there]
    return ImageObjects(
        boxes=np.clip(boxes, 0.0, np.tile(size, 2)), scores=scores[found], classes=classes[found].astype(np.int64), true_boxes=kept,
        true_classes=true_classes[there].astype(np.int64), crowd=crowd[there] > 0,
        areas=np.where(np.isnan(stated[there]), (kept[:, 2:] - kept[:, :2]).prod(axis=1), stated[there]),
    )  # fmt: skip


def choose_threshold(images: Sequence[ImageObjects], num_classes: int) -> tuple[float, float]:
    """The confidence at which F1, as the mean over the classes that occur, is best at an IoU of 0.5; and that F1.

    Of equal ones, the middle.
    """
    curves = [curve["f1"] for c in range(num_classes) if (curve := confidence_curve(images, c)) is not None]
    if not curves:
        return 0.5, 0.0
    mean = np.mean(curves, axis=0)
    best = np.flatnonzero(mean >= mean.max() - 1e-12)
    return float(LEVELS[best[len(best) // 2]]), float(mean.max())


def confidence_curve(images: Sequence[ImageObjects], kind: int) -> dict[str, Floats] | None:
    """Precision, recall and F1 of a class at each of `LEVELS`, at an IoU of 0.5; None if it has no object. Shapes: (99,).

    All that was found counts, as it is reported; COCO's hundred of an image are AP's.
    """
    found = match_class(images, kind, ious=np.array([NEAR]), most=sys.maxsize)
    total = int(found.positives.sum())
    if not total:
        return None
    counted = ~found.ignored[0]
    scores, hits = found.scores[counted], found.hits[0][counted]
    above = np.searchsorted(-scores, -LEVELS, side="right")  # detections at least as sure as each level
    right = np.concatenate([[0], np.cumsum(hits)])[above].astype(np.float64)
    precision = np.divide(right, above, out=np.ones_like(right), where=above > 0)
    recall = right / total
    return {"precision": precision, "recall": recall, "f1": 2 * right / (above + total)}


def confusion_matrix(images: Sequence[ImageObjects], num_classes: int, threshold: float) -> npt.NDArray[np.int64]:
    """How often an object of each class (rows) was found as each class (columns); the last row counts what was found where
    nothing is, the last column what was not found. Detections above the threshold are matched, best first, to the object
    that they overlap most, of any class, at an IoU of 0.5 or more. Crowds are left aside. Shape: (classes + 1, classes + 1).
    """
    made = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for image in images:
        sure = np.flatnonzero(image.scores >= threshold)
        sure = sure[np.argsort(-image.scores[sure], kind="stable")]
        overlaps = overlaps_of(image, sure, np.arange(len(image.true_boxes)))
        left = ~image.crowd
        for row, number in enumerate(sure):
            values = np.where(left, overlaps[row], -1.0) if len(left) else np.zeros(0)
            best = int(values.argmax()) if len(values) else -1
            if best >= 0 and values[best] >= NEAR:
                left[best] = False
                made[image.true_classes[best], image.classes[number]] += 1
            elif not (len(left) and (overlaps[row][image.crowd] >= NEAR).any()):
                made[num_classes, image.classes[number]] += 1
        for kind in image.true_classes[left]:
            made[kind, num_classes] += 1
    return made


def ap_interval(
    images: Sequence[ImageObjects], num_classes: int, iou: float | None, *, seed: int = 0, most: int = MOST
) -> tuple[float, float]:
    """95 % interval of AP at one IoU, or over all ten, by the bootstrap over images (Efron 1979): as many images are drawn with
    repetition, 1,000 times, or 200 for ten IoUs. Objects of one image belong together, so images are drawn and not objects."""
    ious, resamples = (IOUS, RESAMPLES // 5) if iou is None else (np.array([iou]), RESAMPLES)
    classes = [match_class(images, c, ious=ious, most=most) for c in range(num_classes)]
    classes = [found for found in classes if found.positives.sum()]
    if not classes:
        return 0.0, 0.0
    draws = np.random.default_rng(derive_seed(_BOOTSTRAP, seed)).multinomial(
        len(images), np.full(len(images), 1 / len(images)), size=resamples
    )  # how often each image comes in each draw
    sums, counts = np.zeros(resamples), np.zeros(resamples)
    for found in classes:
        block = max(1, RESAMPLED_VALUES // max(1, len(found.scores)))
        values = np.concatenate([_resampled(found, draws[k : k + block]) for k in range(0, resamples, block)])
        there = ~np.isnan(values)
        sums[there] += values[there]
        counts += there
    means = sums[counts > 0] / counts[counts > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _resampled(found: Matches, draws: npt.NDArray[np.int64]) -> Floats:
    """AP of a class in every draw of images, the mean over the IoUs, NaN where it has no object. Shape: (draws,)."""
    total = (draws * found.positives).sum(axis=1).astype(np.float64)
    made = []
    for hits, ignored in zip(found.hits, found.ignored, strict=True):
        weights = draws[:, found.images].astype(np.float64) * ~ignored
        right = np.cumsum(weights * hits, axis=1)
        recall = np.divide(right, total[:, None], out=np.zeros_like(right), where=total[:, None] > 0)
        precision = right / (np.cumsum(weights, axis=1) + np.spacing(1))
        made.append(interpolate(recall, precision).mean(axis=1))
    return np.where(total > 0, np.mean(made, axis=0), np.nan)
