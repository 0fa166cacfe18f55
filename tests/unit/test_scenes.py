"""Pictures with objects: boxes go where pixels go, all is a function of its key, and the way into the input and back agrees."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from goodfit.api.decide import decide
from goodfit.api.demo import write_scenes
from goodfit.api.detect_parts import assemble_detector
from goodfit.api.prepare import read_and_audit
from goodfit.config.parse import parse_request
from goodfit.core.errors import DataError
from goodfit.core.journal import Journal
from goodfit.data.copy_paste import Drawn, around, chosen, partner_of, paste_objects
from goodfit.data.objects import padded
from goodfit.data.scenes import SCENE_PRESETS, Paste, ScenePreset, compose, cut_boxes, draw_scene
from goodfit.runtime.images import ImageError
from goodfit.runtime.letterbox import FILL, Letterbox

LETTERBOX = Letterbox(width=128, height=96, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


def picture(size=(160, 120), box=(40, 30, 100, 90)):
    """Black, with a white box."""
    made = np.zeros((size[1], size[0], 3), np.uint8)
    made[box[1] : box[3], box[0] : box[2]] = 255
    return made


def white_box(pixels):
    """Around what is nearly white. pixels: (height, width, 3)."""
    white = (pixels > 200).all(axis=2)
    rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)


@pytest.mark.parametrize("preset", [ScenePreset(), ScenePreset(zoom=0.2)])
@pytest.mark.parametrize("sample", range(12))
def test_boxes_go_where_pixels_go(preset, sample):
    pastes = compose(preset, seed=0, epoch=1, sample=sample, row=0, rows=np.array([0]), sizes=np.array([[160, 120]]),
                     shape=(96, 128), flip=0.5)  # fmt: skip
    out = np.empty((96, 128, 3), np.uint8)
    draw_scene(pastes, [picture()], out)
    (paste,) = pastes
    cut, seen = cut_boxes(paste.boxes(np.array([[40.0, 30.0, 100.0, 90.0]]), np.ones(2)), paste.target)
    assert seen.all()
    assert np.abs(cut[0] - white_box(out)).max() <= 1.01


def test_a_mosaic_holds_four_pictures_and_their_boxes():
    preset = ScenePreset(mosaic=1.0, zoom=0.1)
    sizes = np.array([[160, 120]] * 5)
    seen_rows = set()
    for sample in range(10):
        pastes = compose(
            preset, seed=3, epoch=0, sample=sample, row=4, rows=np.arange(4), sizes=sizes, shape=(96, 128), flip=0.5
        )
        assert len(pastes) == 4 and sum(p.row == 4 for p in pastes) == 1
        seen_rows |= {p.row for p in pastes}
        for number, paste in enumerate(pastes):
            out = np.empty((96, 128, 3), np.uint8)
            draw_scene(pastes, [picture() if k == number else np.zeros((120, 160, 3), np.uint8) for k in range(4)], out)
            cut, seen = cut_boxes(paste.boxes(np.array([[40.0, 30.0, 100.0, 90.0]]), np.ones(2)), paste.target)
            if seen.all() and (out > 200).any():
                assert np.abs(cut[0] - white_box(out)).max() <= 2.0
    assert len(seen_rows) > 3


def test_objects_of_a_mosaic_are_as_large_as_they_are_served():
    """160 × 120 pixels are served at 0.8; a mosaic's tiles would shrink them to 0.4 and less."""
    scales = []
    for sample in range(200):
        pastes = compose(ScenePreset(mosaic=1.0, zoom=0.3), seed=3, epoch=0, sample=sample, row=0, rows=np.arange(4), sizes=np.array([[160, 120]] * 4),
                         shape=(96, 128), flip=0.5)  # fmt: skip
        scales += [float(p.scale(np.ones(2))[0]) for p in pastes if p.source[2] - p.source[0] > 20]
        assert sum((p.target[2] - p.target[0]) * (p.target[3] - p.target[1]) for p in pastes) == 96 * 128, (
            "tiles are filled"
        )
    assert 0.75 < np.mean(scales) < 0.9 and min(scales) > 0.5


def test_a_scene_is_a_function_of_its_key():
    def made(**other):
        key = {"seed": 0, "epoch": 0, "sample": 5, **other}
        return compose(replace(SCENE_PRESETS["strong"], mosaic=1.0), row=0, rows=np.arange(3), sizes=np.array([[50, 40]] * 3), shape=(64, 64),
                       flip=0.5, **key)  # fmt: skip

    assert made() == made()
    assert made() != made(seed=1) and made() != made(epoch=1) and made() != made(sample=6)


def test_what_is_left_of_a_mask_is_an_object_with_a_box_of_its_own(tmp_path):
    """A long diagonal object, cut by zooms: its box is that of its pixels, and a corner of the box without one is no object."""
    root = tmp_path / "set"
    root.mkdir()
    ring = [2, 2, 14, 2, 158, 110, 158, 118, 146, 118, 2, 10]
    names = [f"{n}.png" for n in range(12)]
    for number, name in enumerate(names):
        noise = np.random.default_rng(number).integers(0, 255, (120, 160, 3)).astype(np.uint8)
        Image.fromarray(noise).save(root / name)
    (root / "a.json").write_text(json.dumps({
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)], "categories": [{"id": 1, "name": "bar"}],
        "annotations": [{"id": n + 1, "image_id": n, "category_id": 1, "bbox": [2, 2, 156, 116], "segmentation": [ring]} for n in range(12)]}))  # fmt: skip
    request = parse_request(
        {
            "data": str(root),
            "suspects": False,
            "measure": False,
            "augment": "strong",
            "copy_paste": 0,
            "imgsz": 160,
            "batch": 4,
        }
    )
    journal = Journal(None)
    audited = read_and_audit(request, journal)
    parts = assemble_detector(decide(request, audited, journal), audited.index)
    tight = loose = 0
    for epoch in range(12):
        for group in parts.train.groups(epoch, 0, 1, closing=False):
            data = group[0].data
            for boxes, classes, masks in zip(data["boxes"], data["classes"], data["masks"], strict=True):
                assert int((classes >= 0).sum()) == len(masks)
                for box, mask in zip(boxes[classes >= 0], masks, strict=True):
                    assert mask.any(), "an object without a pixel is no object"
                    apart = np.abs(around(mask.numpy()) - box.numpy()).max()
                    tight, loose = tight + (apart <= 1.5), loose + (apart > 1.5)
    assert tight > 50 and loose == 0


def test_kept_pictures_may_be_smaller_than_the_annotated_ones():
    paste = Paste(0, (0, 0, 80, 60), (0, 0, 128, 96), mirrored=False)
    assert paste.boxes(np.array([[40.0, 30.0, 100.0, 90.0]]), np.array([0.5, 0.5]))[0].tolist() == [
        32.0,
        24.0,
        80.0,
        72.0,
    ]


def test_what_is_hardly_seen_is_no_object():
    boxes = np.array(
        [[0.0, 0.0, 100.0, 10.0], [90.0, 0.0, 190.0, 10.0], [10.0, 10.0, 11.0, 30.0], [200.0, 0.0, 210.0, 10.0]]
    )
    cut, seen = cut_boxes(boxes, (0, 0, 100, 100))
    assert seen.tolist() == [True, False, False, False]
    assert cut[1].tolist() == [90.0, 0.0, 100.0, 10.0]
    assert cut_boxes(np.zeros((0, 4)), (0, 0, 10, 10))[1].shape == (0,)


def test_closing_leaves_no_mosaic():
    assert SCENE_PRESETS["strong"].closing().mosaic == 0.0


def test_arrays_of_unequal_length_are_filled_up():
    made = padded([np.ones((2, 4)), np.zeros((0, 4))], -1, np.float32, width=(4,))
    assert made.shape == (2, 2, 4) and made[1].min() == -1
    assert padded([], 0.0, np.float32, width=(4,)).shape == (0, 0, 4)


@pytest.mark.parametrize("size", [(160, 120), (120, 160), (64, 48), (1000, 10), (7, 900), (128, 96)])
def test_the_letterbox_keeps_everything_and_knows_the_way_back(size):
    place = LETTERBOX.place(size)
    assert place.width <= 128 and place.height <= 96 and (place.width == 128 or place.height == 96)
    boxes = np.array([[0.0, 0.0, size[0], size[1]], [size[0] / 4, size[1] / 4, size[0] / 2, size[1]]])
    inside = place.boxes_in(boxes)
    assert inside.min() >= 0 and inside[:, [0, 2]].max() <= 128 and inside[:, [1, 3]].max() <= 96
    assert np.abs(place.boxes_out(inside) - boxes).max() < 1e-9


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_letterbox_reads_upright_pictures_of_any_kind(kind):
    image = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    image.save(turned, kind, exif=exif if kind == "TIFF" else exif.tobytes(), quality=95)
    pixels, size = LETTERBOX.read(turned.getvalue())
    assert size == (120, 160) and pixels.shape == (3, 96, 128) and pixels.dtype == np.uint8
    assert (pixels[:, :, 0] == FILL).all()
    place = LETTERBOX.place(size)
    found = place.boxes_out(white_box(pixels.transpose(1, 2, 0))[None])[0]
    assert np.abs(found - [30, 40, 90, 100]).max() < 3.0  # turned clockwise by a quarter


def test_a_large_photo_may_be_decoded_smaller_without_moving_its_boxes():
    large = Image.fromarray(picture((1607, 1203), (400, 300, 1000, 900)))
    data = io.BytesIO()
    large.save(data, "JPEG", quality=95)
    pixels, size = LETTERBOX.read(data.getvalue())
    found = LETTERBOX.place(size).boxes_out(white_box(pixels.transpose(1, 2, 0))[None])[0]
    assert size == (1607, 1203) and np.abs(found - [400, 300, 1000, 900]).max() < 13  # an input pixel


def test_the_letterbox_at_other_sizes_and_as_plain_values():
    assert LETTERBOX.at(256, 32).shape == (192, 256)
    assert Letterbox.from_dict(LETTERBOX.to_dict()) == LETTERBOX
    for broken in (
        {},
        {**LETTERBOX.to_dict(), "fit": "crop"},
        {**LETTERBOX.to_dict(), "width": 0},
        {**LETTERBOX.to_dict(), "std": [0, 1, 1]},
    ):
        with pytest.raises(DataError):
            Letterbox.from_dict(broken)


def _drawn(*masks, classes=None):
    masks = np.array(masks, np.uint8)
    return Drawn(
        np.array([around(m) for m in masks]).reshape(-1, 4),
        np.arange(len(masks)) if classes is None else np.array(classes),
        masks,
    )


def _block(left, top, right, bottom, side=40):
    made = np.zeros((side, side), np.uint8)
    made[top:bottom, left:right] = 1
    return made


def test_pasted_objects_cover_what_lies_under_them():
    pixels, other = np.zeros((40, 40, 3), np.uint8), np.full((40, 40, 3), 200, np.uint8)
    under = _drawn(_block(0, 0, 10, 10), _block(20, 0, 30, 10), _block(0, 20, 10, 30))
    over = _drawn(_block(20, 0, 29, 10), _block(5, 20, 10, 30), classes=[7, 8])
    made = paste_objects(pixels, under, other, over)
    assert made.classes.tolist() == [0, 2, 7, 8]  # of the second a tenth is left: it is none
    assert made.boxes[1].tolist() == [0, 20, 5, 30] and made.boxes[0].tolist() == [0, 0, 10, 10]
    assert np.array_equal((pixels == 200).all(axis=2), over.masks.any(axis=0))
    assert not (made.masks.sum(axis=0) > 1).any()
    for mask, box in zip(made.masks, made.boxes, strict=True):
        assert np.array_equal(around(mask), box)
    nothing = Drawn(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros((0, 40, 40), np.uint8))
    onto = paste_objects(pixels, nothing, other, over)  # a picture without an object to be seen
    assert onto.classes.tolist() == [7, 8] and np.array_equal(onto.masks, over.masks)
    assert paste_objects(pixels, under, other, nothing) is under


def test_copies_are_a_function_of_their_key():
    rows = np.arange(10, 20)
    drawn = [partner_of(0.5, seed=0, epoch=1, sample=k, rows=rows) for k in range(400)]
    again = [partner_of(0.5, seed=0, epoch=1, sample=k, rows=rows) for k in range(400)]
    assert drawn == again and drawn != [partner_of(0.5, seed=0, epoch=2, sample=k, rows=rows) for k in range(400)]
    taken = [d for d in drawn if d is not None]
    assert 150 < len(taken) < 250 and set(taken) == set(rows.tolist())
    assert 0.4 < np.mean([chosen(6, seed=0, epoch=0, sample=k).mean() for k in range(200)]) < 0.6


def test_a_segmenter_sees_pasted_objects_with_their_masks(tmp_path):
    write_scenes(tmp_path / "scenes", masks=True, num=30)
    request = parse_request({"data": str(tmp_path / "scenes"), "copy_paste": 1.0, "model": "maskrcnn/resnet10t", "pretrained": "false",
                             "measure": False, "batch": 8})  # fmt: skip
    audited = read_and_audit(request, Journal(None))
    plan = decide(request, audited, Journal(None))
    assert plan.copy_paste.value == 1.0
    more = assemble_detector(plan, audited.index).train.group(0, 0, 1)[0]
    again = assemble_detector(plan, audited.index).train.group(0, 0, 1)[0]
    assert all(bool((more.data[k] == again.data[k]).all()) for k in ("image", "boxes", "classes"))
    assert all(map(torch.equal, more.data["masks"], again.data["masks"]))
    plain = assemble_detector(plan.changed(copy_paste=0.0), audited.index).train.group(0, 0, 1)[0]
    assert int((more.data["classes"] >= 0).sum()) > int((plain.data["classes"] >= 0).sum())
    there = more.data["classes"] >= 0
    assert [len(m) for m in more.data["masks"]] == there.sum(1).tolist()
    masks = torch.cat(more.data["masks"])
    assert bool((masks.flatten(1).sum(1) > 0).all())
    assert not any(bool((m.sum(0) > 1).any()) for m in more.data["masks"])  # digits do not touch
    boxes = more.data["boxes"][there]
    found = np.array([around(m.numpy()) for m in masks])
    assert np.abs(found - boxes.numpy()).max() <= 3.0


def test_a_damaged_tiff_is_no_picture():
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 160, 3)).astype(np.uint8)).save(
        data, "TIFF", compression="tiff_lzw"
    )
    with pytest.raises(ImageError):
        LETTERBOX.read(data.getvalue()[: len(data.getvalue()) // 2] + bytes(2000))
