"""Masks that are cut out, pasted, compared and written as COCO's run lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from goodfit.data.columns import POLYGONS
from goodfit.data.masks import draw_mask, outline_mask, pack_polygons
from goodfit.data.scenes import Paste
from goodfit.metrics.coco import ImageObjects, evaluate_numpy
from goodfit.metrics.detection import DetectionMeter
from goodfit.runtime.masks import CutMask, as_rle, cut_mask, mask_overlaps, paste_mask

SIZE = (60, 40)


def blob(draw, size=SIZE, density=0.8):
    made = np.zeros((size[1], size[0]), bool)
    x, y = draw.integers(0, size[0] - 8), draw.integers(0, size[1] - 8)
    w, h = draw.integers(3, 30), draw.integers(3, 20)
    made[y : y + h, x : x + w] = draw.random((min(h, size[1] - y), min(w, size[0] - x))) < density
    return made


def test_a_cut_mask_is_the_mask():
    draw = np.random.default_rng(0)
    for _ in range(20):
        mask = blob(draw)
        cut = cut_mask(mask)
        assert np.array_equal(cut.whole(SIZE), mask) and cut.area == mask.sum()
        x, y = draw.integers(-5, 70, 9), draw.integers(-5, 50, 7)
        inside = ((y >= 0) & (y < 40))[:, None] & ((x >= 0) & (x < 60))[None]
        assert np.array_equal(cut.at(x, y), inside & mask[y.clip(0, 39)[:, None], x.clip(0, 59)[None]])
        drawn = np.zeros((25, 40), np.uint8)
        for columns in (np.arange(3, 43), np.arange(43, 3, -1)):  # mirrored too
            before = drawn.copy()
            cut.draw(columns, np.arange(2, 27), drawn)
            assert np.array_equal(drawn, before | cut.at(columns, np.arange(2, 27)))
    assert cut_mask(np.zeros((4, 4), bool)).area == 0


def test_an_outline_drawn_again_is_the_mask():
    """Pieces that lie apart, holes, single pixels and corners that touch: one polygon for each object."""
    draw = np.random.default_rng(3)
    masks = [blob(draw, density=d) | blob(draw, density=d) for d in (0.3, 0.6, 0.9, 1.0) for _ in range(5)]
    ring = np.zeros((40, 60), bool)
    ring[5:30, 5:40], ring[10:20, 10:20] = True, False
    for mask in [*masks, ring, np.ones((40, 60), bool), np.eye(40, 60, dtype=bool)]:
        points = outline_mask(cut_mask(mask))
        again = draw_mask(POLYGONS, pack_polygons([points / SIZE]), size=SIZE, scale=SIZE)
        assert np.array_equal(again, mask)
    assert len(outline_mask(cut_mask(np.ones((40, 60), bool)))) < 12
    assert outline_mask(cut_mask(np.zeros((4, 4), bool))).shape == (0, 2)


def test_overlaps_and_run_lengths_equal_pycocotools():
    from pycocotools import mask as library

    draw = np.random.default_rng(1)
    found, there = [blob(draw) for _ in range(9)], [blob(draw) for _ in range(7)]
    crowd = draw.random(7) < 0.4
    encoded = [[library.encode(np.asfortranarray(m.astype(np.uint8))) for m in group] for group in (found, there)]
    wanted = library.iou(encoded[0], encoded[1], crowd.astype(np.uint8).tolist())
    made = mask_overlaps([cut_mask(m) for m in found], [cut_mask(m) for m in there], crowd)
    assert np.abs(made - wanted).max() < 1e-12 and made.max() > 0.1
    for mask, rle in zip(found, encoded[0], strict=True):
        assert as_rle(cut_mask(mask), SIZE) == {"size": [40, 60], "counts": rle["counts"].decode()}


def test_average_precision_of_masks_equals_pycocotools():
    import contextlib
    import io

    from pycocotools import mask as library
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    draw = np.random.default_rng(2)
    images, annotations, results = [], [], []
    for number in range(12):
        there = [blob(draw, (160, 120), 1.0) for _ in range(5)]
        found = [np.roll(m, draw.integers(-1, 2, 2), (0, 1)) for m in there] + [blob(draw, (160, 120))]
        scores, kinds, mine = draw.random(len(found)).round(2), np.arange(len(found)) % 2, np.arange(5) % 2
        crowd = draw.random(5) < 0.15
        cut = [[cut_mask(m) for m in group] for group in (found, there)]
        images.append(ImageObjects(
            boxes=np.zeros((len(found), 4)), scores=scores, classes=kinds, true_boxes=np.zeros((5, 4)), true_classes=mine,
            crowd=crowd, areas=np.array([m.area for m in cut[1]], float), overlaps=mask_overlaps(cut[0], cut[1], crowd),
            own_areas=np.array([m.area for m in cut[0]], float),
        ))  # fmt: skip
        for k, mask in enumerate(there):
            annotations.append({"id": len(annotations) + 1, "image_id": number + 1, "category_id": int(mine[k]) + 1, "iscrowd": int(crowd[k]),
                                "area": int(mask.sum()), "bbox": [0, 0, 1, 1],
                                "segmentation": library.encode(np.asfortranarray(mask.astype(np.uint8)))})  # fmt: skip
        results += [{"image_id": number + 1, "category_id": int(c) + 1, "score": float(s),
                     "segmentation": library.encode(np.asfortranarray(m.astype(np.uint8)))} for m, s, c in zip(found, scores, kinds, strict=True)]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {"images": [{"id": n + 1, "width": 160, "height": 120} for n in range(12)], "annotations": annotations,
                         "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}  # fmt: skip
        known.createIndex()
        judge = COCOeval(known, known.loadRes(results), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    made = list(evaluate_numpy(images, 2).summary().values())
    assert np.abs(np.array(made) - judge.stats).max() <= 1e-6 and made[0] > 0.1


def test_a_pasted_mask_fills_its_box_as_its_cells_say():
    whole = paste_mask(np.ones((28, 28)), (10.0, 8.0, 34.0, 30.0), SIZE)
    assert abs(whole.area - 24 * 22) <= 2 * (24 + 22)  # the outermost half cell fades out
    half = np.zeros((28, 28))
    half[:, :14] = 1.0
    left = paste_mask(half, (10.0, 8.0, 38.0, 36.0), SIZE).whole(SIZE)
    assert left[20, 12] and not left[20, 30] and abs(int(left[20].sum()) - 14) <= 1
    over = paste_mask(np.ones((28, 28)), (-20.0, -20.0, 20.0, 20.0), SIZE)
    assert (over.left, over.top) == (0, 0) and over.pixels.shape == (20, 20)
    for box in ((5.0, 5.0, 5.0, 9.0), (70.0, 5.0, 90.0, 9.0)):
        assert paste_mask(np.ones((28, 28)), box, SIZE).area == 0


@pytest.mark.parametrize("mirrored", [False, True])
def test_masks_go_where_pixels_go(mirrored):
    picture = np.zeros((60, 80), bool)
    picture[10:50, 20:40] = True
    out = np.zeros((60, 80), np.uint8)
    Paste(0, (0, 0, 80, 60), (0, 0, 80, 60), mirrored).mask(cut_mask(picture), np.ones(2), out)
    assert np.array_equal(out.astype(bool), picture[:, ::-1] if mirrored else picture)
    smaller = np.zeros((30, 40), np.uint8)
    Paste(0, (0, 0, 40, 30), (0, 0, 40, 30), mirrored).mask(cut_mask(picture), np.array([0.5, 0.5]), smaller)
    assert np.array_equal(
        smaller.astype(bool), (picture[:, ::-1] if mirrored else picture)[1::2, (0 if mirrored else 1) :: 2]
    )
    assert (
        Paste(0, (0, 0, 8, 6), (2, 1, 4, 3), mirrored).mask(CutMask(0, 0, np.zeros((0, 0), bool)), np.ones(2), smaller)
        is None
    )


def test_a_mask_whose_box_reaches_into_the_bars_is_not_squeezed():
    """A picture of 100 × 50 pixels in the middle of 100 × 100; an object at its upper edge, whose box begins ten pixels above it."""
    probabilities = np.zeros((30, 30))
    probabilities[10:] = 1.0  # the bar is no object
    outputs = {"boxes": torch.tensor([[[20.0, 15.0, 50.0, 45.0]]]), "scores": torch.tensor([[0.9]]), "classes": torch.tensor([[0]]), "terms": {},
               "masks": torch.tensor(probabilities)[None, None]}  # fmt: skip
    true = np.zeros((50, 100), bool)
    true[:20, 20:50] = True
    meter = DetectionMeter(1, masks=True, keep=True)
    meter.update(outputs, {
        "place": torch.tensor([[1.0, 1.0, 0.0, 25.0]]), "size": torch.tensor([[100.0, 50.0]]), "true_boxes": torch.tensor([[[20.0, 0.0, 50.0, 20.0]]]),
        "true_classes": torch.tensor([[0]]), "crowd": torch.tensor([[False]]), "true_masks": [[cut_mask(true)]]})  # fmt: skip
    assert meter.images[0].boxes.tolist() == [[20.0, 0.0, 50.0, 20.0]]
    assert float(meter.masked[0].overlaps[0, 0]) > 0.9
    squeezed = paste_mask(probabilities, (20.0, 0.0, 50.0, 20.0), (100, 50))
    assert mask_overlaps([squeezed], [cut_mask(true)], np.array([False]))[0, 0] < 0.7
