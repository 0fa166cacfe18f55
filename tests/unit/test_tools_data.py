"""Datasets as the tools of our users write them: CVAT, labelImg, telephones, microscopes, cameras that do not move."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from annotated import coco, picture, sized, split_counts, voc, yolo
from goodfit.api.prepare import read_and_audit
from goodfit.config.parse import parse_request
from goodfit.core.errors import DataError, RequestError
from goodfit.core.journal import Journal
from goodfit.data.checks.audit_objects import audit_objects
from goodfit.data.formats import read_coco, read_folders, read_masks, read_voc, read_yolo
from goodfit.data.formats.readers import read_dataset
from goodfit.data.index import LEFT_OUT, NO_GROUP
from goodfit.data.objects import MaskBook
from goodfit.data.reading import How

SQUARE = [[4, 4, 12, 4, 12, 12, 4, 12]]
PENTAGON = [[4, 4, 12, 4, 12, 8, 10, 12, 4, 12]]
TURNS = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def audited(folder, **asked):
    return read_and_audit(parse_request({"data": str(folder), "suspects": False, **asked}), Journal(None))


def noise(path, seed, size=(48, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


# CVAT


def test_cvats_folders_are_found(tmp_path):
    """annotations/instances_default.json, and images/default/NAME where the JSON says NAME."""
    root = tmp_path / "set"
    for name in ("a.png", "b.png"):
        picture(root / "images" / "default" / name)
    coco(root / "annotations", "instances_default.json")
    for name in ("a.png", "b.png"):
        (root / "annotations" / name).unlink()
    reading = read_coco.read(root, How())
    assert sorted(reading.index.paths) == ["images/default/a.png", "images/default/b.png"] and not reading.problems
    for name in ("a.png", "c.png"):
        picture(root / "images" / "other" / name)
    assert sorted(read_coco.read(root, How()).index.paths) == ["images/default/a.png", "images/default/b.png"]


def crowded(root, marked, num=12):
    names = [f"{n:02d}.png" for n in range(num)]
    for number, name in enumerate(names):
        noise(root / name, number)
    content = {"images": [{"id": n, "file_name": name} for n, name in enumerate(names)], "categories": [{"id": 1, "name": "cell"}],
               "annotations": [{"id": n + 1, "image_id": n, "category_id": 1, "bbox": [4, 4, 20, 20], "iscrowd": int(n < marked)} for n in range(num)]}  # fmt: skip
    (root / "annotations.json").write_text(json.dumps(content))
    return root


def test_what_is_marked_as_a_crowd_is_told_and_learned_if_that_is_asked(tmp_path):
    found = audited(crowded(tmp_path / "some", 4))
    (told,) = [f for f in found.audit.findings if f.kind == "crowd"]
    assert (told.severity, told.count, told.items) == ("warning", 4, ("cell: 4 of 12 objects",))
    assert "crowds=learn" in told.override
    learned = audited(tmp_path / "some", crowds="learn")
    assert not [f for f in learned.audit.findings if f.kind == "crowd"] and not learned.index.objects.crowd.any()
    with pytest.raises(DataError, match="are marked as crowds") as caught:
        audited(crowded(tmp_path / "all", 12))
    assert "crowds=learn" in caught.value.next
    hard = voc(tmp_path / "voc", {"a": [("hard", "1 2 10 12")], "b": [("cat", "1 2 10 12")]})
    assert read_voc.read(hard, How()).index.objects.crowd.sum() == 1
    assert not read_voc.read(hard, How(crowds="learn")).index.objects.crowd.any()


@pytest.mark.parametrize(("ring", "task"), [(SQUARE[0], "detect"), (SQUARE[0] + SQUARE[0][:2], "detect"), (PENTAGON[0], "segment"),
                                            ([8, 4, 12, 8, 8, 12, 4, 8], "segment")])  # fmt: skip
def test_polygons_that_are_the_boxes_again_are_no_masks(tmp_path, ring, task):
    base = {"image_id": 0, "category_id": 3, "bbox": [4, 4, 8, 8], "segmentation": [ring]}
    reading = read_coco.read(coco(tmp_path / "coco", annotations=[{**base, "id": n} for n in range(3)]), How())
    assert reading.index.task == task and ("boxes once more" in reading.note) == (task == "detect")
    asked = read_coco.read(tmp_path / "coco", How(task="segment"))
    assert asked.index.task == "segment"
    line = "0 " + " ".join(f"{v / 24:.6f}" for v in ring) + "\n"
    assert read_yolo.read(yolo(tmp_path / "yolo", {"a": line, "b": line}), How()).index.task == task


# groups


def test_samples_belong_together_by_folder_by_name_or_by_a_key(tmp_path):
    root = tmp_path / "yolo"
    for name in ("cam1/x_0001", "cam1/x_0002", "cam2/x_0001", "cam2/y"):
        picture(root / "images" / f"{name}.png")
        (root / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text("train: images\nnames: [a]\n")
    plain = read_dataset(root, How()).index
    assert (plain.groups == NO_GROUP).all()
    assert read_dataset(root, How(group="folder")).index.groups.tolist() == [0, 0, 1, 1]
    found = read_dataset(root, How(group=r"(.*)_\d+\.png")).index
    assert found.groups.tolist() == [0, 0, 1, NO_GROUP]
    for bad, why in (("cam", "which part"), ("(", "no pattern"), ("(z)", "none of the 4")):
        with pytest.raises(RequestError, match=why):
            read_dataset(root, How(group=bad))
    images = [
        {"id": n, "file_name": f"{c}.png", "video_id": v} for n, (c, v) in enumerate(zip("ab", (7, 7), strict=True))
    ]
    assert read_coco.read(coco(tmp_path / "coco", images=images), How(group="video_id")).index.groups.tolist() == [0, 0]
    for name in ("k1/v1_1.png", "k1/v2_1.png", "k2/v1_2.png"):
        picture(tmp_path / "folders" / name)
    assert read_folders.read(tmp_path / "folders", How(group="(v[0-9])")).index.groups.tolist() == [0, 1, 0]


def test_nothing_that_is_asked_of_reading_is_ignored(tmp_path):
    root = yolo(tmp_path / "yolo", {"a": "0 0.5 0.5 0.5 0.5\n", "b": ""}, "train: images\nnames: [x]\n")
    for asked in ({"images": "x"}, {"label_column": "y"}, {"header": False}, {"crowds": "learn"}):
        with pytest.raises(RequestError, match=f"{next(iter(asked))}= means nothing"):
            read_dataset(root, How(**asked))
    boxes = voc(tmp_path / "voc", {"a": [("cat", "1 2 10 12")]})
    with pytest.raises(DataError, match=r"Pascal VOC.*nothing for the task segment"):
        read_dataset(boxes, How(task="segment"))
    for name in ("cat/1.png", "dog/2.png"):
        picture(tmp_path / "classes" / name)
    with pytest.raises(DataError, match="one folder per class, which has nothing for the task detect"):
        read_dataset(tmp_path / "classes", How(task="detect"))


# pictures


def test_pictures_of_kinds_that_are_not_read_are_lost_and_not_forgotten(tmp_path):
    root = yolo(
        tmp_path / "yolo", dict.fromkeys("abc", "0 0.5 0.5 0.5 0.5\n"), "train: images\nnames: [x]\n", images=("a",)
    )
    (root / "images" / "b.HEIC").write_bytes(b"x")
    (root / "images" / "a.CR2").write_bytes(b"x")  # the camera's raw file beside its picture
    Image.open(root / "images" / "a.png").convert("RGB").save(root / "images" / "c.jfif", "JPEG")
    reading = read_yolo.read(root, How())
    assert list(reading.index.paths) == ["images/a.png", "images/c.jfif"]
    (lost,) = reading.problems
    assert lost.lost and lost.kind == "unreadable" and "images/b.HEIC" in lost.item and "JPEG or PNG" in lost.message
    boxes = voc(tmp_path / "voc", {"a": [("cat", "1 2 10 12")], "b": [("cat", "1 2 10 12")]})
    (boxes / "JPEGImages" / "b.png").rename(boxes / "JPEGImages" / "b.heic")
    assert ["heic" in p.message and p.lost for p in read_voc.read(boxes, How()).problems] == [True]
    for name in ("k/1.png", "k/2.png", "l/1.png"):
        picture(tmp_path / "folders" / name)
    (tmp_path / "folders" / "l" / "2.heif").write_bytes(b"x")
    (tmp_path / "folders" / "l" / "1.dng").write_bytes(b"x")
    assert sorted(p.lost for p in read_folders.read(tmp_path / "folders", How()).problems) == [False, True]
    for kind in "mn":
        (tmp_path / "phone" / kind).mkdir(parents=True)
        (tmp_path / "phone" / kind / "1.heic").write_bytes(b"x")
    with pytest.raises(DataError, match="No image that can be read"):
        read_folders.read(tmp_path / "phone", How())


@pytest.mark.parametrize("turn", [5, 6, 7, 8])
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_objects_annotated_before_the_turn_of_exif_are_turned_with_the_picture(tmp_path, turn, task):
    raw = np.zeros((36, 48, 3), np.uint8)
    raw[5:15, 8:30] = 200
    raw[5:8, 8:20] = 90
    exif = Image.Exif()
    exif[0x0112] = turn
    root = tmp_path / "set"
    root.mkdir()
    Image.fromarray(raw).save(root / "a.png", exif=exif)
    ring = [8, 5, 30, 5, 30, 15, 12, 15, 8, 12]
    runs = np.zeros((36, 48), np.uint8)
    runs[5:15, 8:30] = 1
    flat = runs.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()
    base = {"image_id": 0, "category_id": 1, "bbox": [8, 5, 22, 10], "iscrowd": 0}
    (root / "annotations.json").write_text(json.dumps({
        "images": [{"id": 0, "file_name": "a.png", "width": 48, "height": 36}], "categories": [{"id": 1, "name": "x"}],
        "annotations": [{**base, "id": 1, "segmentation": [ring]}, {**base, "id": 2, "segmentation": {"size": [36, 48], "counts": counts}}]}))  # fmt: skip
    index = replace(sized(read_coco.read(root, How(task=task)).index), sizes=np.array([[36, 48]], np.int32))
    objects, problems = audit_objects(index)
    upright = np.asarray(Image.fromarray(raw).transpose(TURNS[turn])).any(axis=2)
    rows, columns = np.flatnonzero(upright.any(axis=1)), np.flatnonzero(upright.any(axis=0))
    wanted = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    kept = objects.boxes[objects.kept].tolist()
    assert kept == [wanted] * (2 if task == "segment" else 1)
    assert [p.kind for p in problems if p.kind != "bad_box"] == ["turned"]
    if task == "segment":
        book = MaskBook(replace(index, objects=objects))
        assert np.array_equal(book.get(0, 1).whole((36, 48)), upright)
        shape = np.asarray(Image.fromarray(raw).transpose(TURNS[turn]))
        polygon = book.get(0, 0).whole((36, 48))
        assert (polygon & ~upright).sum() == 0 and 0 < (upright & ~polygon).sum() < 12 and shape[polygon].any()


def test_boxes_beyond_the_size_that_the_annotation_states_are_not_turned(tmp_path):
    """Some tools state the size of the file and draw upon the upright picture; then no picture of theirs is turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [{"id": n, "file_name": f"{n}.png", "width": 48, "height": 36} for n in range(2)]
    notes = [{"id": n + 1, "image_id": n, "category_id": 3, "bbox": [2, 25 - 20 * n, 20, 20]} for n in range(2)]
    root = coco(tmp_path / "set", images=images, annotations=notes)
    for n in range(2):
        Image.fromarray(np.full((36, 48, 3), 9 * n, np.uint8)).save(root / f"{n}.png", exif=exif)
    index = read_coco.read(root, How()).index
    objects, problems = audit_objects(replace(index, sizes=np.array([[36, 48]] * 2, np.int32)))
    assert (
        objects.boxes.tolist() == [[2, 25, 22, 45], [2, 5, 22, 25]] and [p.kind for p in problems] == ["other_size"] * 2
    )
    (root / "annotations.json").write_text(
        json.dumps({**json.loads((root / "annotations.json").read_text()), "annotations": notes[1:]})
    )
    index = read_coco.read(root, How()).index
    objects, problems = audit_objects(replace(index, sizes=np.array([[36, 48]] * 2, np.int32)))
    assert objects.boxes.tolist() == [[11, 2, 31, 22]] and [p.kind for p in problems] == ["turned"]


def test_a_map_of_many_objects_is_no_mask_of_one(tmp_path):
    for n in range(2):
        picture(tmp_path / f"s{n}" / "images" / "x.png", 24)
        (tmp_path / f"s{n}" / "masks").mkdir()
        cells = np.zeros((24, 24), np.uint8 if n else np.uint16)
        cells[3:9, 4:8], cells[12:16, 4:8], cells[12:16, 14:18] = 1, 2, 3
        Image.fromarray(cells).save(tmp_path / f"s{n}" / "masks" / "m.png")
    objects, problems = audit_objects(sized(read_masks.read(tmp_path, How()).index))
    assert not objects.kept.any() and all(
        "map of as many objects" in p.message and "1 to 3" in p.message for p in problems
    )
    smooth = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for n in range(2):
        Image.fromarray(smooth).resize((24, 24), Image.Resampling.NEAREST).save(tmp_path / f"s{n}" / "masks" / "m.png")
    assert audit_objects(sized(read_masks.read(tmp_path, How()).index))[0].kept.all()


def test_folders_of_pictures_and_of_their_masks_are_no_classes(tmp_path):
    for folder in ("images", "masks"):
        for n in range(6):
            noise(tmp_path / "flat" / folder / f"{n}.png", n)
            noise(tmp_path / "split" / "train" / folder / f"{n}.png", n)
            noise(tmp_path / "split" / "val" / folder / f"{n}.png", n + 9)
    with pytest.raises(DataError, match="images and masks are no classes") as caught:
        audited(tmp_path / "flat")
    assert "ID/masks/" in caught.value.next
    with pytest.raises(DataError, match="No image was found in any folder images"):
        audited(tmp_path / "split")


def test_labelimg_beside_images_is_pascal_voc(tmp_path):
    root = voc(tmp_path / "set", {"a": [("cat", "1 2 10 12")], "b": [("cat", "1 2 10 12")]})
    (root / "JPEGImages").rename(root / "images")
    (root / "Annotations").rename(root / "labels")
    assert read_dataset(root, How()).format == "voc"


# cameras that do not move


def film(root, *, moves, splits=("train", "val"), num=6):
    """Pictures of one scene, nearly equal, with an object that lies elsewhere in each, or not; the last ones in the other split."""
    scene = np.kron(np.random.default_rng(0).integers(40, 215, (15, 20, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    for n in range(num):
        pixels = scene.astype(np.int16) + np.random.default_rng(n).integers(-2, 3, scene.shape)
        x = 20 + (45 * n if moves else 0)
        pixels[100:106, x : x + 6] = 255
        folder = root / splits[n >= num - 2]
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / "images" / f"{n}.png")
        (folder / "labels" / f"{n}.txt").write_text(
            f"0 {(x + 3) / 320:.6f} {103 / 240:.6f} {6 / 320:.6f} {6 / 240:.6f}\n"
        )
    for n in range(8):  # others, so that no split is empty
        folder = root / splits[n % 2]
        noise(folder / "images" / f"n{n}.png", 100 + n, (320, 240))
        (folder / "labels" / f"n{n}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    return root


def left_out(found):
    return int((found.index.splits == LEFT_OUT).sum())


def test_pictures_of_one_scene_with_objects_elsewhere_are_no_twins(tmp_path):
    still = audited(film(tmp_path / "still", moves=False))
    assert left_out(still) == 4 and {"leak"} <= {f.kind for f in still.audit.findings}
    (leak,) = [f for f in still.audit.findings if f.kind == "leak"]
    assert "(4 in all)" in leak.action
    moving = audited(film(tmp_path / "moving", moves=True))
    assert left_out(moving) == 0 and "leak" not in {f.kind for f in moving.audit.findings}
    kept = audited(tmp_path / "still", twins="keep")
    assert left_out(kept) == 0 and [f.severity for f in kept.audit.findings if f.kind == "duplicate_near"] == ["info"]
    assert sum(split_counts(kept)) == sum(split_counts(moving))


def test_every_copy_of_a_picture_in_validation_leaves_training(tmp_path):
    """Twenty of them are like each other rather than like it, so that few are proposed together with it."""
    random = np.random.default_rng(3)
    scene = np.kron(random.integers(40, 215, (15, 20, 3)), np.ones((16, 16, 1)))
    for n in range(21):
        pixels = np.clip(
            scene * (1.0 if n == 20 else 0.93 + 0.006 * n) + random.integers(-2, 3, scene.shape), 0, 255
        ).astype(np.uint8)
        folder = tmp_path / ("val" if n == 20 else "train")
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "images" / f"{n}.jpg", quality=80 + n % 4)
        (folder / "labels" / f"{n}.txt").write_text("0 0.5 0.5 0.4 0.4\n" if n % 5 else "")  # some without their label
    for n in range(8):
        folder = tmp_path / ("train", "val")[n % 2]
        noise(folder / "images" / f"n{n}.png", 100 + n, (320, 240))
        (folder / "labels" / f"n{n}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    found = audited(tmp_path)
    names = [found.index.paths[row] for row in np.flatnonzero(found.index.splits == LEFT_OUT)]
    assert len(names) == 20 and all(name.startswith("train/") and "/n" not in name for name in names)
