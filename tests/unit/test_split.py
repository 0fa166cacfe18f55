"""Splits and subsets: whole groups, every class everywhere, and an order that comes from content and seed alone."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from goodfit.core.errors import DataError
from goodfit.core.safeio import write_text
from goodfit.data.columns import Blobs, Objects, Strings
from goodfit.data.index import (
    LEFT_OUT,
    NO_GROUP,
    NO_SPLIT,
    SPLITS,
    DatasetIndex,
    class_counts,
    data_hash,
    read_split,
    write_split,
)
from goodfit.data.split import SealedTest, check_splits, split_dataset, subset
from goodfit.data.stratify import fill
from pictures import folder_hash

SEEDS = range(25)


def make(targets, groups=None, splits=None, names=None, seed=0, objects=None, task="classify"):
    """An index with random contents; `objects` is a list of classes for each row."""
    targets = np.asarray(targets, np.int64)
    rows = len(targets)
    names = names or [f"c{c}" for c in range(int(targets.max(initial=0)) + 1)]
    random = np.random.default_rng(seed)
    return DatasetIndex(
        root=Path("data"),
        task=task,
        paths=[f"{r}.jpg" for r in range(rows)],
        targets=targets,
        class_names=tuple(names),
        splits=np.full(rows, NO_SPLIT, np.int8) if splits is None else np.asarray(splits, np.int8),
        groups=np.full(rows, NO_GROUP, np.int64) if groups is None else np.asarray(groups, np.int64),
        contents=random.integers(0, 256, (rows, 16), dtype=np.uint8),
        objects=None if objects is None else make_objects(objects),
    )


def make_objects(classes):
    num = sum(len(c) for c in classes)
    return Objects(
        starts=np.concatenate([[0], np.cumsum([len(c) for c in classes])]).astype(np.int64),
        boxes=np.zeros((num, 4), np.float32),
        classes=np.array([c for part in classes for c in part], np.int32),
        crowd=np.zeros(num, bool),
        kept=np.ones(num, bool),
        masks=Blobs([b""] * num),
        mask_kinds=np.zeros(num, np.uint8),
        files=Strings([""] * len(classes)),
        numbers=np.arange(num),
    )


def make_boxes(objects, num_classes, **more):
    names = [f"c{c}" for c in range(num_classes)]
    return make(np.full(len(objects), -1), objects=objects, names=names, task="detect", **more)


def random_boxes(seed, rows=400, num_classes=12, groups=None):
    """Images with objects from common to rare, one in twenty without any, as in COCO."""
    random = np.random.default_rng(seed)
    shares = 1 / np.arange(1, num_classes + 1) ** 1.5
    counts = random.poisson(random.gamma(1, 5, rows)) * (random.random(rows) > 0.05)
    objects = [random.choice(num_classes, n, p=shares / shares.sum()).tolist() for n in counts]
    return make_boxes(objects, num_classes, seed=seed, groups=groups)


def random_alone(seed):
    """Samples of one class each; some have copies of their class, some were left out by the audit."""
    random = np.random.default_rng(seed)
    num_classes = int(random.integers(2, 9))
    targets = np.concatenate([np.arange(num_classes).repeat(12), random.integers(0, num_classes, 300)])
    groups = np.full(len(targets), NO_GROUP)
    for target in range(num_classes):
        members = np.flatnonzero(targets == target)
        groups[members[:2]] = 10 * target
        groups[members[2:5]] = 10 * target + 1
    splits = np.where(random.random(len(targets)) < 0.02, LEFT_OUT, NO_SPLIT)
    return make(targets, groups, splits, seed=seed)


def random_grouped(seed):
    """Samples in groups of several classes, as crops of one photo are."""
    random = np.random.default_rng(seed)
    targets = random.choice(4, 600, p=[0.6, 0.25, 0.1, 0.05])
    groups = np.where(random.random(600) < 0.8, random.integers(0, 150, 600), NO_GROUP)
    return make(targets, groups, seed=seed)


def random_box_groups(seed):
    return random_boxes(seed, groups=np.random.default_rng(seed).integers(-1, 120, 400).clip(-1))


MAKERS = (random_alone, random_grouped, random_boxes, random_box_groups)


def split(index, seed=0, shares="70/15/15", given=()):
    return split_dataset(index, shares=shares, split_seed=seed, given=given)


def counts_of(index):
    """Samples or objects of each class in each split, shape (3, classes)."""
    return np.stack([class_counts(index, index.rows(s)) for s in SPLITS])


def by_content(index):
    return {index.contents[r].tobytes(): int(index.splits[r]) for r in range(len(index))}


def shuffled(index, seed):
    """The same samples under other names, in another row order, with other group and class numbers."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(index))
    classes = random.permutation(len(index.class_names))  # old number → new number
    objects = None
    if index.objects is not None:
        parts = [classes[index.objects.classes[index.objects.of(int(r))]].tolist() for r in order]
        objects = make_objects(parts)
    targets = np.where(index.targets < 0, -1, classes[index.targets])
    return replace(
        index,
        paths=Strings(f"other/{r}.png" for r in range(len(index))),
        targets=targets[order],
        class_names=tuple(index.class_names[c] for c in np.argsort(classes)),
        splits=index.splits[order],
        groups=np.where(index.groups < 0, index.groups, 1_000_003 * (index.groups + 7) % 999_983)[order],
        contents=index.contents[order],
        objects=objects,
    )


@pytest.mark.parametrize("maker", MAKERS)
def test_groups_never_straddle_and_every_row_has_a_place(maker):
    for seed in SEEDS:
        index = maker(seed)
        made = split(index, seed)
        assert np.array_equal(made.splits == LEFT_OUT, index.splits == LEFT_OUT) and (made.splits != NO_SPLIT).all()
        for group in np.unique(made.groups[made.groups >= 0]):
            assert len(set(made.splits[(made.groups == group) & (made.splits >= 0)].tolist())) <= 1


@pytest.mark.parametrize("maker", MAKERS)
def test_the_split_comes_from_content_and_seed_alone(maker):
    for seed in SEEDS:
        index = maker(seed)
        made = split(index, 3)
        assert np.array_equal(made.splits, split(index, 3).splits)
        assert by_content(split(shuffled(index, seed), 3)) == by_content(made)
        assert not np.array_equal(made.splits, split(index, 4).splits)


@pytest.mark.parametrize("maker", [random_alone, random_grouped])
def test_every_class_is_in_every_split(maker):
    for seed in SEEDS:
        made = split(maker(seed), seed, shares="96/2/2")
        assert (counts_of(made) > 0).all() and check_splits(made) == {}


@pytest.mark.parametrize("shares", ["70/15/15", "50/25/25", "90/1/9", "33.4/33.3/33.3"])
def test_single_samples_are_within_one_of_their_share(shares):
    parts = np.array([float(p) for p in shares.split("/")]) / 100
    for seed in SEEDS:
        random = np.random.default_rng(seed)
        targets = random.choice(7, 700, p=np.arange(1, 8) / 28)
        made = split(make(targets, seed=seed), seed, shares)
        counts = counts_of(made)
        wanted = parts[:, None] * counts.sum(0)
        assert (np.abs(counts - wanted)[1:] <= 1).all() and (np.abs(counts - wanted)[0] <= 2).all()
        assert (np.abs(counts.sum(1) - 700 * parts) <= 2).all()


def test_copies_are_within_one_group_of_their_share():
    for seed in SEEDS:
        counts = counts_of(split(random_alone(seed), seed))
        assert (np.abs(counts - np.array([[0.7], [0.15], [0.15]]) * counts.sum(0))[1:] <= 1.0001).all()


def test_many_small_classes_together_get_their_share():
    made = split(make(np.arange(200).repeat(10)))  # 1.5 of each: half of the classes give two, half one
    assert [len(made.rows(s)) for s in SPLITS] == [1400, 300, 300]
    assert set(np.unique(counts_of(made)[2])) == {1, 2}


def test_groups_of_several_classes_are_near_their_share():
    for seed in SEEDS:
        counts = counts_of(split(random_grouped(seed), seed))
        share = counts / counts.sum(0)
        assert np.abs(share - [[0.7], [0.15], [0.15]]).max() < 0.05, counts
        assert np.abs(counts.sum(1) / 600 - [0.7, 0.15, 0.15]).max() < 0.01


def test_objects_and_images_are_near_their_share():
    wanted = np.array([0.7, 0.15, 0.15])
    for seed in SEEDS:
        made = split(random_boxes(seed), seed)
        counts = counts_of(made)
        common = counts.sum(0) >= 40
        share = counts[:, common] / counts[:, common].sum(0)
        assert np.abs(share - wanted[:, None]).max() < 0.05, counts
        images = np.array([len(made.rows(s)) for s in SPLITS])
        assert np.abs(images / len(made) - wanted).max() < 0.015, images
        bare = np.diff(made.objects.starts) == 0
        assert np.abs(np.bincount(made.splits[bare], minlength=3) / bare.sum() - wanted).max() < 0.1


def test_dropped_and_crowd_objects_do_not_count():
    index = random_boxes(1)
    objects = index.objects
    rare = np.flatnonzero(objects.classes == 11)
    hidden = replace(objects, kept=~np.isin(np.arange(len(objects)), rare[::2]),
                     crowd=np.isin(np.arange(len(objects)), rare[1::2]))  # fmt: skip
    plain = replace(objects, classes=np.where(objects.classes == 11, -5, objects.classes).astype(np.int32))
    assert np.array_equal(split(replace(index, objects=hidden)).splits, split(replace(index, objects=plain)).splits)
    assert all("c11" in check_splits(split(replace(index, objects=hidden)))[s] for s in SPLITS)


def test_rare_objects_go_to_train_and_others_everywhere():
    for seed in SEEDS:
        random = np.random.default_rng(seed)
        images_of = [1, 1, 2, 2, 2, 3, 4, 5, 8]  # images in which each rare class is to be seen
        objects = [[9] * int(n) for n in random.integers(0, 4, 200)]
        for target, num in enumerate(images_of):
            for row in random.choice(200, num, replace=False):
                objects[row] += [target] * int(random.integers(1, 4))
        made = split(make_boxes(objects, 10, seed=seed), seed)
        counts = counts_of(made)
        assert (counts[0] > 0).all(), "train lacks a class that it could have"
        assert (counts[:, 5:] > 0).all(), "a class of three images or more is not everywhere"
        told = check_splits(made)
        assert "train" not in told and set(told["test"]) == {f"c{c}" for c in np.flatnonzero(counts[2] == 0)}
        assert set(told["val"]) <= {"c0", "c1", "c2", "c3", "c4"}


def test_given_splits_stay_and_missing_ones_are_cut_from_train():
    random = np.random.default_rng(0)
    for given, made in ((("train", "val"), 2), (("train", "test"), 1), (("test",), 1)):
        sides = [SPLITS.index(g) for g in given]
        splits = np.where(random.random(600) < 0.2, sides[-1], sides[0] if "train" in given else NO_SPLIT)
        index = make(np.arange(600) % 3, splits=splits)
        result = split(index, given=given)
        assert np.array_equal(result.splits == sides[-1], splits == sides[-1])
        pool = (splits != sides[-1]).sum()
        assert abs((result.splits == made).sum() - 0.15 * pool) <= 3 and (counts_of(result) > 0).all()
    everything = make(np.arange(30) % 3, splits=np.arange(30) % 10 % 3)
    assert np.array_equal(split(everything, given=SPLITS).splits, everything.splits)


def test_rows_without_a_given_split_join_their_group_or_train():
    index = make([0, 0, 0, 0, 0], groups=[1, 1, 2, 2, NO_GROUP], splits=[2, NO_SPLIT, NO_SPLIT, 0, NO_SPLIT])
    assert split(index, given=SPLITS).splits.tolist() == [2, 2, 0, 0, 0]


def test_a_group_in_two_given_splits_is_refused():
    index = make([0, 1, 0, 1], groups=[5, 6, 5, 6], splits=[0, 1, 2, 1])
    with pytest.raises(
        DataError, match=r"more than one of the given splits: 0\.jpg in train and 2\.jpg in test"
    ) as caught:
        split(index, given=SPLITS)
    assert "resplit=true" in caught.value.next
    left_out = replace(index, splits=np.array([0, 1, LEFT_OUT, 1], np.int8))
    assert split(left_out, given=SPLITS).splits.tolist() == [0, 1, LEFT_OUT, 1]


@pytest.mark.parametrize(
    ("targets", "groups"),
    [
        ([0] * 9 + [1, 1], None),  # two samples
        ([0] * 9 + [1] * 6, [NO_GROUP] * 9 + [1, 1, 1, 2, 2, 2]),  # two groups
        ([0] * 9 + [1] * 6, [NO_GROUP] * 8 + [1, 1, 1, 1, 2, 2, 2]),  # two groups, one with both classes
    ],
)
def test_a_class_that_cannot_be_everywhere_is_refused(targets, groups):
    index = make(targets, groups, names=["cat", "dog"])
    with pytest.raises(DataError, match="Class 'dog' has too few separate groups") as caught:
        split(index)
    assert caught.value.next and caught.value.exit_code == 3
    index = replace(index, splits=np.array([0] * 14 + [1] if len(targets) == 15 else [0] * 10 + [1], np.int8))
    if groups is None:
        with pytest.raises(DataError, match="too few"):  # one is left in train, and test is to be cut from it
            split(index, given=("train", "val"))


def test_classes_that_can_only_be_everywhere_by_turns_are_refused():
    """Each pair of four groups shares a class that needs three splits: one class has to go without."""
    with_class = {0: (1, 2, 3), 1: (1, 2, 4), 2: (1, 3, 4)}
    rows = [(c, g) for c, groups in with_class.items() for g in groups] + [(3, NO_GROUP)] * 30
    for seed in SEEDS:
        with pytest.raises(DataError, match="has too few separate groups"):
            split(make([c for c, _ in rows], [g for _, g in rows], seed=seed))
        counts = counts_of(split(make([3 if c == 2 else c for c, _ in rows], [g for _, g in rows], seed=seed,
                                      names=["a", "b", "-", "c"]).without_classes({2}), seed))  # fmt: skip
        assert (counts > 0).all()


def test_only_what_cannot_be_split_is_refused():
    """Few groups of several classes: every way of placing them is tried."""
    num_possible = 0
    for seed in range(800):
        random = np.random.default_rng(seed)
        holds = random.random((int(random.integers(3, 8)), int(random.integers(2, 5)))) < 0.6
        if (holds.sum(0) < 3).any():
            continue
        ways = itertools.product(range(3), repeat=len(holds))
        possible = any(all(len(set(np.array(way)[group])) == 3 for group in holds.T) for way in ways)
        groups, targets = np.repeat(np.nonzero(holds), random.integers(1, 4, holds.sum()), axis=1)
        index = make(targets, groups, seed=seed)
        if possible:
            assert (counts_of(split(index)) > 0).all()
            num_possible += 1
        else:
            with pytest.raises(DataError, match="too few separate groups"):
                split(index)
    assert num_possible > 50


def test_a_large_group_does_not_leave_a_split_without_its_class():
    for seed in SEEDS:
        sizes = ([100, 1, 1], [40, 30, 30], [60, 2, 1, 1], [1, 1, 1])
        targets = np.concatenate([np.full(sum(n), c) for c, n in enumerate(sizes)])
        groups = np.arange(sum(len(n) for n in sizes)).repeat([k for n in sizes for k in n])
        assert (counts_of(split(make(targets, groups, seed=seed), seed)) > 0).all()


def test_many_rare_classes_in_few_images():
    """Like the first 128 images of COCO: most classes are in one to six images, which they share."""
    shares = 1 / np.arange(1, 81) ** 1.1
    absent = []
    for seed in SEEDS:
        random = np.random.default_rng(seed)
        objects = [random.choice(80, n, p=shares / shares.sum()).tolist() for n in random.poisson(6, 130)]
        made = split(make_boxes(objects, 80, seed=seed), seed)
        counts = counts_of(made)
        num_images = np.array([sum(c in part for part in objects) for c in range(80)])
        assert (counts[0] > 0)[num_images > 0].all()
        absent.append(int((counts[1:, num_images >= 3] == 0).sum()))
        assert 0.6 < len(made.rows("train")) / 130 < 0.75
    assert np.mean(absent) < 0.9, absent  # of about 50 classes


def test_a_class_without_a_spare_group_gets_one_in_each_split():
    for seed in SEEDS:
        groups = [NO_GROUP] * 60 + [1] * 4 + [2] * 4 + [3] * 4
        mixed = make([0] * 60 + [1, 1, 0, 2] * 3, groups, seed=seed)  # classes 1 and 2 in three mixed groups only
        counts = counts_of(split(mixed, seed))
        assert counts[:, 1].tolist() == [2, 2, 2] and counts[:, 2].tolist() == [1, 1, 1]


def test_too_few_images_with_boxes_are_refused():
    for objects in ([], [[0]], [[0], [0]], [[0], [1], [2]], [[], []]):
        with pytest.raises(DataError, match="too few separate images"):
            split(make_boxes(objects, 3))
    for objects in ([[0], [0], [0]], [[], [], []], [[0, 1], [1], []], [[0], [0, 1], [1, 2], [1]]):
        assert set(split(make_boxes(objects, 3)).splits) == {0, 1, 2}, objects


def test_train_has_every_class_and_no_split_is_empty_in_tiny_datasets():
    num_made = 0
    for seed in range(300):
        random = np.random.default_rng(seed)
        shown = random.random((int(random.integers(4, 9)), int(random.integers(3, 9)))) < 0.4
        try:
            made = split(make_boxes([np.flatnonzero(s).tolist() for s in shown], shown.shape[1], seed=seed), seed)
        except DataError:
            continue  # each image has a class of its own
        num_made += 1
        assert (counts_of(made)[0] > 0)[shown.any(0)].all() and all(len(made.rows(s)) for s in SPLITS)
    assert num_made > 200


def test_a_split_without_a_class_is_refused():
    index = make(np.arange(30) % 3, splits=np.arange(30) // 10, names=["cat", "dog", "eel"])
    assert check_splits(index) == {}
    for number, name in enumerate(SPLITS):
        no_dog = np.where((index.splits == number) & (index.targets == 1), LEFT_OUT, index.splits)
        for task in ("classify", "text"):
            with pytest.raises(DataError, match=f"The {name} split has no sample of class 'dog'") as caught:
                check_splits(replace(index, splits=no_dog, task=task))
            assert "resplit=true" in caught.value.next
        nothing = np.where(index.splits == number, LEFT_OUT, index.splits)
        for task in ("classify", "language"):
            with pytest.raises(DataError, match=f"The {name} split is empty"):
                check_splits(replace(index, splits=nothing, task=task))
    boxes = make_boxes([[0], [0], [1]], 2, splits=[0, 1, 2])
    assert check_splits(boxes) == {"train": ("c1",), "val": ("c1",), "test": ("c0",)}
    with pytest.raises(DataError, match="val split is empty"):
        check_splits(replace(boxes, splits=np.array([0, 0, 2], np.int8)))


def test_language_is_split_only_as_given():
    index = make(np.full(4, -1), splits=[0, NO_SPLIT, 1, 2], task="language", names=["-"])
    assert split(index, given=("train", "val", "test")).splits.tolist() == [0, 0, 1, 2]
    assert split(replace(index, splits=np.full(4, NO_SPLIT, np.int8))).splits.tolist() == [0, 0, 0, 0]


FRACTIONS = (0.0001, 0.01, 0.05, 0.1, 0.2, 0.25, 0.5, 0.77, 0.9, 0.999, 1.0)


@pytest.mark.parametrize("maker", MAKERS)
def test_subsets_are_nested_and_keep_every_class(maker):
    for seed in SEEDS:
        made = split(maker(seed), seed)
        train = made.rows("train")
        smaller: set[int] = set()
        for fraction in FRACTIONS:
            rows = subset(made, fraction, seed)
            assert smaller <= set(rows.tolist()) and (np.diff(rows) > 0).all()
            smaller = set(rows.tolist())
            assert np.array_equal(class_counts(made, rows) > 0, class_counts(made, train) > 0)
        assert np.array_equal(rows, train)


def test_a_subset_has_its_share_of_every_class_and_another_seed_is_another_subset():
    made = split(make(np.arange(2000) % 4, seed=2))
    counts = class_counts(made, made.rows("train"))
    for fraction in FRACTIONS:
        chosen = class_counts(made, subset(made, fraction, 0))
        assert np.array_equal(chosen, np.ceil(counts * fraction - 1e-9))
    assert not np.array_equal(subset(made, 0.1, 0), subset(made, 0.1, 1))
    boxes = split(random_boxes(3))
    assert len(subset(boxes, 0.5, 0)) == np.ceil(0.5 * len(boxes.rows("train")))


@pytest.mark.parametrize("maker", MAKERS)
def test_a_subset_does_not_depend_on_names_or_row_order(maker):
    for seed in SEEDS:
        index = split(maker(seed), seed)
        other = shuffled(index, seed)
        chosen = {index.contents[r].tobytes() for r in subset(index, 0.2, 5)}
        assert chosen == {other.contents[r].tobytes() for r in subset(other, 0.2, 5)}


def test_a_room_is_filled_in_order_by_what_still_fits():
    for sizes, room, most, taken in [
        ([1, 1, 1, 1], 2, 9, [0, 1]),
        ([5, 3, 1, 1], 4, 9, [1, 2]),
        ([5, 3, 4], 2, 9, [1]),  # none fits: the smallest
        ([3, 3, 3], 5, 9, [0, 1]),  # 6 is nearer to 5 than 3
        ([3, 3, 3], 4, 9, [0]),
        ([1, 1, 1], 3, 2, [0, 1]),
        ([1, 1], 2, 0, []),
    ]:
        assert np.flatnonzero(fill(np.array(sizes), room, most)).tolist() == taken


def test_the_seal_breaks_when_the_test_split_changes():
    made = split(random_alone(0))
    sealed = SealedTest.seal(made)
    assert np.array_equal(sealed.open(made), made.rows("test"))
    moved = made.splits.copy()
    moved[made.rows("test")[0]] = 0
    with pytest.raises(DataError, match="sealed"):
        sealed.open(made.with_splits(moved))


def test_photos_and_their_crops_of_a_real_dataset(real_data):
    folder = real_data / "classify" / "facemask_crops"
    before = folder_hash(folder)
    with open(folder / "labels.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    names = sorted({r["label"] for r in rows})
    photos = {p: n for n, p in enumerate(sorted({r["photo"] for r in rows}))}
    index = make([names.index(r["label"]) for r in rows], [photos[r["photo"]] for r in rows], names=names)
    for seed in range(5):
        counts = counts_of(split(index, seed))
        assert np.abs(counts / counts.sum(0) - [[0.7], [0.15], [0.15]]).max() < 0.02, counts
    assert folder_hash(folder) == before


def test_boxes_of_a_real_dataset(real_data):
    folder = real_data / "detect" / "facemask_coco" / "annotations"
    before = folder_hash(folder)
    told = json.loads((folder / "custom_train.json").read_text())
    row = {image["id"]: r for r, image in enumerate(told["images"])}
    objects: list[list[int]] = [[] for _ in row]
    for box in told["annotations"]:
        objects[row[box["image_id"]]].append(box["category_id"])
    assert Counter(c for part in objects for c in part) == {1: 2443, 2: 560, 0: 103}
    for seed in range(5):
        made = split(make_boxes(objects, 3, seed=seed), seed)
        counts = counts_of(made)
        assert np.abs(counts / counts.sum(0) - [[0.7], [0.15], [0.15]]).max() < 0.02, counts
        assert np.abs(np.array([len(made.rows(s)) for s in SPLITS]) / len(made) - [0.7, 0.15, 0.15]).max() < 0.01
    assert folder_hash(folder) == before


@pytest.mark.parametrize("name", ["caf\udce9", "dogs\r", "a\nb", 'quo"te', "plain"])
def test_a_split_with_any_name_can_be_read_back(tmp_path, name):
    index = DatasetIndex(root=tmp_path, paths=(f"{name}/1.jpg", "b/2.jpg"), targets=np.array([1, 0]), class_names=("b", name),
                         splits=np.zeros(2, np.int8), groups=np.array([-1, -1]), contents=np.zeros((2, 16), np.uint8))  # fmt: skip
    write_text(tmp_path / "split.csv", write_split(index))
    again = read_split(tmp_path / "split.csv", tmp_path)
    assert list(again.paths) == list(index.paths) and set(again.class_names) == {"b", name}
    assert len(data_hash(index)) == 64
