"""Deterministic, stratified, grouped splits; nested subsets; and the seal on the test split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError
from goodfit.core.random import hash64, stream
from goodfit.data.index import LEFT_OUT, NO_SPLIT, SPLITS, DatasetIndex, class_counts, data_hash
from goodfit.data.stratify import Stratifier, Units, fill, rooms_of

_SPLIT = stream("split")
_SUBSET = stream("subset")
_TRAIN, _VAL, _TEST = range(3)
_APART = "leave out group=, or use twins=keep where nearly equal samples are different ones"
_NAMED = 10  # class names listed in one message

_Ints = npt.NDArray[np.int64]


def split_dataset(index: DatasetIndex, *, shares: str, split_seed: int, given: tuple[str, ...]) -> DatasetIndex:
    """Put every accepted sample into train, val or test.

    Given splits are respected; what is missing is cut from train, test before val. Samples of one group go to one
    split. The order of groups is a hash of the seed and of their content, so that the result depends on neither names
    nor order of the files. Where every group has one class, each split gets its share of every class by largest
    remainders, and at least one sample. Objects, and groups of several classes, are spread by iterative
    stratification (Sechidis, Tsoumakas, Vlahavas: "On the stratification of multi-label data", ECML PKDD 2011), with
    images without an object as a class of their own. Splits of language data are only taken as given.

    Args:
        index: An audited index, with contents.
        shares: "train/val/test", as "70/15/15".
        split_seed: Seed of the split alone.
        given: The splits that the data names; rows without one join their group's, or train.

    Raises:
        DataError: a group stands in several given splits; a class has too few groups to be in every split that is to
            be made; or there are fewer images with objects to be found than splits.
    """
    splits = index.splits.copy()
    made: tuple[int, ...] = ()
    if given or index.task == "language":
        _complete_given(index, splits)
        _check_groups(index, splits)
        if index.task != "language":
            made = tuple(s for s in (_TEST, _VAL) if SPLITS[s] not in given)
        pool = np.flatnonzero(splits == _TRAIN)
    else:
        made = (_TEST, _VAL)  # test first: it is cut as if nothing else were
        pool = np.flatnonzero(splits == NO_SPLIT)
    if made:
        units = _find_units(index, pool, split_seed)
        cut = np.array([float(part) for part in shares.split("/")])
        pure = index.objects is None and len(units.classes) == len(units)
        place = _place_pure if pure else _place_mixed
        splits[pool] = place(index, units, made, cut / cut.sum())[units.of_row]
    return index.with_splits(splits)


def _complete_given(index: DatasetIndex, splits: npt.NDArray[np.int8]) -> None:
    """Rows without a split join the most sealed split of their group, or train."""
    grouped = np.flatnonzero((index.groups >= 0) & (splits != LEFT_OUT))
    names, group = np.unique(index.groups[grouped], return_inverse=True)
    latest = np.zeros(len(names), np.int8)
    np.maximum.at(latest, group, splits[grouped])
    open_ = splits[grouped] == NO_SPLIT
    splits[grouped[open_]] = latest[group[open_]]
    splits[splits == NO_SPLIT] = _TRAIN


def _check_groups(index: DatasetIndex, splits: npt.NDArray[np.int8]) -> None:
    """Refuse given splits that tear a group apart."""
    rows = np.flatnonzero((index.groups >= 0) & (splits >= 0))
    rows = rows[np.lexsort((splits[rows], index.groups[rows]))]
    same_group = np.diff(index.groups[rows]) == 0
    torn = np.flatnonzero(same_group & (np.diff(splits[rows]) != 0))
    if len(torn):
        a, b = (int(r) for r in rows[torn[0] : torn[0] + 2])
        raise DataError(
            "A group of samples stands in more than one of the given splits: "
            f"{index.name(a)} in {SPLITS[splits[a]]} and {index.name(b)} in {SPLITS[splits[b]]}.",
            where=str(index.root),
            next="mend the split column, leave out group=, or pass resplit=true to have it split anew",
        )


def _find_units(index: DatasetIndex, pool: _Ints, seed: int) -> Units:
    grouped = index.groups[pool] >= 0
    names, group = np.unique(index.groups[pool[grouped]], return_inverse=True)
    of_row = np.empty(len(pool), np.int64)
    of_row[grouped] = group
    of_row[~grouped] = np.arange(len(names), len(names) + int((~grouped).sum()))
    num = len(names) + int((~grouped).sum())
    keys = _content_keys(index)[pool]
    smallest = np.full(num, np.iinfo(np.int64).max)
    np.minimum.at(smallest, of_row, keys)
    sums = np.zeros(num, np.uint64)  # tells groups apart that share their smallest key
    np.add.at(sums, of_row, hash64(_SPLIT, keys))
    order = np.lexsort((sums, hash64(_SPLIT, seed, smallest)))
    rank = np.empty(num, np.int64)
    rank[order] = np.arange(num)
    of_row = rank[of_row]
    width = len(index.class_names) + 1
    entries, counts = np.unique(_entries(index, pool, of_row, width), return_counts=True)
    return Units(
        of_row=of_row,
        num_rows=np.bincount(of_row, minlength=num),
        starts=np.searchsorted(entries, np.arange(num + 1) * width),
        classes=entries % width,
        counts=counts.astype(np.int64),
        num_classes=width,
    )


def _entries(index: DatasetIndex, pool: _Ints, of_row: _Ints, width: int) -> _Ints:
    """unit * width + class of every sample or object that counts; rows without any have the class width - 1."""
    if index.objects is None:
        targets = index.targets[pool]
        return of_row * width + np.where(targets < 0, width - 1, targets)
    unit = np.full(len(index), -1, np.int64)
    unit[pool] = of_row
    rows, classes = index.objects.rows, index.objects.classes
    counted = index.objects.kept & ~index.objects.crowd & (unit[rows] >= 0) & (classes >= 0) & (classes < width - 1)
    bare = np.ones(len(index), bool)
    bare[rows[counted]] = False
    background = unit[pool[bare[pool]]] * width + width - 1
    return np.concatenate([unit[rows[counted]] * width + classes[counted], background])


def _content_keys(index: DatasetIndex) -> _Ints:
    if len(index.contents) != len(index):
        raise ValueError("the contents of the samples have not been read yet")
    return index.keys()


def _too_few(index: DatasetIndex, target: int) -> DataError:
    return DataError(
        f"Class {index.class_names[target]!r} has too few separate groups to be in every split.",
        where=str(index.root),
        next=f"add samples of that class, give the splits yourself, {_APART}",
    )


def _place_pure(
    index: DatasetIndex, units: Units, made: tuple[int, ...], shares: npt.NDArray[np.float64]
) -> npt.NDArray[np.int8]:
    """Split of each unit, where each has one class. Shape: (units,)."""
    places = np.zeros(len(units), np.int8)
    order = np.argsort(units.classes, kind="stable")  # by hash within a class
    bounds = np.searchsorted(units.classes[order], np.arange(units.num_classes + 1))
    counts = np.bincount(units.classes, weights=units.counts, minlength=units.num_classes).astype(np.int64)
    lowest = np.ones(units.num_classes, np.int64)
    lowest[-1] = 0
    ties = units.class_order()
    rooms = {split: rooms_of(counts, float(shares[split]), lowest, ties) for split in made}
    for target in range(units.num_classes):
        waiting = order[bounds[target] : bounds[target + 1]]
        if lowest[target] and len(waiting) <= len(made):
            raise _too_few(index, target)
        for number, split in enumerate(made):
            most = len(waiting) - len(made) + number  # one unit is left for each later split, and for train
            taken = fill(units.num_rows[waiting], int(rooms[split][target]), most)
            places[waiting[taken]] = split
            waiting = waiting[~taken]
    return places


def _place_mixed(
    index: DatasetIndex, units: Units, made: tuple[int, ...], shares: npt.NDArray[np.float64]
) -> npt.NDArray[np.int8]:
    """Split of each unit, where units have several classes or objects. Shape: (units,)."""
    num_units = np.bincount(units.classes, minlength=units.num_classes)
    if index.objects is None and (num_units[:-1] <= len(made)).any():
        raise _too_few(index, int(np.argmin(num_units[:-1])))
    stratifier = Stratifier(units, made, shares)
    stratifier.run()
    missing = stratifier.mend()
    if index.objects is None and missing:
        raise _too_few(index, missing[0])
    stratifier.polish()
    if (np.bincount(stratifier.places, minlength=3)[[_TRAIN, *made]] == 0).any():
        raise DataError(
            "There are too few separate images to have some in every split.",
            where=str(index.root),
            next=f"add images, give the splits yourself, {_APART}",
        )
    return stratifier.places


def check_splits(index: DatasetIndex) -> dict[str, tuple[str, ...]]:
    """See that every split can be used: none is empty, and each has every class of a classification.

    Returns:
        For boxes and masks, the names of the classes without an object in each split that lacks some; rare ones cannot
        be everywhere. Empty for the other tasks.

    Raises:
        DataError: a split is empty, or one of a classification has no sample of a class.
    """
    missing = {}
    things = "images" if index.task in ("classify", "detect", "segment") else "texts"
    for split in SPLITS:
        rows = index.rows(split)
        counts = class_counts(index, rows)
        names = [n for n, c in zip(index.class_names, counts, strict=True) if c == 0]
        if not len(rows):
            anew = "" if index.task == "language" else ", or pass resplit=true to have it split anew"
            raise DataError(f"The {split} split is empty.", where=str(index.root), next=f"add {things} to it{anew}")
        if names and index.objects is None and index.task != "language":
            raise DataError(f"The {split} split has no sample of {_listed(names)}.", where=str(index.root),
                            next=f"add {things} of that class to it, or pass resplit=true to have it split anew")  # fmt: skip
        if names:
            missing[split] = tuple(names)
    return missing


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ("class " if len(names) == 1 else "classes ") + ", ".join(repr(n) for n in names[:_NAMED]) + more


def subset(index: DatasetIndex, fraction: float, seed: int) -> _Ints:
    """Rows of a stratified subset of the training split; smaller fractions are contained in larger ones.

    Every class that train has keeps at least one sample: with one class a sample, the subset is `fraction` of each
    class, rounded up. With objects it is the start of one order of the images: first the few that show each class
    once (each the first with a class in the order of hashes), then all others by their hash.

    Args:
        index: An index with splits and contents.
        fraction: Share of the training split, from above 0 to 1.
        seed: Seed of the order.

    Returns:
        Ascending rows, int64, shape (rows,).
    """
    rows = index.rows("train")
    if fraction >= 1.0 or not len(rows):
        return rows
    keys = hash64(_SUBSET, seed, _content_keys(index)[rows])
    if index.objects is not None:
        return np.sort(_first_images(index, rows[np.argsort(keys, kind="stable")], fraction))
    order = np.lexsort((keys, index.targets[rows]))
    _, starts, sizes = np.unique(index.targets[rows][order], return_index=True, return_counts=True)
    position = np.arange(len(rows)) - np.repeat(starts, sizes)
    return np.sort(rows[order[position < np.repeat(_share(sizes, fraction), sizes)]])


def _share(sizes: _Ints, fraction: float) -> _Ints:
    """A fraction of each size, rounded up (but not for a rounding error), and at least one."""
    return np.maximum(1, np.ceil(fraction * sizes - 1e-9).astype(np.int64))


def _first_images(index: DatasetIndex, order: _Ints, fraction: float) -> _Ints:
    """The first images of an order, which is changed so that every class is among them."""
    objects = index.objects
    assert objects is not None
    position = np.full(len(index), -1, np.int64)
    position[order] = np.arange(len(order))
    counted = objects.kept & ~objects.crowd & (position[objects.rows] >= 0)
    first = np.full(len(index.class_names), len(order), np.int64)
    np.minimum.at(first, objects.classes[counted], position[objects.rows[counted]])
    needed = np.unique(first[first < len(order)])
    order = np.concatenate([order[needed], np.delete(order, needed)])
    return order[: max(len(needed), int(_share(np.array([len(order)]), fraction)[0]))]


@dataclass(frozen=True, slots=True)
class SealedTest:
    """The test split behind a seal: training and validation are built without it, and only the final test opens it."""

    sha256: str

    @classmethod
    def seal(cls, index: DatasetIndex) -> SealedTest:
        """Remember the test split by the hash of its contents and classes."""
        return cls(data_hash(index, "test"))

    def open(self, index: DatasetIndex) -> npt.NDArray[np.int64]:
        """The rows of the test split, for the final test.

        Raises:
            DataError: the split is not the one that was sealed.
        """
        if data_hash(index, "test") != self.sha256:
            raise DataError("The test split is not the one that was sealed at the start of the run.",
                            where=str(index.root), next="start a new run")  # fmt: skip
        return index.rows("test")
