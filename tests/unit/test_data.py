"""Reading, audit, split, subset and order: deterministic, and never a file changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from goodfit.core.errors import DataError, StorageError
from goodfit.data.augment import PRESETS, crop, fit_into, mirror_into, place
from goodfit.data.checks.audit import audit_dataset
from goodfit.data.formats.readers import read_dataset
from goodfit.data.index import SPLITS, data_hash, read_split, write_split
from goodfit.data.loader import TrainLoader, TrainSamples, epoch_order, row_of
from goodfit.data.policy import apply_operations, draw_operations, move_points
from goodfit.data.reading import How
from goodfit.data.split import SealedTest, split_dataset, subset
from goodfit.data.store import PictureStore, reduced_sizes
from goodfit.runtime.images import Preprocessing, decode_image
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
    reading = read_dataset(tmp_path / "list.csv", How(group="who"))
    assert len(reading.index) == 30 and [(p.kind, p.lost) for p in reading.problems] == [("missing_image", True)]
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
    assert sorted(found) == [("duplicate_exact", 1, "info"), ("truncated", 1, "warning"), ("unreadable", 1, "warning"),
                             ("wrong_type", 3, "warning")]  # fmt: skip
    assert "1 left out" in kinds(audit)["wrong_type"].action and "kept" in kinds(audit)["wrong_type"].action
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
    assert np.array_equal(again.sizes, index.sizes) and np.array_equal(again.groups, index.groups)
    sealed = SealedTest.seal(index)
    assert np.array_equal(sealed.open(again), index.rows("test"))
    moved = index.splits.copy()
    moved[index.rows("test")[0]] = 0
    with pytest.raises(DataError, match="sealed"):
        sealed.open(index.with_splits(moved))


def loader(index, workers=0, batch=8, cache="ram", threads=1, preset="strong"):
    rows = index.rows("train")
    store = PictureStore(index, rows, imgsz=16, cache=cache)
    store.warm(2)
    samples = TrainSamples(index=index, store=store, preset=PRESETS[preset], preprocessing=PREPROCESSING, flip=0.5, seed=3,
                           collate=ClassifyTask(index.class_names).collate)  # fmt: skip
    return TrainLoader(samples, rows, batch=batch, workers=workers, threads=threads)


def flat(groups):
    micros = [m for g in groups for m in g]
    return np.concatenate([m.samples for m in micros]), np.concatenate([m.data["image"].numpy() for m in micros])


@pytest.mark.parametrize("preset", ["standard", "strong"])
def test_batches_are_the_same_whatever_makes_them(make_images, tmp_path, monkeypatch, preset):
    """With workers, with threads, from any position, and from every kind of cache."""
    monkeypatch.setenv("GOODFIT_CACHE_DIR", str(tmp_path / "cache"))
    _, _, index = prepare(make_images(20))
    ids, pixels = flat(loader(index, preset=preset).groups(2, 0, 1))
    others = (loader(index, workers=2, preset=preset), loader(index, cache="off", preset=preset),
              loader(index, threads=3, preset=preset), loader(index, cache="disk", preset=preset),
              loader(index, cache="disk", workers=2, preset=preset))  # fmt: skip
    for other in others:
        other_ids, other_pixels = flat(other.groups(2, 0, 1))
        assert np.array_equal(ids, other_ids) and np.array_equal(pixels, other_pixels)
    late_ids, late_pixels = flat(loader(index, preset=preset).groups(2, 16, 4))
    assert np.array_equal(ids[16:], late_ids) and np.array_equal(pixels[16:], late_pixels)
    assert not np.array_equal(pixels, flat(loader(index, preset=preset).groups(3, 0, 1))[1])
    assert not np.array_equal(pixels, flat(loader(index, preset=preset).groups(2, 0, 1, closing=True))[1])
    assert len(list((tmp_path / "cache").iterdir())) == 1, "one file, and no temporary ones"


def test_every_process_takes_its_slice():
    rows = np.arange(100, 164)
    order = epoch_order(rows, seed=1, epoch=4)
    assert sorted(order) == list(rows)
    parts = [order[0:8][rank::3] for rank in range(3)]
    assert sorted(np.concatenate(parts)) == sorted(order[:8])


def test_augmentation_is_a_function_of_its_key():
    sizes = np.tile([60, 40], (32, 1))
    keys = {"seed": 1, "epoch": 2, "size": 16, "share": 1.0, "flip": 0.5}
    for name in ("light", "standard", "strong"):
        whole = place(PRESETS[name], samples=np.arange(32), sizes=sizes, **keys)
        part = place(PRESETS[name], samples=np.arange(32)[5:9], sizes=sizes[5:9], **keys)
        assert np.array_equal(whole.boxes[5:9], part.boxes) and np.array_equal(whole.mirrored[5:9], part.mirrored)
        assert len(np.unique(whole.boxes, axis=0)) > 16
    inside = place(PRESETS["standard"], samples=np.arange(32), sizes=sizes, **keys).boxes
    assert (inside[:, :2] >= 0).all() and (inside[:, 2] <= 60).all() and (inside[:, 3] <= 40).all()
    many = place(PRESETS["off"], samples=np.arange(2000), sizes=np.tile([60, 40], (2000, 1)), **keys)
    assert 0.4 < many.mirrored.mean() < 0.6 and (many.boxes == [10, 0, 50, 40]).all()


def as_batch(picture, box, size, mirrored=False):
    made = np.zeros((1, size, size, 3), np.uint8)
    out = torch.from_numpy(made).permute(0, 3, 1, 2)
    fit_into(crop(picture, [int(edge) for edge in box]), out)
    if mirrored:
        mirror_into(out.clone(), out)
    return made[0]


def test_cut_repeats_the_edge():
    picture = np.zeros((20, 20, 3), np.uint8)
    picture[:, :10] = 200
    assert (as_batch(picture, [-10, 0, 10, 20], 20)[:, :18] == 200).all()


def test_cut_resizes_as_pillow_does():
    picture = np.array(draw(3, 1, size=90))
    made = as_batch(picture, [10, 20, 80, 74], 32).astype(int)
    expected = np.asarray(Image.fromarray(picture[20:74, 10:80]).resize((32, 32), Image.Resampling.BILINEAR)).astype(
        int
    )
    assert np.abs(made - expected).max() <= 1
    for box in ([10, 20, 80, 74], [10, 20, 42, 52]):  # with and without a change of scale
        assert np.array_equal(as_batch(picture, box, 32, True), as_batch(picture, box, 32)[:, ::-1])


@pytest.mark.parametrize("seed", range(4))
def test_boxes_move_with_the_pixels(seed):
    """A bright rectangle is where its box says, after crop, flip and every geometric operation."""
    size, box = 96, np.array([[70.0, 50.0, 110.0, 80.0]])
    picture = np.zeros((120, 160, 3), np.uint8)
    picture[50:80, 70:110] = 255
    placed = place(PRESETS["standard"], seed=seed, epoch=0, samples=np.arange(8), sizes=np.tile([160, 120], (8, 1)),
                   size=size, share=1.0, flip=0.5)  # fmt: skip
    assert 0 < placed.mirrored.sum() < 8
    operations = draw_operations("rand", seed=seed, epoch=0, samples=np.arange(8))
    for k in range(8):
        pixels = as_batch(picture, placed.boxes[k], size, bool(placed.mirrored[k]))
        left, top, right, bottom = placed.objects(k, box)[0]
        assert left < right and top < bottom
        corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
        geometric = [o for o in operations[k] if "_" in o.name or o.name == "rotate"][:1]
        apply_operations(geometric, pixels)
        outline = Image.new("L", (size, size))
        ImageDraw.Draw(outline).polygon([tuple(p) for p in move_points(geometric, corners, size)], fill=255)
        expected, found = np.asarray(outline) > 127, pixels.min(axis=2) > 180
        either = (expected | found).sum()
        assert either == 0 or (expected & found).sum() / either > 0.75, (k, geometric)


def test_balanced_order_is_even_new_in_every_epoch_and_exact():
    targets = np.repeat([0, 1, 2], [90, 25, 5])
    rows = np.arange(200, 320)
    seen = set()
    for epoch in range(6):
        order = epoch_order(rows, seed=1, epoch=epoch, targets=targets)
        assert np.array_equal(order, epoch_order(rows, seed=1, epoch=epoch, targets=targets)) and len(order) == 120
        assert len(np.unique(order)) == 120, "a copy must be another sample, with an augmentation of its own"
        assert np.bincount(targets[row_of(order) - 200]).tolist() == [40, 40, 40]
        seen |= set((row_of(order) - 200)[targets[row_of(order) - 200] == 0].tolist())
    assert len(seen) == 90, "all of the frequent class are seen within a few epochs"


def test_rows_that_repeat_come_as_often_as_asked_and_an_epoch_keeps_its_length():
    rows = np.arange(10, 50)
    repeats = np.where(rows < 14, 3.5, 1.0)
    seen = np.zeros(60)
    for epoch in range(400):
        order = epoch_order(rows, seed=1, epoch=epoch, repeats=repeats)
        assert np.array_equal(order, epoch_order(rows, seed=1, epoch=epoch, repeats=repeats))
        assert len(order) == 40 and len(np.unique(order)) == 40  # a further copy is another sample
        seen += np.bincount(row_of(order), minlength=60)
    ratio = seen[10:14].mean() / seen[14:50].mean()
    assert ratio == pytest.approx(3.5, rel=0.05)
    plain = epoch_order(rows, seed=1, epoch=0, repeats=np.ones(40))
    assert np.array_equal(np.sort(plain), rows)


def test_disk_cache_is_shared_kept_whole_and_makes_room(make_images, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("GOODFIT_CACHE_DIR", str(folder))
    _, _, index = prepare(make_images(20))
    rows = index.rows("train")
    first = PictureStore(index, rows, imgsz=16, cache="disk")
    assert "to disk" in first.warm(2)
    second = PictureStore(index, rows, imgsz=16, cache="disk")
    assert "earlier run" in second.warm(2) and np.array_equal(first.get(int(rows[3])), second.get(int(rows[3])))
    other = PictureStore(index, rows, imgsz=8, cache="disk")
    assert other.path != first.path
    first.path.write_bytes(first.path.read_bytes()[:-1])  # cut off: not what a finished cache is
    third = PictureStore(index, rows, imgsz=16, cache="disk")
    assert "to disk" in third.warm(2)
    monkeypatch.setattr("goodfit.data.store.free_bytes", lambda _: other.num_bytes // 2)
    with pytest.raises(StorageError, match="free"):
        other.warm(1)
    assert not list(folder.glob(".tmp*"))


def test_what_killed_writers_of_a_cache_left_is_deleted(make_images, tmp_path, monkeypatch):
    """Of a process that is gone, after an hour without a touch; that of another machine may still grow, and so may a living one's."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("GOODFIT_CACHE_DIR", str(folder))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    old = time.time() - 7200
    names = {f".tmp-pictures-1-a.bin-{gone.pid}": old, f".tmp-pictures-1-b.bin-{gone.pid}": time.time(),
             f".tmp-pictures-1-c.bin-{os.getpid()}": old}  # fmt: skip
    for name, when in names.items():
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (when, when))
    _, _, index = prepare(make_images(20))
    PictureStore(index, index.rows("train"), imgsz=16, cache="disk").warm(1)
    assert sorted(p.name for p in folder.glob(".tmp*")) == sorted(names)[1:]


def test_runs_inside_the_data_are_none_of_it(tmp_path):
    """`goodfit train .`, and once more: the runs of the first are no class of the second."""
    for kind in ("a", "b"):
        for number in range(3):
            folder = tmp_path / kind
            folder.mkdir(exist_ok=True)
            draw(number, 0, 16).save(folder / f"{number}.png")
    for run, files in {"runs/x-1": ("events.jsonl", "request.yaml"), "runs/x-audit-1": ("audit.json", "audit.html", "split.csv"),
                       "a/x-2": ("events.jsonl", "audit.json")}.items():  # fmt: skip
        (tmp_path / run / "plots").mkdir(parents=True)
        draw(9, 0, 16).save(tmp_path / run / "plots" / "loss.png")
        for name in files:
            (tmp_path / run / name).write_text("{}")
    found = read_dataset(tmp_path, How())
    assert found.index.class_names == ("a", "b") and len(found.index) == 6
    (tmp_path / "runs" / "mine").mkdir()
    draw(9, 0, 16).save(tmp_path / "runs" / "mine" / "one.png")  # a person's own, beside runs
    assert read_dataset(tmp_path, How()).index.class_names == ("a", "b", "runs")


def test_a_broken_file_leaves_no_half_cache(make_images, tmp_path, monkeypatch):
    monkeypatch.setenv("GOODFIT_CACHE_DIR", str(tmp_path / "cache"))
    _, _, index = prepare(make_images(20))
    rows = index.rows("train")
    index.file(int(rows[5])).write_bytes(b"gone")
    with pytest.raises(DataError):
        PictureStore(index, rows, imgsz=16, cache="disk").warm(2)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_costs_no_detail(real_data):
    """A crop from the reduced picture is as near to that from the original as two usual filters are to each other."""
    file = sorted((real_data / "classify/trashnet/dataset-resized/glass").glob("*.jpg"))[3]
    whole = np.array(decode_image(file))
    height, width = whole.shape[:2]
    ((w, h),) = reduced_sizes(np.array([[width, height]]), 240).tolist()
    small = np.array(Image.fromarray(whole).resize((w, h), Image.Resampling.BICUBIC))
    box = np.array([64, 64, 384, 320])
    direct, cached = as_batch(whole, box, 160).astype(float), as_batch(small, box * w // width, 160).astype(float)
    other = np.asarray(Image.fromarray(whole).resize((160, 160), Image.Resampling.BICUBIC, box=tuple(box))).astype(
        float
    )
    assert np.abs(direct - cached).mean() < np.abs(direct - other).mean() + 1.0
