"""Seconds of COCO's average precision on a real dataset: goodfit (by hotcoco, and in numpy) beside pycocotools, and that all agree.

    python benchmarks/ap_speed.py FOLDER [--rounds 5] [--most 100]

Detections are made from the annotations: each object found twice, somewhat off, with random scores, and false alarms up to `--most`
an image. One process, the three in turn, medians; the form that each needs is part of its time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from goodfit.api.prepare import read_and_audit
from goodfit.config.parse import parse_request
from goodfit.core.journal import Journal
from goodfit.data.objects import objects_of
from goodfit.metrics.coco import ImageObjects, evaluate_coco, evaluate_numpy, to_coco


def made_up(folder: Path, most: int) -> tuple[list[ImageObjects], int]:
    """The images of a dataset with detections."""
    index = read_and_audit(parse_request({"data": str(folder), "max_bad": 0.5}), Journal(None)).index
    assert index.sizes is not None
    draw, images = np.random.default_rng(0), []
    for row in np.flatnonzero(index.splits >= 0).tolist():
        there, size = objects_of(index, row), index.sizes[row].astype(float)
        sides = there.boxes[:, 2:] - there.boxes[:, :2]
        near = np.concatenate(
            [there.boxes + draw.normal(0, s, there.boxes.shape) * np.tile(sides, 2) for s in (0.05, 0.15)]
        )
        extra = max(0, most - len(near))
        low = draw.random((extra, 2)) * size * 0.8
        boxes = np.concatenate([near, np.concatenate([low, low + draw.random((extra, 2)) * size * 0.2], axis=1)])[:most]
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        kinds = np.concatenate([there.classes, there.classes, draw.integers(0, len(index.class_names), extra)])[:most]
        images.append(ImageObjects(boxes=boxes, scores=draw.random(len(boxes)), classes=kinds, true_boxes=there.boxes, true_classes=there.classes,
                                   crowd=there.crowd, areas=sides.prod(axis=1)))  # fmt: skip
    return images, len(index.class_names)


def pycocotools(images: list[ImageObjects], num_classes: int) -> dict[str, float]:
    """The twelve figures by the reference."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = to_coco(images, num_classes)
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = truth
        known.createIndex()
        judge = COCOeval(known, known.loadRes(found), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {str(k): float(v) for k, v in enumerate(judge.stats)}


def main() -> None:
    """Print a line per way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=int, default=100)
    asked = parser.parse_args()
    images, num = made_up(asked.folder, asked.most)
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "goodfit": lambda: evaluate_coco(images, num).summary(),
        "goodfit in numpy": lambda: evaluate_numpy(images, num).summary(),
        "pycocotools": lambda: pycocotools(images, num),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    figures: dict[str, list[float]] = {}
    for _ in range(asked.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            figures[name] = list(way().values())
            seconds[name].append(time.perf_counter() - start)
    print(
        f"{len(images)} images, {sum(len(i.true_boxes) for i in images):,} objects, {sum(len(i.boxes) for i in images):,} detections"
    )
    for name in ways:
        apart = np.abs(np.array(figures[name]) - np.array(figures["pycocotools"])).max()
        print(f"{name:<17} {statistics.median(seconds[name]):7.3f} s (median of {asked.rounds}), AP {figures[name][0]:.4f}, "
              f"at most {apart:.1e} from pycocotools")  # fmt: skip


if __name__ == "__main__":
    main()
