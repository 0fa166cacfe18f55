"""Average precision as COCO defines it (Lin et al. 2014): detections matched to objects, then precision over recall.

The arithmetic is that of COCO's public API (pycocotools 2.0), in numpy, with all IoU thresholds at once; tests hold it equal to
that. Where hotcoco is installed, the same numbers come from there, some ten times faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))  # all, small, medium, large: square pixels
FEW, MOST = (1, 10), 100  # detections of one class in an image that are looked at

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageObjects:
    """What was found in an image, and what is there. Boxes are left, top, right, bottom in pixels of the picture.

    Attributes:
        boxes, scores, classes: Of the detections, shapes (K, 4), (K,), (K,).
        true_boxes, true_classes: Of the objects, shapes (G, 4), (G,).
        crowd: Objects that stand for many: what is found in them is neither right nor wrong. Shape (G,).
        areas: Square pixels of the objects, shape (G,).
        overlaps: IoU of every detection with every object, shape (K, G), where it is that of masks; None takes the boxes'.
        own_areas: Square pixels of the detections, shape (K,), where they are those of masks.
    """

    boxes: Floats
    scores: Floats
    classes: Ints
    true_boxes: Floats
    true_classes: Ints
    crowd: Bools
    areas: Floats
    overlaps: Floats | None = None
    own_areas: Floats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Matches:
    """Of one class in one range of areas, over all images, by falling score.

    Attributes:
        scores: Shape (D,).
        images: Number of the image of each detection, shape (D,).
        ranks: Place of each among its image's detections of this class, from 0; shape (D,).
        hits: Whether it was matched to an object that counts, by IoU threshold; shape (T, D).
        ignored: Whether it is left out, by IoU threshold; shape (T, D).
        positives: Objects that count in each image, shape (images,).
    """

    scores: Floats
    images: Ints
    ranks: Ints
    hits: Bools
    ignored: Bools
    positives: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Precision at 101 recalls and the recall reached, -1 where a class has no object.

    Attributes:
        precision: Shape (T, 101, classes, areas, 3), as COCO's API has it.
        recall: Shape (T, classes, areas, 3).
    """

    precision: Floats = field(repr=False)
    recall: Floats = field(repr=False)

    def summary(self) -> dict[str, float]:
        """COCO's twelve figures; -1 where nothing is there to be found."""
        at = {0.5: 0, 0.75: 5}
        made = {
            "ap": _mean(self.precision[..., 0, 2]),
            "ap50": _mean(self.precision[at[0.5], ..., 0, 2]),
            "ap75": _mean(self.precision[at[0.75], ..., 0, 2]),
        }
        for number, name in enumerate(("small", "medium", "large"), start=1):
            made[f"ap_{name}"] = _mean(self.precision[..., number, 2])
        for number, most in enumerate((*FEW, MOST)):
            made[f"ar_{most}"] = _mean(self.recall[..., 0, number])
        for number, name in enumerate(("small", "medium", "large"), start=1):
            made[f"ar_{name}"] = _mean(self.recall[..., number, 2])
        return made

    def by_class(self) -> list[dict[str, float]]:
        """AP, AP50 and AR of each class; -1 for a class without objects."""
        return [{"ap": _mean(self.precision[:, :, c, 0, 2]), "ap50": _mean(self.precision[0, :, c, 0, 2]),
                 "ar_100": _mean(self.recall[:, c, 0, 2])} for c in range(self.precision.shape[2])]  # fmt: skip


def _mean(values: Floats) -> float:
    there = values[values > -1]
    return float(there.mean()) if there.size else -1.0


def evaluate_numpy(
    images: Sequence[ImageObjects], num_classes: int, *, by_size: bool = True, most: int = MOST
) -> Evaluation:
    """Match and accumulate in numpy.

    Args:
        by_size: Also small, medium and large objects, and the best 1 and 10 detections; else those stay -1, for a quarter of the time.
        most: Detections of one class in an image that are looked at; COCO's hundred, unless images have more objects.
    """
    shape = (num_classes, len(AREAS), len(FEW) + 1)
    precision, recall = -np.ones((len(IOUS), len(RECALLS), *shape)), -np.ones((len(IOUS), *shape))
    for kind in range(num_classes):
        for number, area in enumerate(AREAS if by_size else AREAS[:1]):
            found = match_class(images, kind, area, most=most)
            for place, best in enumerate((*FEW, most)):
                if (by_size or best == most) and found.positives.sum():
                    made = accumulate(found, best)
                    precision[:, :, kind, number, place], recall[:, kind, number, place] = made
    return Evaluation(precision=precision, recall=recall)


def match_class(
    images: Sequence[ImageObjects], kind: int, area: tuple[float, float] = AREAS[0], *, ious: Floats = IOUS, most: int = MOST
) -> Matches:  # fmt: skip
    """Match the detections of one class, the best `most` of each image, to the objects of that class."""
    scores, numbers, ranks, hits, ignored = [], [], [], [], []
    positives = np.zeros(len(images), np.int64)
    for number, image in enumerate(images):
        found, there = np.flatnonzero(image.classes == kind), np.flatnonzero(image.true_classes == kind)
        if not len(found) and not len(there):
            continue
        found = found[np.argsort(-image.scores[found], kind="stable")][:most]
        outside = (image.areas[there] < area[0]) | (image.areas[there] > area[1])
        left_out = image.crowd[there] | outside
        order = np.argsort(left_out, kind="stable")
        there, left_out = there[order], left_out[order]
        positives[number] = int((~left_out).sum())
        overlaps = overlaps_of(image, found, there)
        matched = _match(overlaps, left_out, image.crowd[there], ious)
        own = _areas(image, found)
        missed = matched < 0
        aside = np.where(missed, (own < area[0]) | (own > area[1]), left_out[matched] if len(there) else False)
        scores.append(image.scores[found])
        numbers.append(np.full(len(found), number, np.int64))
        ranks.append(np.arange(len(found)))
        hits.append(~missed & ~aside)
        ignored.append(aside)
    if not scores:
        none = np.zeros(0)
        return Matches(scores=none, images=none.astype(np.int64), ranks=none.astype(np.int64), positives=positives,
                       hits=np.zeros((len(ious), 0), bool), ignored=np.zeros((len(ious), 0), bool))  # fmt: skip
    flat = np.concatenate(scores)
    order = np.argsort(-flat, kind="stable")
    return Matches(scores=flat[order], images=np.concatenate(numbers)[order], ranks=np.concatenate(ranks)[order],
                   hits=np.concatenate(hits, axis=1)[:, order], ignored=np.concatenate(ignored, axis=1)[:, order],
                   positives=positives)  # fmt: skip


def _areas(image: ImageObjects, found: Ints) -> Floats:
    if image.own_areas is not None:
        return image.own_areas[found]
    boxes = image.boxes[found]
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def overlaps_of(image: ImageObjects, found: Ints, there: Ints) -> Floats:
    """IoU of detections and objects; with a crowd, the share of the detection that lies in it. Shape: (K, G)."""
    if image.overlaps is not None:
        return image.overlaps[np.ix_(found, there)]
    first, second = image.boxes[found], image.true_boxes[there]
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    own, other = (((b[:, 2:] - b[:, :2]).prod(axis=1)) for b in (first, second))
    union = np.where(image.crowd[there][None, :], own[:, None], own[:, None] + other[None, :] - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _match(overlaps: Floats, left_out: Bools, crowd: Bools, ious: Floats) -> Ints:
    """The object of each detection (best first) at each threshold, -1 where there is none. Shape: (T, K).

    The one that overlaps most of those that count and are free; else of those that are left out, of which crowds are always
    free. Of equal ones, the last.
    """
    num, objects = overlaps.shape
    matched = np.full((len(ious), num), -1, np.int64)
    if not objects:
        return matched
    limits = np.minimum(ious, 1 - 1e-10)[:, None]
    free = np.ones((len(ious), objects), bool)
    rows = np.arange(len(ious))
    for number in range(num):
        near = free & (overlaps[number][None, :] >= limits)
        if not near.any():
            continue
        counted = near & ~left_out
        chosen = np.where(counted.any(axis=1)[:, None], counted, near)
        values = np.where(chosen, overlaps[number][None, :], -1.0)
        best = objects - 1 - values[:, ::-1].argmax(axis=1)
        some = chosen.any(axis=1)
        matched[some, number] = best[some]
        free[rows[some], best[some]] = crowd[best[some]]
    return matched


def accumulate(found: Matches, most: int = MOST) -> tuple[Floats, Floats]:
    """Precision at 101 recalls, made to fall, and the recall reached. Shapes: (T, 101), (T,)."""
    chosen = found.ranks < most
    hits, ignored = found.hits[:, chosen], found.ignored[:, chosen]
    right = np.cumsum(hits & ~ignored, axis=1, dtype=np.float64)
    wrong = np.cumsum(~hits & ~ignored, axis=1, dtype=np.float64)
    recall = right / found.positives.sum()
    precision = right / (right + wrong + np.spacing(1))
    return interpolate(recall, precision), recall[:, -1] if recall.shape[1] else np.zeros(len(recall))


def interpolate(recall: Floats, precision: Floats) -> Floats:
    """Precision at the 101 recalls: the best at this recall or above, 0 beyond the last. Shapes: (T, D) → (T, 101)."""
    made = np.zeros((len(recall), len(RECALLS)))
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    for row, (reached, values) in enumerate(zip(recall, best, strict=True)):
        places = np.searchsorted(reached, RECALLS, side="left")
        inside = places < len(values)
        made[row, inside] = values[places[inside]]
    return made


def evaluate_coco(
    images: Sequence[ImageObjects], num_classes: int, *, by_size: bool = True, most: int = MOST
) -> Evaluation:
    """By hotcoco where it is installed and the overlaps are those of boxes, else in numpy.

    Args:
        by_size, most: As evaluate_numpy.
    """
    plainly = partial(evaluate_numpy, images, num_classes, by_size=by_size, most=most)
    if any(image.overlaps is not None for image in images):
        return plainly()
    try:
        import hotcoco
    except ImportError:
        return plainly()
    truth, found = to_coco(images, num_classes)
    if not truth["annotations"] or not len(found):
        return plainly()
    known = hotcoco.COCO(truth)
    judge = hotcoco.COCOeval(known, known.load_res(found), "bbox")
    judge.params.max_dets = [*FEW, most]
    if list(judge.params.max_dets) != [*FEW, most]:  # an older version, whose parameters are a copy
        return plainly()
    judge.evaluate()
    judge.accumulate()
    made = judge.eval
    assert made is not None
    return Evaluation(
        precision=np.asarray(made["precision"], np.float64), recall=np.asarray(made["recall"], np.float64)
    )


def to_coco(images: Sequence[ImageObjects], num_classes: int) -> tuple[dict[str, list[dict[str, object]]], Floats]:
    """The same in COCO's form: the annotations, and detections as rows of image, x, y, width, height, score, class; numbers from 1."""
    annotations: list[dict[str, object]] = []
    rows = [np.zeros((0, 7))]
    for number, image in enumerate(images, start=1):
        sizes = image.true_boxes[:, 2:] - image.true_boxes[:, :2]
        for k in range(len(image.true_boxes)):
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": int(image.true_classes[k]) + 1,
                "bbox": [*image.true_boxes[k, :2].tolist(), *sizes[k].tolist()], "area": float(image.areas[k]),
                "iscrowd": int(image.crowd[k]),
            })  # fmt: skip
        rows.append(np.column_stack([np.full(len(image.boxes), number), image.boxes[:, :2],
                                     image.boxes[:, 2:] - image.boxes[:, :2], image.scores, image.classes + 1]))  # fmt: skip
    truth = {"images": [{"id": n} for n in range(1, len(images) + 1)], "annotations": annotations,
             "categories": [{"id": c + 1, "name": str(c)} for c in range(num_classes)]}  # fmt: skip
    return truth, np.concatenate(rows)  # type: ignore[return-value]
