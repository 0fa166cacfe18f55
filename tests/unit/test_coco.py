"""Average precision: equal to pycocotools on random and awkward sets, by numpy and by hotcoco."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace

import numpy as np
import pytest

from goodfit.api.prepare import read_and_audit
from goodfit.config.parse import parse_request
from goodfit.core.journal import Journal
from goodfit.data.objects import MaskBook, objects_of
from goodfit.metrics.coco import ImageObjects, evaluate_coco, evaluate_numpy, to_coco
from goodfit.metrics.detection import (
    DetectionMeter,
    ap_interval,
    choose_threshold,
    confidence_curve,
    confusion_matrix,
)
from goodfit.outcome.detection_plots import _mistakes
from goodfit.runtime.masks import CutMask, as_rle, mask_overlaps


def image(found=(), there=(), *, crowd=()):
    """`found`: (box, score, class); `there`: (box, class)."""
    boxes = np.array([f[0] for f in found], np.float64).reshape(-1, 4)
    true = np.array([t[0] for t in there], np.float64).reshape(-1, 4)
    return ImageObjects(
        boxes=boxes, scores=np.array([f[1] for f in found], np.float64), classes=np.array([f[2] for f in found], np.int64),
        true_boxes=true, true_classes=np.array([t[1] for t in there], np.int64),
        crowd=np.array([k in crowd for k in range(len(there))], bool), areas=(true[:, 2:] - true[:, :2]).prod(axis=1),
    )  # fmt: skip


def random_images(seed, *, num=30, classes=4, scale=1.0, crowds=True):
    """Objects, detections near some of them, others anywhere, doubles, and equal scores."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(num):
        there = [(box(draw, scale), int(draw.integers(classes))) for _ in range(int(draw.integers(0, 12)))]
        found = []
        for true, kind in there:
            for _ in range(int(draw.integers(0, 3))):
                moved = np.array(true) + draw.normal(0, 0.08 * (true[2] - true[0]), 4)
                found.append((np.concatenate([np.minimum(moved[:2], moved[2:] - 1), moved[2:]]), round(float(draw.random()), 2),
                              kind if draw.random() < 0.8 else int(draw.integers(classes))))  # fmt: skip
        found += [
            (box(draw, scale), round(float(draw.random()), 2), int(draw.integers(classes)))
            for _ in range(int(draw.integers(0, 4)))
        ]
        made.append(image(found, there, crowd=[k for k in range(len(there)) if crowds and draw.random() < 0.1]))
    return made


def box(draw, scale):
    left, top = draw.uniform(0, 300, 2)
    wide, high = draw.uniform(4, 200, 2) * scale
    return np.array([left, top, left + wide, top + high])


def reference(images, num_classes):
    """pycocotools' precision, recall and twelve figures."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = to_coco(images, num_classes)
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = truth
        known.createIndex()
        judge = COCOeval(known, known.loadRes(found) if len(found) else COCO(), "bbox")
        if not len(found):
            judge.cocoDt.dataset = {**truth, "annotations": []}
            judge.cocoDt.createIndex()
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.eval["precision"], judge.eval["recall"], judge.stats


@pytest.mark.parametrize("how", [evaluate_numpy, evaluate_coco])
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pycocotools_on_random_sets(how, seed):
    images = random_images(seed, scale=(0.1, 0.5, 1.0, 3.0)[seed])
    precision, recall, stats = reference(images, 4)
    made = how(images, 4)
    assert np.abs(made.precision - precision).max() <= 1e-6
    assert np.abs(made.recall - recall).max() <= 1e-6
    assert np.abs(np.array(list(made.summary().values())) - stats).max() <= 1e-6


BOX = np.array([10.0, 10.0, 60.0, 60.0])
AWKWARD = {
    "no predictions": [image((), [(BOX, 0)])],
    "no labels": [image([(BOX, 0.9, 0)], ()), image((), [(BOX, 1)])],
    "nothing at all but one label": [image(), image((), [(BOX, 1)])],
    "an empty class": [image([(BOX, 0.9, 2)], [(BOX, 0)])],
    "only a crowd": [image([(BOX, 0.9, 0)], [(BOX, 0)], crowd=[0]), image([(BOX, 0.8, 1)], [(BOX, 1)])],
    "in a crowd": [image([(BOX, 0.9, 0), (BOX + 1, 0.8, 0), (BOX + 200, 0.7, 0)], [(BOX - np.array([10, 10, -90, -90]), 0), (BOX, 0)], crowd=[0])],
    "doubles": [image([(BOX, 0.9, 0), (BOX, 0.9, 0), (BOX, 0.3, 0)], [(BOX, 0), (BOX + 5, 0)])],
    "equal overlaps": [image([(BOX, 0.9, 0)], [(BOX + np.array([5, 0, 5, 0]), 0), (BOX - np.array([5, 0, 5, 0]), 0)])],
    "more than a hundred": [image([(BOX + k, 1 - k / 500, 0) for k in range(150)], [(BOX + 140, 0), (BOX, 0)])],
}  # fmt: skip


@pytest.mark.parametrize("how", [evaluate_numpy, evaluate_coco])
@pytest.mark.parametrize("name", AWKWARD)
def test_equal_to_pycocotools_on_awkward_sets(how, name):
    images = AWKWARD[name]
    precision, recall, stats = reference(images, 3)
    made = how(images, 3)
    assert np.abs(made.precision - precision).max() <= 1e-6
    assert np.abs(made.recall - recall).max() <= 1e-6
    assert np.abs(np.array(list(made.summary().values())) - stats).max() <= 1e-6


@pytest.mark.data
@pytest.mark.parametrize(
    "folder",
    [
        "detect/bccd_voc",
        "detect/facemask_coco",
        "segment/coco128/object_detection",
        "segment/coco128/instance_segmentation",
        "segment/nuclei_dsb2018",
    ],
)
def test_equal_to_pycocotools_on_every_real_dataset(real_data, folder):
    """Its own objects, each found once to twice and somewhat off; boxes, and masks where it has some."""
    index = read_and_audit(
        parse_request({"data": str(real_data / folder), "max_bad": 0.5, "suspects": False}), Journal(None)
    ).index
    draw, images, masks = np.random.default_rng(0), [], []
    book, num = MaskBook(index), len(index.class_names)
    for row in np.flatnonzero(index.splits >= 0).tolist():
        there = objects_of(index, row)
        chosen = draw.integers(0, max(1, len(there.boxes)), min(90, 2 * len(there.boxes)))
        sides = np.tile(there.boxes[:, 2:] - there.boxes[:, :2], 2)[chosen]
        boxes = there.boxes[chosen].astype(float) + draw.normal(0, 0.08, (len(chosen), 4)) * sides
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        classes = np.where(draw.random(len(chosen)) < 0.9, there.classes[chosen], draw.integers(0, num, len(chosen)))
        one = ImageObjects(boxes=boxes, scores=draw.random(len(chosen)).round(3), classes=classes, true_boxes=there.boxes.astype(float),
                           true_classes=there.classes, crowd=there.crowd,
                           areas=(there.boxes[:, 2:] - there.boxes[:, :2]).astype(float).prod(axis=1))  # fmt: skip
        images.append(one)
        if index.task == "segment" and len(masks) < 80:
            own = [book.get(row, int(k)) for k in there.numbers]
            moved = [CutMask(own[k].left + int(draw.integers(-2, 3)), own[k].top, own[k].pixels) for k in chosen]
            masks.append((one, own, moved, tuple(int(v) for v in index.sizes[row])))
    precision, recall, stats = reference(images, num)
    made = evaluate_coco(images, num)
    assert np.abs(made.precision - precision).max() <= 1e-6 and np.abs(made.recall - recall).max() <= 1e-6
    assert np.abs(np.array(list(made.summary().values())) - stats).max() <= 1e-6 and 0.05 < stats[0] < 0.95
    if masks:
        _check_masks(masks, num)


def _check_masks(masks, num):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def run(mask, size):  # at the same place in the picture; what is moved beyond its edge is cut off
        wide, high = size[0] + 8, size[1] + 8
        shifted = CutMask(mask.left + 4, mask.top + 4, mask.pixels)
        return as_rle(shifted, (wide, high))

    images, annotations, results = [], [], []
    for number, (one, own, moved, size) in enumerate(masks):
        images.append(replace(one, overlaps=mask_overlaps(moved, own, one.crowd), areas=np.array([float(m.area) for m in own]),
                              own_areas=np.array([float(m.area) for m in moved])))  # fmt: skip
        annotations += [{"id": len(annotations) + 1 + k, "image_id": number + 1, "category_id": int(one.true_classes[k]) + 1,
                         "iscrowd": int(one.crowd[k]), "area": m.area, "bbox": [0, 0, 1, 1], "segmentation": run(m, size)}
                        for k, m in enumerate(own)]  # fmt: skip
        results += [{"image_id": number + 1, "category_id": int(one.classes[k]) + 1, "score": float(one.scores[k]),
                     "segmentation": run(m, size)} for k, m in enumerate(moved)]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {"images": [{"id": n + 1, "width": m[3][0] + 8, "height": m[3][1] + 8} for n, m in enumerate(masks)],
                         "annotations": annotations, "categories": [{"id": k + 1, "name": str(k)} for k in range(num)]}  # fmt: skip
        known.createIndex()
        judge = COCOeval(known, known.loadRes(results), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    made = np.array(list(evaluate_coco(images, num).summary().values()))
    assert np.abs(made - judge.stats).max() <= 1e-6 and 0.05 < made[0] < 0.99


def test_a_set_without_an_object_has_no_figure():
    assert evaluate_numpy([image([(BOX, 0.9, 0)])], 2).summary()["ap"] == -1
    assert evaluate_coco([image([(BOX, 0.9, 0)])], 2).summary()["ap"] == -1


def test_meters_of_several_processes_merge_into_one():
    whole, parts = DetectionMeter(4), [DetectionMeter(4), DetectionMeter(4)]
    images = random_images(7)
    whole.images = images
    parts[0].images, parts[1].images = images[:11], images[11:]
    whole._terms, parts[0]._terms, parts[1]._terms = {"a": [6.0, 4.0]}, {"a": [2.0, 1.0]}, {"a": [4.0, 3.0]}
    parts[0].merge([p.state() for p in parts])
    assert parts[0].compute() == whole.compute()
    assert whole.compute()["loss"] == 1.5


def test_the_threshold_is_where_f1_is_best():
    right = [image([(BOX, 0.8, 0), (BOX + 200, 0.4, 0)], [(BOX, 0)]) for _ in range(5)]
    threshold, f1 = choose_threshold(right, 1)
    assert 0.4 < threshold <= 0.8 and f1 == 1.0
    curve = confidence_curve(right, 0)
    assert curve is not None
    assert curve["precision"][29] == 0.5 and curve["precision"][59] == 1.0 and curve["recall"][85] == 0.0
    assert confidence_curve(right, 1) is None
    assert choose_threshold([image()], 1) == (0.5, 0.0)


def test_confusion_counts_background_and_leaves_crowds_aside():
    images = [image([(BOX, 0.9, 1), (BOX + 200, 0.9, 0), (BOX + 400, 0.9, 0), (BOX, 0.1, 0)],
                    [(BOX, 0), (BOX + 100, 1), (BOX + 400, 1)], crowd=[2])]  # fmt: skip
    assert confusion_matrix(images, 2, 0.5).tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]


def test_what_lies_in_a_large_crowd_is_no_false_alarm():
    crowd = np.array([0.0, 0.0, 400.0, 400.0])
    inside, beside = np.array([30.0, 30.0, 60.0, 90.0]), np.array([500.0, 30.0, 560.0, 90.0])
    one = image([(inside, 0.9, 0), (beside, 0.8, 0)], [(crowd, 0)], crowd=[0])
    assert confusion_matrix([one], 1, 0.5).tolist() == [[0, 0], [1, 0]]
    assert _mistakes(one, 0.5) == ([], [1])


def test_the_usual_figures_alone_are_the_same():
    images = random_images(5)
    whole, part = evaluate_numpy(images, 4).summary(), evaluate_numpy(images, 4, by_size=False).summary()
    assert all(part[k] == whole[k] for k in ("ap", "ap50", "ap75", "ar_100")) and part["ap_small"] == -1


def test_intervals_do_not_hang_on_how_many_draws_are_made_at_once(monkeypatch):
    images = random_images(6, num=40)
    whole = [ap_interval(images, 4, iou) for iou in (0.5, None)]
    monkeypatch.setattr("goodfit.metrics.detection.RESAMPLED_VALUES", 900)
    assert [ap_interval(images, 4, iou) for iou in (0.5, None)] == whole


def test_the_interval_holds_the_figure_and_narrows_with_more_images():
    few, many = random_images(3, num=20, crowds=False), random_images(3, num=200, crowds=False)
    for images in (few, many):
        low, high = ap_interval(images, 4, 0.5)
        assert low < evaluate_numpy(images, 4).summary()["ap50"] < high
    wide, narrow = (np.subtract(*ap_interval(i, 4, 0.5)[::-1]) for i in (few, many))
    assert narrow < 0.5 * wide
    low, high = ap_interval(few, 4, None)
    assert low < evaluate_numpy(few, 4).summary()["ap"] < high
    assert ap_interval([image()], 1, 0.5) == (0.0, 0.0)


def test_curves_count_all_that_is_reported_and_ap_the_best_hundred():
    """Two hundred objects in a picture, all found: recall is one half by COCO's count, one by what is reported."""
    boxes = [(BOX + 100.0 * k, 0) for k in range(200)]
    full = image([(box, 0.9 - k / 1000, 0) for k, (box, _) in enumerate(boxes)], boxes)
    curve = confidence_curve([full], 0)
    assert curve is not None and curve["recall"][49] == 1.0
    assert (
        evaluate_numpy([full], 1).summary()["ar_100"]
        == evaluate_coco([full], 1).summary()["ar_100"]
        == pytest.approx(0.5)
    )
    for judge in (evaluate_numpy, evaluate_coco):
        assert judge([full], 1, most=300).summary()["ap"] == pytest.approx(1.0)
