"""What the audit finds on real and made data, what it does about it, and what it leaves alone."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import goodfit
from goodfit.core.errors import DataError
from goodfit.data.checks.audit import audit_dataset
from goodfit.data.checks.twins import components
from goodfit.data.formats.readers import read_dataset
from goodfit.data.index import LEFT_OUT, NO_GROUP, SPLITS
from goodfit.data.reading import How
from goodfit.data.split import check_splits, split_dataset
from pictures import draw, folder_hash


def audited(root, how=None, max_bad=0.01):
    reading = read_dataset(root, how)
    audit = audit_dataset(reading, max_bad=max_bad)
    index = split_dataset(audit.index, shares="70/15/15", split_seed=0, given=reading.given_splits)
    return audit, index, {f.kind: f for f in audit.findings}


def scene(seed, size=(160, 120)):
    """A picture with enough detail to be known again."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    made = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(made).astype(int)
    for _ in range(6):
        x, y = random.integers(0, size[0] - 30), random.integers(0, size[1] - 30)
        pixels[y : y + 20, x : x + 25] = random.integers(0, 256, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def test_trashnet_label_conflicts(real_data):
    root = real_data / "classify/trashnet/dataset-resized"
    before = folder_hash(root)
    audit, index, found = audited(root)
    conflict = found["label_conflict"]
    said = " ".join(conflict.items)
    assert conflict.count == 6 and len(conflict.items) == 3
    assert all(name in said for name in ("glass115", "metal91", "glass176", "plastic152", "glass389", "plastic332"))
    check_splits(index)
    assert audit.scan.seconds > 0 and folder_hash(root) == before


@pytest.mark.parametrize(
    ("folder", "task", "rows", "expected"),
    [
        ("detect/bccd_voc", "detect", 364, {"bad_box": 2, "leak": 2, "imbalance": 4843}),
        ("segment/coco128/object_detection", "detect", 256, {"missing_label": 2, "missing_image": 2}),
        ("segment/nuclei_dsb2018", "segment", 150, {}),
        ("text/trec", "text", 5952, {"leak": 11, "label_conflict": 2}),
        ("text/sms_spam", "text", 5574, {"imbalance": 5574}),
        ("text/tinyshakespeare", "language", 274, {}),
    ],
)
def test_real_datasets_with_no_option_but_the_path(real_data, folder, task, rows, expected):
    before = folder_hash(real_data / folder)
    _, index, found = audited(real_data / folder)
    assert index.task == task and len(index) == rows
    assert {kind: found[kind].count for kind in expected} == expected
    for split in SPLITS:
        assert len(index.rows(split)) > 0
    groups = index.groups[index.splits != LEFT_OUT]
    for group in np.unique(groups[groups != NO_GROUP]):
        places = {int(s) for s in index.splits[index.groups == group] if s != LEFT_OUT}
        assert len(places) == 1, "twins in two splits"
    assert folder_hash(real_data / folder) == before


def test_doubtful_data_asks(real_data):
    root = real_data / "segment/coco128"
    with pytest.raises(DataError) as several:
        read_dataset(root)
    assert "object_detection (yolo)" in str(several.value)
    with pytest.raises(DataError) as doubtful:
        read_dataset(root / "annotations_derived")
    assert "annotations=" in doubtful.value.next
    reading = read_dataset(root / "annotations_derived", How(annotations="instances"))
    assert reading.index.task == "segment" and len(reading.index) == 200


def test_two_formats_at_once_ask(make_images, tmp_path):
    make_images(5, name="images")
    (tmp_path / "labels").mkdir()
    lines = [f"{p.relative_to(tmp_path)},{p.parent.name}x" for p in sorted((tmp_path / "images").rglob("*.png"))]
    (tmp_path / "list.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    boxes = {"images": [{"id": 1, "file_name": "class0/000.png", "width": 24, "height": 24}],
             "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}],
             "categories": [{"id": 1, "name": "bar"}]}  # fmt: skip
    (tmp_path / "annotations.json").write_text(json.dumps(boxes))
    shutil.rmtree(tmp_path / "labels")
    with pytest.raises(DataError, match="could be read in 2 ways") as caught:
        read_dataset(tmp_path)
    assert "format=coco" in caught.value.next and "format=table" in caught.value.next
    assert read_dataset(tmp_path, How(format="table")).index.task == "classify"


def test_near_twins_are_kept_together_and_leaks_leave_train(tmp_path):
    for split, start in (("train", 0), ("val", 100), ("test", 200)):
        for kind in range(2):
            folder = tmp_path / "d" / split / f"class{kind}"
            folder.mkdir(parents=True)
            for number in range(30):
                scene(1000 * kind + start + number).save(folder / f"{number:03d}.png")
    data = tmp_path / "d"
    cropped = scene(200).crop((3, 2, 156, 117)).resize((150, 115))
    cropped.save(data / "train/class0/leak.jpg", quality=80)  # of test
    scene(1000).resize((140, 105)).save(data / "train/class1/twin.jpg", quality=85)  # of train
    audit, index, found = audited(data)
    assert found["leak"].count == 1 and "leak.jpg" in found["leak"].items[0]
    assert found["duplicate_near"].count == 1 and "twin.jpg" in found["duplicate_near"].items[0]
    place = dict(zip(index.paths, index.splits.tolist(), strict=True))
    assert place["train/class0/leak.jpg"] == LEFT_OUT and place["test/class0/000.png"] == 2
    assert index.groups[list(index.paths).index("train/class1/twin.jpg")] != NO_GROUP
    assert len(audit.index) == 182


def test_components_join_groups_and_links():
    groups = np.array([0, 0, -1, -1, 7, 7, -1, -1])
    links = np.array([[1, 2], [3, 4]])
    made = components(8, groups, links)
    assert made[0] == made[1] == made[2] != NO_GROUP and made[3] == made[4] == made[5] != made[0]
    assert made[6] == made[7] == NO_GROUP
    chain = np.stack([np.arange(999), np.arange(1, 1000)], axis=1)[::-1]
    assert len(np.unique(components(1000, np.full(1000, NO_GROUP), chain))) == 1


def test_outliers_shortcuts_and_modes_are_said(tmp_path):
    """Class 1 is saved as BMP, mostly: the format gives it away. One picture is huge, one is in another mode."""
    for kind in range(2):
        folder = tmp_path / "d" / f"class{kind}"
        folder.mkdir(parents=True)
        for number in range(120):
            suffix = "bmp" if kind and number < 110 else "png"
            draw(1000 * kind + number, number % 3, size=40).save(folder / f"{number:03d}.{suffix}")
    draw(1, 1, size=40).resize((900, 700)).save(tmp_path / "d/class0/large.png")
    draw(2, 1, size=40).convert("L").save(tmp_path / "d/class0/grey.png")
    _, _, found = audited(tmp_path / "d")
    assert any("file format" in item for item in found["shortcut"].items)
    said = " ".join(found["size_outlier"].items)
    assert "large.png" in said and "grey.png: colour mode L" in said


def test_no_shortcut_where_there_is_none(make_images):
    _, _, found = audited(make_images(60))
    assert "shortcut" not in found and "size_outlier" not in found


def test_given_splits_that_differ_and_production_samples(tmp_path):
    from goodfit.data.checks.patterns import folder_shift

    random = np.random.default_rng(0)
    for split, dark in (("train", 0), ("val", 90)):
        for kind in range(2):
            folder = tmp_path / "d" / split / f"class{kind}"
            folder.mkdir(parents=True)
            for number in range(60):
                pixels = np.asarray(scene(int(random.integers(1 << 30)))).astype(int) - dark
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    audit, _, found = audited(tmp_path / "d")
    assert any(item.startswith("brightness of train and val") for item in found["shift"].items)
    like = folder_shift(audit.index, audit.scan, tmp_path / "d/val/class0")
    assert like and like[0].kind == "shift"
    with pytest.raises(DataError, match="like="):
        folder_shift(audit.index, audit.scan, tmp_path / "nothing")


def test_a_split_without_a_class_is_refused_and_can_be_made_anew(make_images, tmp_path):
    make_images(20, name="d/train")
    make_images(6, classes=2, name="d/test", start=100)
    _, index, _ = audited(tmp_path / "d")
    with pytest.raises(DataError, match="class2") as caught:
        check_splits(index)
    assert "resplit=true" in caught.value.next
    _, index, _ = audited(tmp_path / "d", How(resplit=True))
    check_splits(index)


def test_wrong_labels_are_found_fixed_by_a_list_and_not_named_again(make_images, tmp_path):
    """Through the command: two pictures in the wrong folder; the list moves one in the index and keeps the other."""
    root = make_images(60, name="bars.v2")
    for number in (500, 501):
        draw(number, 0).save(root / "class1" / f"wrong{number}.png")
    before = folder_hash(root)
    runs = str(tmp_path / "runs")
    first = goodfit.audit(root, project=runs)
    assert (tmp_path / "runs/bars.v2-audit-1/audit.json").is_file(), "the name keeps its dots"
    (finding,) = [f for f in first["findings"] if f["kind"] == "label_suspect"]
    named = {item.split(": ")[0] for item in finding["items"]}
    wrong = {"class1/wrong500.png", "class1/wrong501.png"}
    assert wrong <= {item.split(": ")[0] for item in finding["items"][:4]} and "wrong500.png" in (
        tmp_path / "runs/bars.v2-audit-1/audit.html"
    ).read_text("utf-8")
    (tmp_path / "fixes.csv").write_text(
        "path,label,action\nclass1/wrong500.png,class0,relabel\nclass1/wrong501.png,,keep\n"
    )
    second = goodfit.audit(root, project=runs, labels=str(tmp_path / "fixes.csv"))
    later = {i.split(": ")[0] for f in second["findings"] if f["kind"] == "label_suspect" for i in f["items"]}
    assert wrong <= named and not wrong & later
    counts = [sum(c) for c in zip(*second["data"]["class_counts"].values(), strict=True)]
    assert counts == [61, 61, 60] and folder_hash(root) == before
