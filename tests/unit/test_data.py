"""Reading, audit, split, subset and order: deterministic, and never a file changed."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from goodfit.core.errors import DataError
from goodfit.data.audit import audit_dataset
from goodfit.data.augment import PRESETS, crop_boxes, cut, flips
from goodfit.data.index import SPLITS, data_hash, read_split, write_split
from goodfit.data.loader import TrainLoader, TrainSamples, epoch_order
from goodfit.data.readers import Columns, read_dataset
from goodfit.data.split import SealedTest, split_dataset, subset
from goodfit.data.store import PictureStore
from goodfit.runtime.images import Preprocessing
from goodfit.tasks.classify import ClassifyTask
from pictures import draw, folder_hash

PREPROCESSING = Preprocessing(size=16, resize=16, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)


def prepare(root, **more):
    reading = read_dataset(root)
    audit = audit_dataset(reading, max_bad=more.pop("max_bad", 0.01))
    index = split_dataset(audit.index, shares="70/15/15", split_seed=more.pop("split_seed", 0),
                          given=reading.given_splits)  # fmt: skip
    return reading, audit, index


def kinds(audit):
    return {f.kind: f for f in audit.findings}


def test_class_folders(make_images):
    before = folder_hash(root := make_images(20))
    reading, audit, index = prepare(root)
    assert index.class_names == ("class0", "class1", "class2") and audit.findings == ()
    assert [len(index.rows(s)) for s in SPLITS] == [42, 9, 9]
    for split in SPLITS:
        assert set(np.bincount(index.targets[index.rows(split)])) in ({14}, {3})
    assert reading.note == "one folder per class" and folder_hash(root) == before


def test_the_split_depends_on_content_and_seed_not_on_names(make_images, tmp_path):
    root = make_images(20)
    _, _, index = prepare(root)
    _, _, other = prepare(root, split_seed=1)
    for path in sorted(root.rglob("*.png")):
        path.rename(path.with_name(f"renamed-{hash(path.name) % 97}-{path.name}"))
    _, _, renamed = prepare(root)
    for split in SPLITS:
        assert data_hash(index, split) == data_hash(renamed, split)
    assert data_hash(index, "test") != data_hash(other, "test")


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "valid", "testing"), ("train", "test"), ("train", "dev")]
)
def test_given_splits(make_images, tmp_path, names):
    start = 0
    for name in names:
        make_images(12, name=f"data/{name}", start=start)
        start += 100
    reading, _, index = prepare(tmp_path / "data")
    assert all(len(index.rows(s)) > 0 for s in SPLITS)
    for row, path in enumerate(index.paths):
        split = SPLITS[index.splits[row]]
        given = {"train": "train", "val": "val", "test": "test", "Training": "train", "valid": "val",
                 "testing": "test", "dev": "val"}[path.split("/")[0]]  # fmt: skip
        assert split == given or (given == "train" and split not in reading.given_splits)


def test_csv_with_guessed_and_named_columns(make_images, tmp_path):
    root = make_images(10)
    lines = [f"{p.relative_to(tmp_path)};{p.parent.name};{i % 7}" for i, p in enumerate(sorted(root.rglob("*.png")))]
    (tmp_path / "list.csv").write_text("﻿file;class;who\n" + "\n".join(lines) + "\nmissing.png;class0;1\n")
    reading = read_dataset(tmp_path / "list.csv", columns=Columns(group="who"))
    assert len(reading.index) == 30 and reading.missing_images == ("missing.png",)
    index = split_dataset(audit_dataset(reading, max_bad=0.05).index, shares="50/25/25", split_seed=0, given=())
    for group in range(7):
        places = {int(index.splits[r]) for r in np.flatnonzero(reading.index.groups == group)}
        assert len(places) == 1, "a group straddles splits"
    (tmp_path / "odd.csv").write_text("a,b\nx.png,1\n")
    with pytest.raises(DataError, match="image_column") as caught:
        read_dataset(tmp_path / "odd.csv")
    assert "image_column=COLUMN" in caught.value.next


def test_bad_files_are_found_and_left_out(make_images):
    root = make_images(200, classes=2)
    good = (root / "class0" / "000.png").read_bytes()
    (root / "class0" / "zero.png").write_bytes(b"")
    (root / "class0" / "cut.png").write_bytes(good[: len(good) // 2])
    (root / "class1" / "page.jpg").write_text("<html>")
    (root / "class1" / "notes.txt").write_text("hello")
    (root / "class1" / "really.jpg").write_bytes((root / "class1" / "001.png").read_bytes())
    before = folder_hash(root)
    _, audit, index = prepare(root)
    found = [(f.kind, f.count, f.severity) for f in audit.findings]
    for expected in [("unreadable", 1, "warning"), ("truncated", 1, "warning"), ("wrong_type", 1, "warning"),
                     ("wrong_type", 1, "info"), ("duplicate_exact", 1, "info")]:  # fmt: skip
        assert expected in found, found
    accepted = {p for p, s in zip(index.paths, index.splits, strict=True) if s >= 0}
    assert not accepted & {"class0/zero.png", "class0/cut.png", "class1/page.jpg"} and "class1/really.jpg" in accepted
    assert folder_hash(root) == before


def test_too_many_bad_files_stop_the_run(make_images):
    root = make_images(50, classes=2)
    for number in range(5):
        (root / "class0" / f"bad{number}.png").write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        prepare(root)
    assert caught.value.exit_code == 3 and "5 of 105" in str(caught.value) and "max_bad=0.05" in caught.value.next
    prepare(root, max_bad=0.05)


def test_duplicates_stay_together_and_conflicts_are_left_out(make_images):
    root = make_images(40)
    pairs = []
    for number in range(6):
        pairs.append((f"class0/{number:03d}.png", f"class0/copy{number}.png"))
        shutil.copy(root / pairs[-1][0], root / pairs[-1][1])
    Image.open(root / "class1" / "000.png").save(root / "class1" / "again.bmp")  # other bytes, same pixels
    pairs.append(("class1/000.png", "class1/again.bmp"))
    shutil.copy(root / "class2" / "000.png", root / "class0" / "wrong.png")
    _, audit, index = prepare(root, max_bad=0.05)
    assert kinds(audit)["duplicate_exact"].count == 7 and kinds(audit)["label_conflict"].count == 2
    place = dict(zip(index.paths, index.splits, strict=True))
    assert all(place[a] == place[b] >= 0 for a, b in pairs)
    assert place["class2/000.png"] < 0 and place["class0/wrong.png"] < 0


def test_leaks_across_given_splits_leave_the_training_split(make_images, tmp_path):
    make_images(20, name="data/train")
    make_images(10, name="data/val", start=100)
    make_images(10, name="data/test", start=200)
    shutil.copy(tmp_path / "data/test/class0/200.png", tmp_path / "data/train/class0/leak.png")
    shutil.copy(tmp_path / "data/val/class1/100.png", tmp_path / "data/train/class1/leak.png")
    _, audit, index = prepare(tmp_path / "data")
    assert kinds(audit)["leak"].count == 2
    place = dict(zip(index.paths, index.splits, strict=True))
    assert (place["train/class0/leak.png"], place["test/class0/200.png"]) == (-2, 2)
    assert (place["train/class1/leak.png"], place["val/class1/100.png"]) == (-2, 1)


def test_a_class_too_small_to_split_is_left_out(make_images):
    root = make_images(20)
    (root / "rare").mkdir()
    for number in range(2):
        draw(9000 + number, 2).save(root / "rare" / f"{number}.png")
    _, audit, index = prepare(root)
    assert kinds(audit)["too_few"].count == 1 and index.class_names == ("class0", "class1", "class2")
    assert set(index.targets[index.splits >= 0]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("build", "words"),
    [(lambda r: None, "no such file"), (lambda r: r.mkdir(), "empty"),
     (lambda r: (r / "a").mkdir(parents=True), "No images"),
     (lambda r: (r.mkdir(), draw(0, 0).save(r / "x.png")), "no class folders"),
     (lambda r: ((r / "a").mkdir(parents=True), draw(0, 0).save(r / "a" / "x.png")), "one class only")],
)  # fmt: skip
def test_folders_that_cannot_be_used(tmp_path, build, words):
    build(tmp_path / "d")
    with pytest.raises(DataError, match=words) as caught:
        read_dataset(tmp_path / "d")
    assert caught.value.next and caught.value.exit_code == 3


def test_one_level_too_high_is_explained(make_images, tmp_path):
    make_images(3, name="outer/inner")
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path / "outer")
    assert "inner" in caught.value.next


def test_a_fifo_is_not_waited_for(make_images):
    import os

    root = make_images(5)
    os.mkfifo(root / "class0" / "pipe.png")
    (root / "class0" / "loop").symlink_to(root / "class0")
    assert len(read_dataset(root).index) == 15


def test_subsets_are_nested_stratified_and_keep_every_class(make_images):
    _, _, index = prepare(make_images(30))
    rows = {f: set(subset(index, f, 0)) for f in (0.01, 0.1, 0.5, 1.0)}
    assert rows[0.01] < rows[0.1] < rows[0.5] < rows[1.0] == set(index.rows("train"))
    for chosen in rows.values():
        assert set(index.targets[list(chosen)]) == {0, 1, 2}


def test_split_csv_round_trip_and_the_seal(make_images, tmp_path):
    _, _, index = prepare(make_images(20))
    (tmp_path / "split.csv").write_text(write_split(index))
    again = read_split(tmp_path / "split.csv", index.root)
    assert again.paths == index.paths and np.array_equal(again.splits, index.splits)
    assert np.array_equal(again.targets, index.targets) and data_hash(again) == data_hash(index)
    sealed = SealedTest.seal(index)
    assert np.array_equal(sealed.open(again), index.rows("test"))
    moved = index.splits.copy()
    moved[index.rows("test")[0]] = 0
    with pytest.raises(DataError, match="sealed"):
        sealed.open(index.with_splits(moved))


def loader(index, workers=0, batch=8, cache="ram"):
    samples = TrainSamples(index=index, store=PictureStore(index, imgsz=16, cache=cache), preset=PRESETS["standard"],
                           preprocessing=PREPROCESSING, flip=0.5, seed=3,
                           collate=ClassifyTask(index.class_names).collate)  # fmt: skip
    return TrainLoader(samples, index.rows("train"), batch=batch, workers=workers)


def flat(groups):
    micros = [m for g in groups for m in g]
    return np.concatenate([m.samples for m in micros]), np.concatenate([m.data["image"].numpy() for m in micros])


def test_batches_are_the_same_with_workers_from_any_position_and_without_a_cache(make_images):
    _, _, index = prepare(make_images(20))
    ids, pixels = flat(loader(index).groups(2, 0, 1))
    for other in (loader(index, workers=2), loader(index, cache="off")):
        other_ids, other_pixels = flat(other.groups(2, 0, 1))
        assert np.array_equal(ids, other_ids) and np.array_equal(pixels, other_pixels)
    late_ids, late_pixels = flat(loader(index).groups(2, 16, 4))
    assert np.array_equal(ids[16:], late_ids) and np.array_equal(pixels[16:], late_pixels)
    assert not np.array_equal(pixels, flat(loader(index).groups(3, 0, 1))[1])


def test_every_process_takes_its_slice():
    rows = np.arange(100, 164)
    order = epoch_order(rows, seed=1, epoch=4)
    assert sorted(order) == list(rows)
    parts = [order[0:8][rank::3] for rank in range(3)]
    assert sorted(np.concatenate(parts)) == sorted(order[:8])


def test_augmentation_is_a_function_of_its_key():
    sizes = np.tile([60, 40], (32, 1))
    keys = {"seed": 1, "epoch": 2, "samples": np.arange(32)}
    for name in ("light", "standard"):
        boxes = crop_boxes(PRESETS[name], **keys, sizes=sizes, size=16, resize=16)
        part = crop_boxes(
            PRESETS[name], seed=1, epoch=2, samples=np.arange(32)[5:9], sizes=sizes[5:9], size=16, resize=16
        )
        assert np.array_equal(boxes[5:9], part) and len(np.unique(boxes[:, 0])) > 16
    inside = crop_boxes(PRESETS["standard"], **keys, sizes=sizes, size=16, resize=16)
    assert (inside[:, :2] >= 0).all() and (inside[:, 2] <= 60.001).all() and (inside[:, 3] <= 40.001).all()
    assert 0.3 < flips(0.5, seed=0, epoch=0, samples=np.arange(2000)).mean() < 0.7
    off = crop_boxes(PRESETS["off"], **keys, sizes=sizes, size=16, resize=16)
    assert (off == [10, 0, 50, 40]).all()


def test_cut_repeats_the_edge():
    picture = np.zeros((20, 20, 3), np.uint8)
    picture[:, :10] = 200
    made = cut(picture, np.array([-10.0, 0.0, 10.0, 20.0]), 20)
    assert made.shape == (3, 20, 20) and (made[:, :, :18] == 200).all()
