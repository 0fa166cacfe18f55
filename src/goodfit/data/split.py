"""Deterministic, stratified, grouped splits; nested subsets; and the seal on the test split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError
from goodfit.core.random import hash64, stream
from goodfit.data.index import LEFT_OUT, NO_GROUP, NO_SPLIT, DatasetIndex, data_hash

_SPLIT = stream("split")
_SUBSET = stream("subset")


def split_dataset(index: DatasetIndex, *, shares: str, split_seed: int, given: tuple[str, ...]) -> DatasetIndex:
    """Put every accepted sample into train, val or test.

    Given splits are respected; what is missing is cut from train. Within a class, groups are ordered by a hash of the
    seed and of their content, so that the result does not depend on file names; each split gets its share of every
    class, and at least one sample.

    Args:
        index: An audited index.
        shares: "train/val/test", as "70/15/15".
        split_seed: Seed of the split alone.
        given: The splits that the data names.

    Raises:
        DataError: a class has too few groups to be in every split.
    """
    parts = np.array([float(p) for p in shares.split("/")])
    parts = parts / parts.sum()
    splits = index.splits.copy()
    wanted = [(2, parts[2]), (1, parts[1])]  # test first: it is cut as if nothing else were
    if given:
        splits[splits == NO_SPLIT] = 0
        wanted = [(s, p) for s, p in wanted if ("train", "val", "test")[s] not in given]
        pool = splits == 0
    else:
        pool = splits == NO_SPLIT
    order = _content_order(index, split_seed)
    counts = np.bincount(index.targets[pool], minlength=len(index.class_names))
    rooms = {split: _rooms(counts, float(share), len(wanted)) for split, share in wanted}
    for target in np.argsort(counts, kind="stable"):  # rare classes first: a group may bring other classes along
        rows = [r for r in order if pool[r] and index.targets[r] == target]
        _cut(
            index, rows, splits, {split: int(room[target]) for split, room in rooms.items()}, index.class_names[target]
        )
    splits[splits == NO_SPLIT] = 0
    made = index.with_splits(splits)
    _check_groups(made)
    return made


def _rooms(counts: npt.NDArray[np.int64], share: float, num_made: int) -> npt.NDArray[np.int64]:
    """Samples of each class for a split: at least one, and together the share of all (largest remainders);
    one is left for each other split that is made, and for train."""
    exact = counts * share
    rooms = np.maximum(1, np.floor(exact).astype(np.int64))
    left = max(0, round(float(counts.sum()) * share) - int(rooms.sum()))
    rooms[np.argsort(rooms - exact, kind="stable")[:left]] += 1
    return np.minimum(rooms, np.maximum(1, counts - num_made))


def _content_order(index: DatasetIndex, seed: int) -> list[int]:
    """Rows ordered by a hash of seed and content; the rows of one group stand together."""
    keys = np.array([int(c[:15], 16) if c else 0 for c in index.contents], np.int64)
    first: dict[int, int] = {}
    for row in np.argsort(keys, kind="stable"):
        if index.groups[row] != NO_GROUP:
            first.setdefault(int(index.groups[row]), int(keys[row]))
    unit = np.array([first.get(int(g), int(k)) for g, k in zip(index.groups, keys, strict=True)], np.int64)
    return [int(r) for r in np.lexsort((keys, unit, hash64(_SPLIT, seed, unit)))]


def _cut(index: DatasetIndex, rows: list[int], splits: npt.NDArray[np.int8], rooms: dict[int, int], name: str) -> None:
    """Move groups of one class from the pool into the wanted splits; what is left stays for train."""
    units: dict[int, list[int]] = {}
    placed = np.bincount(np.maximum(splits[rows], 0), minlength=3)  # with groups of other classes
    for row in rows:
        if splits[row] > 0:
            continue
        key = int(index.groups[row]) if index.groups[row] != NO_GROUP else -2 - row
        units.setdefault(key, []).append(row)
    waiting = list(units.items())
    for split, room in rooms.items():
        taken = int(placed[split])
        for key, members in list(waiting):
            if taken >= room or len(waiting) == 1:
                break
            if taken + len(members) > room and taken > 0:
                continue  # a smaller group may still fit
            _place(index, key, members, splits, split)
            taken += len(members)
            waiting.remove((key, members))
        if taken == 0:
            raise DataError(f"Class {name!r} has too few separate groups to be in every split.", where=str(index.root),
                            next="add images, give the splits yourself, or leave out group=")  # fmt: skip


def _place(index: DatasetIndex, key: int, members: list[int], splits: npt.NDArray[np.int8], split: int) -> None:
    """A group moves whole, also its members of other classes."""
    if key >= 0:
        whole = (index.groups == key) & (splits != LEFT_OUT)
        splits[whole] = split
    else:
        splits[members] = split


def _check_groups(index: DatasetIndex) -> None:
    """Assert that no group straddles splits, except where the data gave the splits itself."""
    for group in np.unique(index.groups[index.groups != NO_GROUP]):
        places = {int(s) for s in index.splits[index.groups == group] if s != LEFT_OUT}
        if len(places) > 1:
            raise DataError("A group of samples stands in more than one of the given splits.", where=str(index.root),
                            next="mend the split column, or leave out group=")  # fmt: skip


def subset(index: DatasetIndex, fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """Rows of a stratified subset of the training split; smaller fractions are contained in larger ones.

    Every class keeps at least one sample. Returns ascending rows, shape (rows,).
    """
    rows = index.rows("train")
    if fraction >= 1.0:
        return rows
    keys = hash64(_SUBSET, seed, np.array([int(index.contents[r][:15], 16) for r in rows], np.int64))
    chosen = []
    for target in range(len(index.class_names)):
        members = np.flatnonzero(index.targets[rows] == target)
        members = members[np.argsort(keys[members], kind="stable")]
        chosen.append(rows[members[: max(1, int(np.ceil(fraction * len(members))))]])
    return np.sort(np.concatenate(chosen))


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
