"""Readers of boxes and masks, mask codecs, and the audit of objects: on real data and on small made datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from annotated import coco, picture, sized, split_counts, voc, yolo
from goodfit.core.errors import DataError
from goodfit.data.checks.audit_objects import audit_objects
from goodfit.data.columns import MASK_FILE, NO_MASK, POLYGONS, RLE, Blobs, Objects, Strings
from goodfit.data.formats import read_coco, read_masks, read_voc, read_yolo
from goodfit.data.index import LEFT_OUT, DatasetIndex
from goodfit.data.masks import (
    draw_mask,
    mask_box,
    pack_polygons,
    pack_rle,
    rle_box,
    rle_runs,
    unpack_polygons,
    unpack_rle,
)
from goodfit.data.reading import How, Reading
from pictures import folder_hash


def class_counts(index: DatasetIndex) -> dict[str, int]:
    return dict(Counter(index.class_names[c] for c in index.objects.classes))


def kinds(reading: Reading) -> dict[str, int]:
    return dict(Counter(p.kind for p in reading.problems))


# mask codecs


def test_run_lengths_by_hand():
    # columns first: 0 1 / 1 1 / 0 0 stands for the 2 x 3 mask below
    mask = np.array([[0, 1, 0], [1, 1, 0]], bool)
    packed = pack_rle([1, 3, 2], 2, 3)
    assert packed[8:] == b"132"
    assert np.array_equal(unpack_rle(packed), mask)
    # from the fourth count on, differences to the one two before: 5 2 40 2 6 -> 5, 2, 40, 0, -34
    packed = pack_rle([5, 2, 40, 2, 6], 5, 11)
    # 40 = 8 + 1*32 -> 'X' (8+32+48), '1'; -34 = ...1_11110_01? low five bits 30, then -2 (30 with sign)
    assert packed[8:] == b"52X10nN"
    assert rle_runs(packed)[2].tolist() == [5, 2, 40, 2, 6]


def test_run_lengths_round_trip():
    random = np.random.default_rng(0)
    for _ in range(200):
        height, width = (int(v) for v in random.integers(1, 60, 2))
        mask = random.random((height, width)) < random.random() ** 2
        flat = mask.T.ravel().astype(int)
        edges = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
        runs = [0, *runs] if flat[0] else runs
        packed = pack_rle(runs, height, width)
        assert np.array_equal(unpack_rle(packed), mask)
        assert pack_rle(packed[8:].decode(), height, width) == packed
        assert rle_box(height, rle_runs(packed)[2]) == mask_box(mask)


@pytest.mark.parametrize(
    "counts", [[1, 2], [1, -1, 6], [1, "2", 3], [True, 5], [7], "1", "\x7f\x7f", "oooooooooooo1", "é", ""]
)
def test_bad_run_lengths_are_refused(counts):
    with pytest.raises(ValueError, match=r"\w{3}"):
        pack_rle(counts, 2, 3)


@pytest.mark.parametrize("size", [(0, 3), (-2, -3), (100_000, 100_000)])
def test_impossible_mask_sizes_are_refused(size):
    with pytest.raises(ValueError, match="pixels"):
        pack_rle([size[0] * size[1]], *size)


def test_polygons_round_trip_and_cut_bytes():
    rings = [
        np.array([[0, 0], [4, 0], [4, 4]], np.float32),
        np.zeros((0, 2), np.float32),
        np.full((1, 2), np.nan, np.float32),
    ]
    packed = pack_polygons(rings)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(unpack_polygons(packed), rings, strict=True))
    for end in range(len(packed)):
        with pytest.raises(ValueError, match="cut off"):
            unpack_polygons(packed[:end])
    with pytest.raises(ValueError, match="x, y"):
        pack_polygons([[1.0, 2.0, 3.0]])


def test_polygons_are_drawn_by_pixel_centres():
    square = pack_polygons([[[1, 1], [4, 1], [4, 3], [1, 3]]])
    expected = np.zeros((5, 6), bool)
    expected[1:3, 1:4] = True
    assert np.array_equal(draw_mask(POLYGONS, square, size=(6, 5)), expected)
    shares = pack_polygons([[[1 / 6, 1 / 5], [4 / 6, 1 / 5], [4 / 6, 3 / 5], [1 / 6, 3 / 5]]])
    assert np.array_equal(draw_mask(POLYGONS, shares, size=(6, 5), scale=(6.001, 5.001)), expected)
    between = draw_mask(POLYGONS, pack_polygons([[[1.6, 0.6], [3.4, 0.6], [3.4, 2.4], [1.6, 2.4]]]), size=(6, 5))
    assert np.argwhere(between).tolist() == [[1, 2]]
    angle = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    for radius in (4.0, 9.0, 30.0):
        disc = pack_polygons([np.column_stack([50.3 + radius * np.cos(angle), 47.6 + radius * np.sin(angle)])])
        area = draw_mask(POLYGONS, disc, size=(100, 100)).sum() / (np.pi * radius**2)
        assert area == pytest.approx(1.0, abs=0.03)
    outside = pack_polygons([[[-1e30, -1e30], [1e30, -1e30], [0, 1e30]]])
    assert draw_mask(POLYGONS, outside, size=(3, 2)).all()


def test_masks_of_another_size_are_scaled(tmp_path):
    mask = np.zeros((4, 6), np.uint8)
    mask[1:3, 2:4] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    small = np.zeros((2, 3), bool)
    small[0:2, 1] = True
    drawn = draw_mask(MASK_FILE, b"m.png", size=(6, 4), root=tmp_path)
    assert np.array_equal(drawn, mask > 0)
    assert draw_mask(MASK_FILE, b"m.png", size=(3, 2), root=tmp_path).shape == (2, 3)
    with pytest.raises(ValueError, match="read"):
        draw_mask(MASK_FILE, b"none.png", size=(6, 4), root=tmp_path)
    with pytest.raises(ValueError, match="no mask"):
        draw_mask(NO_MASK, b"", size=(6, 4))


# real data


def test_bccd_voc(real_data):
    root = real_data / "detect" / "bccd_voc"
    before = folder_hash(root)
    assert "Pascal VOC" in read_voc.recognise(root)
    reading = read_voc.read(root, How())
    assert (len(reading.index), split_counts(reading)) == (364, [205, 87, 72])
    assert class_counts(reading.index) == {"RBC": 4155, "WBC": 372, "Platelets": 361}
    assert reading.problems == () and reading.given_splits == ("train", "val", "test")
    objects, problems = audit_objects(sized(reading.index))
    assert sorted(p.item.split("/")[2].split(".")[0] for p in problems) == ["BloodImage_00338", "BloodImage_00343"]
    assert {p.kind for p in problems} == {"bad_box"} and (~objects.kept).sum() == 2
    assert (objects.boxes[:, :2] >= 0).all()
    assert folder_hash(root) == before


def test_facemask_coco(real_data):
    root = real_data / "detect" / "facemask_coco"
    before = folder_hash(root)
    reading = read_coco.read(root, How())
    assert split_counts(reading) == [677, 171, 0] and kinds(reading) == {}
    assert reading.index.class_names == ("mask_weared_incorrect", "with_mask", "without_mask")  # ids 0, 1, 2
    assert class_counts(reading.index) == {"with_mask": 3184, "without_mask": 716, "mask_weared_incorrect": 121}
    objects, problems = audit_objects(sized(reading.index))
    assert problems == [] and objects.kept.all()
    alone = read_coco.read(root / "annotations" / "custom_val.json", How(task="detect"))
    assert alone.index.paths == reading.index.paths
    assert folder_hash(root) == before


def test_coco128_yolo_boxes(real_data):
    root = real_data / "segment" / "coco128"
    before = folder_hash(root)
    reading = read_yolo.read(root / "object_detection", How())
    assert split_counts(reading) == [128, 128, 0] and reading.index.task == "detect"
    rows = reading.index.objects.rows
    assert [int((reading.index.splits[rows] == s).sum()) for s in (0, 1)] == [929, 898]
    items = {kind: [p.item[-10:-4] for p in reading.problems if p.kind == kind] for kind in kinds(reading)}
    assert items == {"missing_label": ["000250", "000508"], "missing_image": ["000656", "000659"]}
    assert not any(p.lost for p in reading.problems)
    objects, problems = audit_objects(sized(reading.index))
    assert problems == [] and not objects.relative
    assert folder_hash(root) == before


def test_coco128_polygons_agree_with_the_derived_coco_json(real_data):
    root = real_data / "segment" / "coco128"
    before = folder_hash(root)
    yolo = read_yolo.read(root / "instance_segmentation", How())
    assert split_counts(yolo) == [100, 100, 0] and yolo.index.task == "segment"
    assert len(yolo.index.objects) == 746 + 712 and kinds(yolo) == {"missing_label": 56}
    with pytest.raises(DataError, match=r"instances_val2017\.json") as caught:
        read_coco.read(root / "annotations_derived", How())
    assert "annotations=" in caught.value.next
    coco = read_coco.read(root / "annotations_derived", How(annotations="instances"))
    assert split_counts(coco) == [100, 100, 0] and coco.index.task == "segment"
    assert class_counts(coco.index) == class_counts(yolo.index)
    assert split_counts(read_coco.read(root / "annotations_derived", How(annotations="detection*"))) == [128, 128, 0]
    pairs = []
    for reading in (yolo, coco):
        index = sized(reading.index)
        objects, problems = audit_objects(index)
        assert problems == [] and set(objects.mask_kinds) == {POLYGONS}
        size = tuple(int(v) for v in index.sizes[0])
        pairs.append([draw_mask(POLYGONS, m, size=size) for m in objects.masks[objects.of(0)]])
    for a, b in zip(*pairs, strict=True):
        assert (a & b).sum() > 0.95 * (a | b).sum()
    assert folder_hash(root) == before


def test_nuclei_masks(real_data):
    root = real_data / "segment" / "nuclei_dsb2018"
    assert read_masks.recognise(root)
    reading = read_masks.read(root, How())
    index = reading.index
    assert (len(index), len(index.objects), index.class_names) == (150, 6640, ("object",))
    few = np.flatnonzero(np.diff(index.objects.starts) <= 8)  # opening all 6,640 takes four seconds
    splits = np.full(len(index), LEFT_OUT, np.int8)
    splits[few] = -1
    objects, problems = audit_objects(sized(replace(index, splits=splits)))
    assert problems == [] and objects.kept.sum() == np.diff(index.objects.starts)[few].sum()
    number = int(objects.starts[few[0]])
    size = tuple(int(v) for v in sized(index).sizes[few[0]])
    assert objects.mask_kinds[number] == RLE
    mask = draw_mask(RLE, objects.masks[number], size=size)
    assert np.array_equal(mask, draw_mask(MASK_FILE, index.objects.masks[number], size=size, root=index.root))
    assert mask_box(mask) == tuple(objects.boxes[number].tolist())


def test_recognisers_do_not_claim_each_others_data(real_data):
    readers = {"coco": read_coco, "yolo": read_yolo, "voc": read_voc, "masks": read_masks}
    expected = {
        "detect/facemask_coco": ["coco"], "detect/bccd_voc": ["voc"], "segment/nuclei_dsb2018": ["masks"],
        "segment/coco128/object_detection": ["yolo"], "segment/coco128/annotations_derived": ["coco"],
        "classify/trashnet": [], "text/trec": [], "classify/facemask_crops": [],
    }  # fmt: skip
    for place, names in expected.items():
        assert [n for n, reader in readers.items() if reader.recognise(real_data / place)] == names, place


# made data


def test_coco_masks_crowds_background_and_bad_entries(tmp_path):
    square = [[1, 1, 9, 1, 9, 9, 1, 9]]
    base = {"image_id": 0, "category_id": 3, "bbox": [1, 1, 8, 8]}
    rle = {"size": [24, 24], "counts": [24, 24, 528]}
    root = coco(tmp_path / "set", annotations=[
        {**base, "id": 1, "segmentation": square},
        {**base, "id": 2, "segmentation": rle, "iscrowd": 1},
        {**base, "id": 3, "segmentation": {**rle, "counts": pack_rle([24, 24, 528], 24, 24)[8:].decode()}, "category_id": "7"},
        {**base, "id": 4, "segmentation": {**rle, "counts": [1, 2]}},
        {**base, "id": 5, "segmentation": [[1, 2, 3]]},
        {**base, "id": 6, "segmentation": square, "image_id": 99},
        {**base, "id": 7, "segmentation": square, "category_id": 99},
        {**base, "id": 8, "segmentation": square, "bbox": [1, 2, "x", 4]},
        {"image_id": 0, "category_id": 3, "id": 9, "segmentation": square},
        "nonsense",
    ])  # fmt: skip
    reading = read_coco.read(root, How())
    objects = reading.index.objects
    assert reading.index.task == "segment" and reading.index.class_names == ("cat", "no")
    assert objects.numbers.tolist() == [1, 2, 3, 4, 5, 9] and objects.starts.tolist() == [0, 6, 6]
    assert objects.classes.tolist() == [0, 0, 1, 0, 0, 0] and objects.crowd.tolist() == [False, True] + 4 * [False]
    assert objects.mask_kinds.tolist() == [POLYGONS, RLE, RLE, NO_MASK, NO_MASK, POLYGONS]
    assert objects.boxes[5].tolist() == [1, 1, 9, 9]  # from the polygon
    assert objects.kept.tolist() == [True, True, True, False, False, True]
    places = [(p.kind, p.item) for p in reading.problems]
    assert places == [("bad_mask", "annotations.json:4"), ("bad_mask", "annotations.json:5"),
                      *(("bad_box", f"annotations.json:{n}") for n in (6, 7, 8)), ("bad_box", "annotations.json:annotations[9]")]  # fmt: skip
    drawn = draw_mask(RLE, objects.masks[1], size=(24, 24))
    assert drawn[:, 1].all() and drawn.sum() == 24
    boxes = read_coco.read(root, How(task="detect"))
    assert boxes.index.objects.kept.all() and not boxes.index.objects.mask_kinds.any() and boxes.index.task == "detect"


def test_masks_are_learned_where_nearly_all_objects_have_one(tmp_path):
    """What has none would become background; boxes of all are worth more."""

    def read(masked, whole, **how):
        ring = [[1, 1, 9, 1, 9, 9, 5, 7, 1, 9]]
        base = {"image_id": 0, "category_id": 3, "bbox": [1, 1, 8, 8]}
        notes = [{**base, "id": k, "segmentation": ring if k < masked else []} for k in range(whole)]
        return read_coco.read(coco(tmp_path / f"{masked}-{whole}", annotations=notes), How(**how))

    assert read(60, 100).index.task == read(94, 100).index.task == "detect"
    assert "60 of 100 objects have a mask, too few to learn them (task=segment" in read(60, 100).note
    assert read(60, 100).index.objects.kept.all()
    assert read(96, 100).index.task == "segment" and "the others are dropped" in read(96, 100).note
    assert read(60, 100, task="segment").index.task == "segment" and "mask" not in read(60, 100, task="detect").note
    assert read(0, 100).index.task == "detect" and "have a mask" not in read(100, 100).note + read(0, 100).note
    lines = "2 .5 .5 .1 .1\n" * 6 + "2 .1 .1 .3 .1 .3 .3\n" * 9
    mixed = read_yolo.read(yolo(tmp_path / "yolo", {"a": lines, "b": ""}, YAML), How())
    assert (
        mixed.index.task == "detect" and len(mixed.index.objects) == 15 and "9 of 15 objects have a mask" in mixed.note
    )


@pytest.mark.parametrize("box", [None, [], [0, 0, 0, 0], [3, 4, 0, 0]])
@pytest.mark.parametrize("task", [None, "detect"])
def test_a_box_that_is_missing_beside_a_mask_is_that_of_the_mask(box, task, tmp_path):
    square = {"segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]], "image_id": 0, "category_id": 3, "id": 1}
    reading = read_coco.read(coco(tmp_path / "set", annotations=[{**square, "bbox": box}]), How(task=task))
    assert reading.index.objects.boxes.tolist() == [[1, 1, 9, 9]] and not reading.problems


def test_a_confidence_behind_a_box_is_named(tmp_path):
    reading = read_yolo.read(yolo(tmp_path, {"a": "2 .5 .5 .1 .1\n2 .5 .5 .1 .1 .9\n", "b": ""}, YAML), How())
    (said,) = [p.message for p in reading.problems if p.kind == "bad_box"]
    assert "6 numbers" in said and "confidence" in said and len(reading.index.objects) == 1


def test_coco_missing_and_unnamed_images(tmp_path):
    images = [
        {"id": 0, "file_name": "C:\\data\\A.PNG"},
        {"id": 1, "file_name": "gone.png"},
        {"id": 0, "file_name": "b.png"},
    ]
    reading = read_coco.read(coco(tmp_path / "set", images=images), How())
    assert list(reading.index.paths) == ["a.png"]
    assert [(p.kind, p.lost) for p in reading.problems] == [("missing_image", True), ("missing_image", True),
                                                            ("missing_label", False)]  # fmt: skip
    with pytest.raises(DataError, match="exist"):
        read_coco.read(coco(tmp_path / "none", images=images[1:2]), How())


def test_coco_splits_by_folder_with_equal_names(tmp_path):
    root = tmp_path / "set"
    for split in ("train", "valid"):
        picture(root / split / "a.png", 24 if split == "train" else 30)
        picture(root / split / "b.png")
        coco(root / split, "_annotations.coco.json")
    reading = read_coco.read(root, How())
    assert split_counts(reading) == [2, 2, 0] and reading.given_splits == ("train", "val")
    assert list(reading.index.paths) == ["train/a.png", "train/b.png", "valid/a.png", "valid/b.png"]
    assert read_coco.read(root, How(resplit=True)).given_splits == ()


def test_coco_categories_that_disagree_and_panoptic_files(tmp_path):
    root = coco(tmp_path / "set", "train.json")
    coco(root, "val.json", categories=[{"id": 3, "name": "dog"}])
    with pytest.raises(DataError, match=r"'cat'.*'dog'"):
        read_coco.read(root, How())
    panoptic = coco(tmp_path / "panoptic", annotations=[{"image_id": 0, "segments_info": [{"bbox": [0, 0, 1, 1]}]}])
    assert read_coco.recognise(panoptic) is None


YAML = "train: images\nval: images\nnames:\n  2: no\n  5: 1\n"


def test_yolo_lines_good_and_bad(tmp_path):
    lines = ["2 0.5 0.5 0.2 0.4", "5.0 .1 .1 .3 .1 .3 .3", "2.5 .5 .5 .1 .1", "3 .5 .5 .1 .1", "-1 .5 .5 .1 .1",
             "2 nan .5 .1 .1", "2 .5 .5 .1", "2 .5 .5 .1 .1 .9", "2 .5 x .1 .1", "", "5 .5 .5 1_0 .1"]  # fmt: skip
    reading = read_yolo.read(yolo(tmp_path, {"a": "\ufeff" + "\r\n".join(lines)}, YAML), How(task="detect"))
    assert reading.index.class_names == ("no", "1") and reading.index.objects.classes.tolist() == [0, 1]
    np.testing.assert_allclose(reading.index.objects.boxes, [[0.4, 0.3, 0.6, 0.7], [0.1, 0.1, 0.3, 0.3]], rtol=1e-6)
    bad = [(p.kind, p.item) for p in reading.problems if p.kind.startswith("bad")]
    assert bad == [("bad_box", f"labels/a.txt:{n}") for n in (3, 4, 5, 6, 7, 8, 9, 11)]
    assert "not taken as a split" in reading.note and reading.given_splits == ("train",)
    assert [p.item for p in reading.problems if p.kind == "missing_label"] == ["images/b.png"]
    utf16 = "\n".join(lines).encode("utf-16")
    again = read_yolo.read(yolo(tmp_path / "utf16", {"a": utf16}, YAML), How(task="detect"))
    assert np.array_equal(again.index.objects.boxes, reading.index.objects.boxes)


def test_yolo_yaml_forms(tmp_path):
    root = yolo(
        tmp_path / "lists",
        {"a": "0 .5 .5 .1 .1", "b": ""},
        "path: /elsewhere/lists\ntrain: t.txt\nval: [v.txt]\nnc: 3\nnames: [x]\n",
    )
    (root / "t.txt").write_text("./images/a.png\nimages/gone.png\n")
    (root / "v.txt").write_text("images/b.png\n")
    reading = read_yolo.read(root / "data.yaml", How())
    assert split_counts(reading) == [1, 1, 0] and kinds(reading) == {"wrong_type": 1, "missing_image": 1}
    assert [p.item for p in reading.problems if p.lost] == ["t.txt:2"]
    (root / "other.yaml").write_text("train: images\nnames: [x]\n")
    with pytest.raises(DataError, match=r"data.yaml, other.yaml"):
        read_yolo.read(root, How())
    assert read_yolo.read(root, How(annotations="other")).given_splits == ("train",)
    (root / "other.yaml").write_text("train: images\nval: nowhere\nnames: [x]\n")
    with pytest.raises(DataError, match="nowhere"):
        read_yolo.read(root / "other.yaml", How())
    (root / "other.yaml").write_text("train: images\nnames: [x]\nskip_if_label_file_missing: true\n")
    (root / "labels" / "b.txt").unlink()
    assert list(read_yolo.read(root / "other.yaml", How()).index.paths) == ["images/a.png"]


def test_yolo_without_a_yaml(tmp_path):
    root = yolo(tmp_path, {"a": "4 .5 .5 .1 .1\n900000000 .5 .5 .2 .2", "lonely": "4 .5 .5 .1 .1"})
    assert "without a yaml" in read_yolo.recognise(root)
    reading = read_yolo.read(root, How())
    assert reading.index.class_names == ("4", "900000000") and "numbers" in reading.note
    assert [p.item for p in reading.problems if p.kind == "missing_image"] == ["labels/lonely.txt"]
    (root / "classes.txt").write_bytes("a\nb\nc\nd\né\n".encode("latin-1"))
    named = read_yolo.read(root, How())
    assert named.index.class_names == tuple("abcdé") and kinds(named)["bad_box"] == 1
    (root / "labels" / "b.txt").write_bytes(b"4 .5 .5 .1 .1\n\0")
    broken = read_yolo.read(root, How())
    assert list(broken.index.paths) == ["images/a.png"]
    assert [p.item for p in broken.problems if p.lost] == ["labels/b.txt"]


def test_long_and_odd_names_are_missing_files(tmp_path):
    root = yolo(tmp_path / "yolo", {"a": ""}, f"path: {'x' * 5000}\ntrain: images\ntest: {'y' * 300}\nnames: [x]\n")
    assert kinds(read_yolo.read(root, How())) == {"missing_image": 1, "missing_label": 1}
    names = ["a.png", "x" * 5000, "\0", "\ud800.png", "../" * 90 + "etc/passwd"]
    images = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    categories = [{"id": 3, "name": "\ud800"}]
    reading = read_coco.read(coco(tmp_path / "coco", images=images, categories=categories), How())
    assert list(reading.index.paths) == ["a.png"] and kinds(reading)["missing_image"] == 4
    assert "".join([*reading.index.class_names, *(p.item + p.message for p in reading.problems)]).encode()


def test_empty_folders_and_files_are_refused(tmp_path):
    (tmp_path / "empty.json").write_bytes(b"")
    for reader in (read_coco, read_yolo, read_voc, read_masks):
        for place in (tmp_path, tmp_path / "empty.json", tmp_path / "nowhere"):
            assert reader.recognise(place) is None
            with pytest.raises(DataError) as caught:
                reader.read(place, How())
            assert caught.value.where and caught.value.next
    background = read_voc.read(voc(tmp_path / "voc", {"a": [], "b": []}), How())
    assert len(background.index) == 2 and len(audit_objects(sized(background.index))[0]) == 0


def test_voc_corners_lists_and_difficult(tmp_path):
    boxes = {
        "a": [("cat", "1 2 10 12"), ("hard", "3 3 9 9")],
        "b": [("cat", "5 5 5 5")],
        "c": [],
        "d": [("cat", "x 1 2 3")],
    }
    root = voc(tmp_path / "one", boxes, {"trainval": "a  1\nb -1\nd\ngone\n", "test": "c\n"})
    reading = read_voc.read(root, How())
    assert list(reading.index.paths) == ["JPEGImages/a.png", "JPEGImages/d.png", "JPEGImages/c.png"]
    assert split_counts(reading) == [2, 0, 1] and "trainval.txt taken as train" in reading.note
    assert reading.index.objects.boxes.tolist() == [[0, 1, 10, 12], [2, 2, 9, 9]]
    assert reading.index.objects.crowd.tolist() == [False, True]
    assert sorted(kinds(reading).items()) == [("bad_box", 1), ("missing_label", 2)]  # d, b in no list, gone
    zero = read_voc.read(voc(tmp_path / "two", {**boxes, "c": [("cat", "0 1 10 12")]}), How())
    assert "counted from 0" in zero.note and zero.index.objects.boxes[0].tolist() == [1, 2, 10, 12]
    _, problems = audit_objects(sized(zero.index))
    assert [p.item for p in problems] == ["JPEGImages/b.png: Annotations/b.xml:1"]


def test_voc_refuses_entities_and_reads_any_encoding(tmp_path):
    root = voc(tmp_path, {"a": [("cat", "1 2 10 12")], "b": [], "c": []})
    bomb = "<!DOCTYPE x [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]><annotation>&b;</annotation>"
    (root / "Annotations" / "b.xml").write_text(bomb)
    (root / "Annotations" / "c.xml").write_text("<a>" * 100_000)
    text = (root / "Annotations" / "a.xml").read_text().replace("cat", "Größe")
    for encoding in ("utf-8", "utf-16", "iso-8859-1"):
        declared = f'<?xml version="1.0" encoding="{encoding}"?>{text}'
        (root / "Annotations" / "a.xml").write_bytes(declared.encode(encoding))
        reading = read_voc.read(root, How())
        assert reading.index.class_names == ("Größe",) and list(reading.index.paths) == ["JPEGImages/a.png"]
        assert [(p.kind, p.item, p.lost) for p in reading.problems] == [
            ("unreadable", "Annotations/b.xml", True), ("unreadable", "Annotations/c.xml", True)]  # fmt: skip


def test_mask_files_in_class_folders(tmp_path):
    for name in ("one", "two", "three"):
        picture(tmp_path / "set" / name / "images" / "x.png")
        for kind in ("cell", "bubble"):
            (tmp_path / "set" / name / "masks" / kind).mkdir(parents=True)
            mask = np.zeros((24, 24), np.uint8)
            mask[3:9, 4 : 20 if kind == "cell" else 6] = 255
            Image.fromarray(mask).save(tmp_path / "set" / name / "masks" / kind / "m.png")
    Image.fromarray(np.zeros((24, 24), np.uint8)).save(tmp_path / "set" / "one" / "masks" / "cell" / "m.png")
    Image.fromarray(np.ones((9, 9), np.uint8)).save(tmp_path / "set" / "two" / "masks" / "cell" / "m.png")
    (tmp_path / "set" / "three" / "masks" / "cell" / "m.png").write_bytes(b"\x89PNG nonsense")
    reading = read_masks.read(tmp_path, How())
    assert reading.index.class_names == ("bubble", "cell")
    objects, problems = audit_objects(sized(reading.index))
    assert [p.kind for p in problems] == ["bad_mask"] * 3 and all("cell" in p.message for p in problems)
    assert objects.boxes[objects.kept].tolist() == [[4, 3, 6, 9]] * 3
    boxes, problems = audit_objects(sized(read_masks.read(tmp_path, How(task="detect")).index))
    assert len(problems) == 3 and not boxes.mask_kinds.any() and boxes.boxes[boxes.kept].tolist() == [[4, 3, 6, 9]] * 3


# the audit


@pytest.fixture
def index_of() -> Callable[..., DatasetIndex]:
    def make(
        boxes: list[list[float]], masks: list[tuple[int, bytes]] | None = None, relative: bool = False
    ) -> DatasetIndex:
        num = len(boxes)
        objects = Objects(
            starts=np.array([0, num, num], np.int64), boxes=np.array(boxes, np.float32).reshape(-1, 4),
            classes=np.zeros(num, np.int32), crowd=np.zeros(num, bool), kept=np.ones(num, bool),
            masks=Blobs(m for _, m in masks) if masks else Blobs([b""] * num),
            mask_kinds=np.array([k for k, _ in masks] if masks else [NO_MASK] * num, np.uint8),
            files=Strings(["a.txt", "b.txt"]), numbers=np.arange(1, num + 1), relative=relative,
        )  # fmt: skip
        return DatasetIndex(
            root=Path(), task="segment" if masks else "detect", paths=["a.png", "b.png"], targets=np.array([-1, -1]),
            class_names=("x",), splits=np.zeros(2, np.int8), groups=np.array([-1, -1]),
            sizes=np.array([[100, 50], [10, 10]], np.int32), objects=objects,
        )  # fmt: skip

    return make


@pytest.mark.parametrize(
    ("box", "kept", "word"),
    [
        ([1, 1, 20, 20], True, None),
        ([-0.9, 0, 100.9, 50.4], True, None),  # rounding
        ([-5, 0, 20, 20], True, "clipped"),
        ([-15, 0, 10, 20], False, "outside"),
        ([80, 40, 300, 300], False, "outside"),
        ([20, 1, 10, 20], False, "reversed"),
        ([1, 1, 1, 20], False, "less than one pixel wide"),
        ([1, 1, 1.9, 20], False, "less than one pixel wide"),
        ([np.nan, 1, 5, 5], False, "not finite"),
        ([1, 1, np.inf, 5], False, "not finite"),
        ([-3e38, -3e38, 3e38, 3e38], False, "outside"),
    ],
)
def test_audit_of_one_box(index_of, box, kept, word):
    objects, problems = audit_objects(index_of([box, [30, 30, 40, 40]]))
    assert objects.kept.tolist() == [kept, True]
    assert [p.item for p in problems] == ([] if word is None else ["a.png: a.txt:1"])
    assert word is None or (word in problems[0].message and problems[0].kind == "bad_box" and not problems[0].lost)
    if kept:
        assert (objects.boxes[0] >= 0).all() and (objects.boxes[0] <= [100, 50, 100, 50]).all()


def test_audit_makes_pixels_and_drops_repeats(index_of):
    index = index_of([[0.1, 0.2, 0.3, 0.4]] * 3 + [[0, 0, 1, 1]], relative=True)
    objects, problems = audit_objects(index)
    np.testing.assert_allclose(objects.boxes[[0, 3]], [[10, 10, 30, 20], [0, 0, 100, 50]], rtol=1e-6)
    assert objects.kept.tolist() == [True, False, False, True] and [p.item for p in problems] == [
        "a.png: a.txt:2", "a.png: a.txt:3",
    ]  # fmt: skip
    left = replace(index, splits=np.array([LEFT_OUT, 0], np.int8))
    assert audit_objects(left)[1] == [] and not audit_objects(left)[0].kept.any()
    assert index.objects.kept.all() and index.objects.relative  # the given index is not changed


def test_audit_of_masks(index_of):
    square = [[10, 10], [20, 10], [20, 20], [10, 20]]
    cases = [
        (POLYGONS, pack_polygons([square]), True, ""),
        (POLYGONS, pack_polygons([square, [[1, 1], [2, 2]]]), True, "ignored"),
        (POLYGONS, pack_polygons([square[:2]]), False, "three corners"),
        (POLYGONS, pack_polygons([[[1, 1], [2, 2], [3, 3]]]), False, "no area"),
        (POLYGONS, pack_polygons([[[1, 1], [np.nan, 2], [3, 3]]]), False, "not finite"),
        (POLYGONS, pack_polygons([np.add(square, 200)]), False, "outside"),
        (POLYGONS, b"junk", False, "cut off"),
        (RLE, pack_rle([10, 90, 4900], 50, 100), True, ""),
        (RLE, pack_rle([10, 90, 4900], 100, 50), False, "50 x 100"),
        (RLE, pack_rle([5000], 50, 100), False, "empty"),
        (RLE, b"12345678\x00", False, "pixels"),
        (MASK_FILE, b"nowhere.png", False, "nowhere"),
        (NO_MASK, b"", False, "no mask"),
    ]
    boxes = [[n, n, n + 20, n + 20] for n in range(len(cases))]
    objects, problems = audit_objects(index_of(boxes, [c[:2] for c in cases]))
    assert objects.kept.tolist() == [c[2] for c in cases]
    said = {int(p.item.split(":")[-1]) - 1: p.message for p in problems}
    assert sorted(said) == [n for n, c in enumerate(cases) if c[3]] and {p.kind for p in problems} == {"bad_mask"}
    assert all(cases[n][3] in message for n, message in said.items())
    shares = index_of(
        [[0.1, 0.2, 0.2, 0.4]], [(POLYGONS, pack_polygons([np.divide(square, [100, 50])]))], relative=True
    )
    scaled = audit_objects(shares)[0]
    np.testing.assert_allclose(unpack_polygons(scaled.masks[0])[0], square, rtol=1e-6)


def test_audit_of_many_boxes_is_quick(index_of):
    import time

    random = np.random.default_rng(0)
    corner = random.random((200_000, 2)) * [90, 40]
    index = index_of(np.hstack([corner, corner + 5]).tolist())
    start = time.process_time()
    objects, _ = audit_objects(index)
    assert time.process_time() - start < 3 and objects.kept.sum() > 190_000  # 0.4 s on the machine of the figures
