"""What goes wrong with annotations in practice: names that several folders have, sizes that differ, nothing left to learn."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from annotated import coco, picture, sized, split_counts, voc, yolo
from goodfit.api.prepare import read_and_audit
from goodfit.config.parse import parse_request
from goodfit.core.errors import DataError
from goodfit.core.journal import Journal
from goodfit.data.checks.audit_objects import audit_objects
from goodfit.data.columns import POLYGONS, RLE
from goodfit.data.formats import read_coco, read_masks, read_voc, read_yolo
from goodfit.data.masks import cut_polygons, draw_mask, pack_mask, pack_polygons, pack_rle, unpack_rle
from goodfit.data.objects import MaskBook, objects_of
from goodfit.data.reading import How
from goodfit.metrics.detection import DetectionMeter
from goodfit.runtime.masks import as_rle, cut_mask
from pictures import draw

SQUARE = [[4, 4, 12, 4, 12, 12, 4, 12]]


def audited(folder, **asked):
    return read_and_audit(parse_request({"data": str(folder), "suspects": False, **asked}), Journal(None))


def findings(found):
    return {f.kind: f for f in found.audit.findings}


def pictures_of(root, names, size=40):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(number, number, size).save(path)


def coco_set(root, *, num=12, area=None, side=40, **more):
    """Pictures of random content, one object each."""
    names = [f"{n:02d}.png" for n in range(num)]
    for number, name in enumerate(names):
        noise = np.random.default_rng(number).integers(0, 255, (side, side, 3)).astype(np.uint8)
        root.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(root / name)
    entry = {"category_id": 1, "bbox": [4, 4, 20, 20], "iscrowd": 0, **({} if area is None else {"area": area})}
    content = {"images": [{"id": n, "file_name": name, **more} for n, name in enumerate(names)],
               "annotations": [{**entry, "id": n + 1, "image_id": n} for n in range(num)],
               "categories": [{"id": 1, "name": "thing"}]}  # fmt: skip
    (root / "annotations.json").write_text(json.dumps(content))
    return root


# names


def test_coco_paths_of_another_machine_find_the_folder_that_agrees(tmp_path):
    root = tmp_path / "set"
    pictures_of(root, ["camA/0001.png", "camB/0001.png", "camA/0002.png"])
    entries = [
        {"id": n, "file_name": f"/home/me/data/{name}"}
        for n, name in enumerate(("camA/0001.png", "camB/0001.png", "camB/0002.png"))
    ]
    box = {"category_id": 3, "bbox": [1, 2, 10, 12]}
    (root / "annotations.json").write_text(json.dumps({
        "images": entries, "categories": [{"id": 3, "name": "cat"}],
        "annotations": [{**box, "id": n, "image_id": n} for n in range(3)]}))  # fmt: skip
    reading = read_coco.read(root, How())
    assert list(reading.index.paths) == ["camA/0001.png", "camA/0002.png", "camB/0001.png"] and not reading.problems
    assert reading.index.objects.numbers.tolist() == [0, 2, 1]  # 2 by its name alone, which one file has
    entries.append({"id": 3, "file_name": "camA/0002.png"})  # now another image has that file
    content = json.loads((root / "annotations.json").read_text()) | {"images": entries}
    (root / "annotations.json").write_text(json.dumps(content))
    reading = read_coco.read(root, How())
    assert list(reading.index.paths) == ["camA/0001.png", "camA/0002.png", "camB/0001.png"]
    assert reading.index.objects.numbers.tolist() == [0, 1]
    assert [(p.kind, p.lost) for p in reading.problems] == [("missing_image", True)]


def test_coco_names_are_found_from_a_relative_path_too(tmp_path, monkeypatch):
    for split in ("train", "valid"):
        names = [f"{split}{n}.png" for n in range(2)]
        pictures_of(tmp_path / "ds" / split, names)
        images = [{"id": n, "file_name": f"/home/me/{split}/images/{name}"} for n, name in enumerate(names)]
        (tmp_path / "ds" / split / "_annotations.coco.json").write_text(json.dumps({
            "images": images, "categories": [{"id": 1, "name": "cat"}],
            "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 2, 10, 12]}]}))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    reading = read_coco.read(Path("ds"), How())
    assert split_counts(reading) == [2, 2, 0] and not reading.problems


def test_coco_images_may_lie_where_those_of_another_split_would_be(tmp_path):
    root = tmp_path / "set"
    for split in ("train", "test"):
        pictures_of(root / split, ["a.png", "b.png"])
    coco(
        root / "annotations",
        "instances_val.json",
        images=[{"id": 0, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}],
    )
    for image in ("a.png", "b.png"):
        (root / "annotations" / image).unlink()
    reading = read_coco.read(root, How())
    assert split_counts(reading) == [0, 2, 0] and not [p for p in reading.problems if p.lost]


def test_two_categories_of_one_name_stay_apart(tmp_path):
    root = coco(tmp_path / "set", categories=[{"id": 7, "name": "cat"}, {"id": 3, "name": "cat"}])
    assert read_coco.read(root, How()).index.class_names == ("cat", "cat (2)")


def test_voc_of_several_folders_is_read_whole(tmp_path):
    for split in ("train", "valid", "test"):
        voc(tmp_path / "splits" / split, {f"{split}1": [("cat", "1 2 10 12")], f"{split}2": [("dog", "1 2 10 12")]})
    reading = read_voc.read(tmp_path / "splits", How())
    assert split_counts(reading) == [2, 2, 2] and reading.index.class_names == ("cat", "dog")
    for year, name in (("VOC2007", "a"), ("VOC2012", "b")):
        voc(tmp_path / "kit" / year, {name: [("cat", "1 2 10 12")]}, {"train": f"{name}.jpeg\n"})
    reading = read_voc.read(tmp_path / "kit", How())
    assert list(reading.index.paths) == ["VOC2007/JPEGImages/a.png", "VOC2012/JPEGImages/b.png"] and split_counts(
        reading
    ) == [2, 0, 0]


def test_mask_folders_of_any_name_are_all_read(tmp_path):
    for part in ("partA", "partB"):
        picture(tmp_path / part / "one" / "images" / "one.png")
        (tmp_path / part / "one" / "masks").mkdir()
        Image.fromarray(np.eye(24, dtype=np.uint8) * 255).save(tmp_path / part / "one" / "masks" / "m.png")
    assert len(read_masks.read(tmp_path, How()).index) == 2


def test_a_yolo_test_split_that_is_the_validation_split_is_none(tmp_path):
    yaml = "train: images/train\nval: images/val\ntest: images/val\nnames: [cat]\n"
    for split in ("train", "val"):
        for name in "ab":
            picture(tmp_path / "images" / split / f"{split}{name}.png")
            (tmp_path / "labels" / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / "labels" / split / f"{split}{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text(yaml)
    reading = read_yolo.read(tmp_path, How())
    assert split_counts(reading) == [2, 2, 0] and "test names images of val only" in reading.note


# what is wrong is said


def test_pictures_of_another_size_than_annotated_are_said(tmp_path):
    images = [
        {"id": 0, "file_name": "a.png", "width": 48, "height": 48},
        {"id": 1, "file_name": "b.png", "width": 24, "height": 24},
    ]
    _, problems = audit_objects(sized(read_coco.read(coco(tmp_path / "set", images=images), How()).index))
    (said,) = [p for p in problems if p.kind == "other_size"]
    assert said.item.startswith("a.png") and "states 48 x 48, the picture has 24 x 24" in said.message and not said.lost
    Image.new("RGB", (24, 30)).save(tmp_path / "set" / "a.png")
    images[0] |= {"width": 30, "height": 24}
    _, problems = audit_objects(sized(read_coco.read(coco(tmp_path / "set", images=images), How()).index))
    assert ["before it was turned" in p.message for p in problems if p.kind == "other_size"] == [True]
    root = voc(tmp_path / "voc", {"a": [("cat", "1 2 10 12")]})
    file = root / "Annotations" / "a.xml"
    file.write_text(
        file.read_text().replace("<filename>", "<size><width>48</width><height>24</height></size><filename>")
    )
    _, problems = audit_objects(sized(read_voc.read(root, How()).index))
    assert [p.kind for p in problems] == ["other_size"]


def test_data_of_which_no_object_is_left_is_refused(tmp_path):
    names = tuple(f"{n:02d}" for n in range(12))
    root = yolo(
        tmp_path / "set",
        dict.fromkeys(names, "0 0.5 0.5 0.5 0.5 0.99\n"),
        "train: images\nval: images\nnames: [cat]\n",
        names,
    )
    for number, name in enumerate(names):
        noise = np.random.default_rng(number).integers(0, 255, (40, 40, 3)).astype(np.uint8)
        Image.fromarray(noise).save(root / "images" / f"{name}.png")
    with pytest.raises(DataError, match=r"No picture of the training split has an object.*12 were dropped.*6 numbers"):
        audited(root)


def test_data_without_a_readable_picture_is_refused(tmp_path):
    root = coco_set(tmp_path / "set", num=3)
    for file in root.glob("*.png"):
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(DataError, match="None of 3 samples can be used"):
        audited(root, max_bad=1.0)


def test_a_class_that_training_lacks_is_a_warning(tmp_path):
    root = coco_set(tmp_path / "set")
    content = json.loads((root / "annotations.json").read_text())
    content["categories"].append({"id": 2, "name": "never"})
    (root / "annotations.json").write_text(json.dumps(content))
    found = findings(audited(root))
    assert found["too_few"].severity == "warning" and "cannot be learned" in found["too_few"].action
    assert "imbalance" not in found  # what is not there at all is no imbalance


def test_one_picture_with_other_objects_each_time_is_said(tmp_path):
    root = coco_set(tmp_path / "set")
    for name in ("01.png", "03.png"):
        (root / name).write_bytes((root / "00.png").read_bytes())
    content = json.loads((root / "annotations.json").read_text())
    content["annotations"][1]["bbox"] = [20, 20, 10, 10]
    (root / "annotations.json").write_text(json.dumps(content))
    found = findings(audited(root))
    assert found["label_conflict"].count == 3 and "different objects" in found["label_conflict"].action
    content["annotations"][1]["bbox"] = [4, 4, 20, 20]
    (root / "annotations.json").write_text(json.dumps(content))
    assert "label_conflict" not in findings(audited(root))


# masks


@pytest.mark.parametrize("empty", [[[]], [[], []], []])
def test_boxes_with_empty_polygons_are_boxes(tmp_path, empty):
    notes = [
        {"id": n, "image_id": n, "category_id": 3, "bbox": [1, 2, 10, 12], "segmentation": empty} for n in range(2)
    ]
    reading = read_coco.read(coco(tmp_path / "set", annotations=notes), How())
    assert reading.index.task == "detect" and reading.index.objects.kept.all() and not reading.problems


def test_polygons_cut_out_are_polygons_drawn_whole():
    random = np.random.default_rng(0)
    for _ in range(60):
        size = tuple(int(v) for v in random.integers(5, 60, 2))
        rings = [random.uniform(-10, 70, (int(random.integers(1, 9)), 2)) for _ in range(int(random.integers(1, 4)))]
        data = pack_polygons(rings)
        whole = draw_mask(POLYGONS, data, size=size)
        cut = cut_polygons(data, size)
        assert np.array_equal(cut.whole(size), whole)
        wanted = cut_mask(whole)
        assert (cut.left, cut.top) == (wanted.left, wanted.top) and np.array_equal(cut.pixels, wanted.pixels)


def test_run_lengths_of_a_cut_out_are_those_of_its_picture():
    random = np.random.default_rng(1)
    for trial in range(300):
        width, height = (int(v) for v in random.integers(1, 14, 2))
        mask = random.random((height, width)) < (0.05, 0.5, 0.95, 1.0)[trial % 4]
        told = as_rle(cut_mask(mask), (width, height))
        assert told["size"] == [height, width]
        assert np.array_equal(unpack_rle(pack_rle(told["counts"], height, width)), mask)
        assert pack_mask(mask) == pack_rle(told["counts"], height, width)


def test_mask_files_are_read_once_and_then_part_of_the_data(tmp_path):
    for n in range(2):
        picture(tmp_path / f"s{n}" / "images" / "x.png", 24)
        (tmp_path / f"s{n}" / "masks").mkdir()
        mask = np.zeros((24, 24), np.uint8)
        mask[3:9, 4 : 8 + n] = 255
        Image.fromarray(mask).save(tmp_path / f"s{n}" / "masks" / "m.png")
    index = sized(read_masks.read(tmp_path, How()).index)
    objects, problems = audit_objects(index)
    assert not problems and objects.mask_kinds.tolist() == [RLE, RLE]
    (tmp_path / "s0" / "masks" / "m.png").unlink()
    book = MaskBook(replace(index, objects=objects))
    assert book.get(0, 0).area == 24 and book.get(1, 1).area == 30
    with pytest.raises(DataError, match=r"m\.png"):  # an index of an earlier version names files: no box in their place
        MaskBook(index).get(0, 0)


def test_the_book_of_masks_forgets(tmp_path, monkeypatch):
    monkeypatch.setattr("goodfit.data.objects.BOOK_BYTES", 200)
    notes = [
        {"id": n, "image_id": n % 2, "category_id": 3, "bbox": [4, 4, 8, 8], "segmentation": SQUARE} for n in range(9)
    ]
    index = sized(read_coco.read(coco(tmp_path / "set", annotations=notes), How(task="segment")).index)
    book = MaskBook(index)
    for number in [*range(9), *range(9)]:
        assert book.get(int(index.objects.rows[number]), number).area == 64
        assert sum(m.pixels.nbytes for m in book._kept.values()) <= 200


# areas


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_areas_count_as_the_annotations_state_them(tmp_path, task):
    """Small, medium and large as pycocotools has them from the JSON itself."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    root = coco_set(tmp_path / "set", side=200)
    content = json.loads((root / "annotations.json").read_text())
    for number, entry in enumerate(content["annotations"]):
        side = (20, 60, 150)[number % 3]
        low, high = 10.0, 10.0 + side
        entry |= {
            "bbox": [low, low, side, side],
            "area": side * side / 3,
            "segmentation": [[low, low, high, low, high, high, low, high]],
        }
    (root / "annotations.json").write_text(json.dumps(content))
    index = audited(root, task=task).index
    meter, results, draws = DetectionMeter(1, masks=task == "segment", keep=True), [], np.random.default_rng(0)
    book = MaskBook(index)
    for row in range(len(index)):
        there = objects_of(index, row)
        boxes = there.boxes + draws.normal(0, 6, there.boxes.shape)
        score = round(float(draws.random()), 3)
        outputs = {"boxes": torch.tensor(boxes)[None], "scores": torch.tensor([[score]]), "classes": torch.tensor([[0]]), "terms": {},
                   "masks": torch.ones(1, 1, 4, 4)}  # fmt: skip
        meter.update(outputs, {
            "place": torch.tensor([[1.0, 1.0, 0.0, 0.0]]), "size": torch.tensor([[200.0, 200.0]]), "true_boxes": torch.tensor(there.boxes)[None],
            "true_classes": torch.tensor(there.classes)[None], "crowd": torch.tensor(there.crowd)[None],
            "areas": torch.tensor(there.areas)[None], "true_masks": [[book.get(row, int(n)) for n in there.numbers]]})  # fmt: skip
        image = next(i for i in content["images"] if i["file_name"] == index.paths[row])
        found = meter.images[-1].boxes[0]
        one = {
            "image_id": image["id"],
            "category_id": 1,
            "score": score,
            "bbox": [*found[:2], *(found[2:] - found[:2])],
        }
        if task == "segment":
            del one["bbox"]
            one["segmentation"] = as_rle(meter.kept[-1][0], (200, 200))
            image |= {"width": 200, "height": 200}
        results.append(one)
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = content
        known.createIndex()
        judge = COCOeval(known, known.loadRes(results), "segm" if task == "segment" else "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    made = np.array(list(meter.evaluation(masks=task == "segment").summary().values()))
    assert np.abs(made - judge.stats).max() <= 1e-6
    assert (
        judge.stats[3] >= 0 and judge.stats[4] >= 0
    )  # 20² / 3 and 60² / 3 are small and medium; by its box 60² would be medium too ...
    assert judge.stats[5] == -1  # ... and 150² / 3 is not large, as 150² would be
