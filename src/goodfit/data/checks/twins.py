"""The same sample more than once: kept together, out of training where it leaks, left out where its labels differ."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, islice

import numpy as np
import numpy.typing as npt

from goodfit.data.checks.duplicates import are_copies, near_duplicates
from goodfit.data.checks.findings import MAX_ITEMS, Finding
from goodfit.data.checks.scan import Scan
from goodfit.data.index import LEFT_OUT, NO_GROUP, SPLITS, DatasetIndex

MOVED = 0.06  # share of a picture's side that an object of a copy may have moved by
# Grey levels, and times what the pictures differ by on average, from which a difference is one of their content.
VISIBLE, VISIBLE_TIMES = 16.0, 4.0
MOST_PAIRS = 2_000  # that are compared one by one
Ints = npt.NDArray[np.int64]
MIN_SIDE = (
    32  # pixels: smaller pictures have too little detail to tell a twin from its like (8-pixel digits: 148 pairs)
)


def audit_twins(
    index: DatasetIndex, scan: Scan | None, *, keep: bool = False
) -> tuple[DatasetIndex, list[Finding], int]:
    """Find equal and nearly equal samples, and mend the index: conflicting labels and leaks are left out, the rest is
    grouped, so that no split separates it.

    Nearly equal pictures whose objects lie elsewhere are no twins, as those of a camera that does not move.

    Args:
        index: With contents; its splits are changed in place.
        scan: Of the images; None for texts, which are compared by their normalised content.
        keep: Nearly equal samples are told, and kept as others are.

    Returns:
        The index with groups, the findings, and how many rows were left out as copies of a sample in another split.
    """
    keys = index.contents if scan is None else scan.pixels
    exact = equal_rows(keys, index.splits != LEFT_OUT)
    before = np.maximum(index.splits, 0)  # what has no split among given ones goes to train
    findings = _conflicts(index, exact)
    near: list[tuple[int, int, float]] = []
    if scan is not None:
        kept = np.flatnonzero((index.splits != LEFT_OUT) & (scan.sizes.min(axis=1) >= MIN_SIDE))
        near = [(int(kept[a]), int(kept[b]), score)
                for a, b, score in near_duplicates(_chosen(scan, kept), known=exact[kept])]  # fmt: skip
        near = [(a, b, score) for a, b, score in near if _same_objects(index, scan, a, b)]
    if keep and near:
        findings.append(Finding("duplicate_near", "info", len(near), tuple(f"{index.paths[a]} = {index.paths[b]}" for a, b, _ in near),
                                "nearly the same picture: kept as others are, as was asked"))  # fmt: skip
        near = []
    links = np.array([(a, b) for a, b, _ in near], np.int64).reshape(-1, 2)
    findings += _pairs(index, exact, near)
    found = _leaks(index, before, exact, near)
    num_left = _leave_copies(index, before, exact, links, scan)
    findings += [replace(f, action=f"{f.action} ({num_left:,} in all)") for f in found]
    kept = index.splits != LEFT_OUT  # what left joins nothing: its twin may lie elsewhere
    together = components(len(index), np.where(kept, exact, NO_GROUP), links[kept[links].all(axis=1)])
    return replace(index, groups=components(len(index), index.groups, _chain(together))), findings, num_left


def _chosen(scan: Scan, rows: Ints) -> npt.NDArray[np.uint8]:
    return scan.thumbnails if len(rows) == len(scan.thumbnails) else scan.thumbnails[rows]


def equal_rows(keys: npt.NDArray[np.uint8], usable: npt.NDArray[np.bool_]) -> Ints:
    """Group number of rows with equal keys, NO_GROUP where a row stands alone. Shape: (rows,).

    Args:
        keys: uint8, shape (rows, 16).
        usable: Rows that count; the others stand alone.
    """
    groups = np.full(len(keys), NO_GROUP, np.int64)
    rows = np.flatnonzero(usable)
    if len(rows):
        whole = np.ascontiguousarray(keys[rows]).view("V16")[:, 0]
        _, number, count = np.unique(whole, return_inverse=True, return_counts=True)
        several = count[number] > 1
        groups[rows[several]] = number[several]
    return groups


def components(num: int, groups: Ints, links: Ints) -> Ints:
    """Connected components of groups and of links between rows; NO_GROUP where a row stands alone. Shape: (rows,).

    By repeated halving of label chains over arrays, so that a million rows take a second.

    Args:
        groups: Group number of each row, or NO_GROUP, shape (rows,).
        links: Pairs of rows, shape (links, 2).
    """
    label = np.arange(num)
    member = np.flatnonzero(groups != NO_GROUP)
    _, first, number = np.unique(groups[member], return_index=True, return_inverse=True)
    edges = np.concatenate([np.stack([member, member[first][number]], axis=1), links])
    while True:
        low = np.minimum(label[edges[:, 0]], label[edges[:, 1]])
        before = label.copy()
        np.minimum.at(label, edges[:, 0], low)
        np.minimum.at(label, edges[:, 1], low)
        label = label[label]
        if np.array_equal(label, before):
            break
    sizes = np.bincount(label, minlength=num)
    return np.where(sizes[label] > 1, label, NO_GROUP)


def _chain(groups: Ints) -> Ints:
    """Links that hold the rows of each group together. Shape: (links, 2)."""
    member = np.flatnonzero(groups != NO_GROUP)
    _, first, number = np.unique(groups[member], return_index=True, return_inverse=True)
    return np.stack([member, member[first][number]], axis=1)


def _members(groups: Ints) -> list[Ints]:
    """The rows of each group, ascending."""
    member = np.flatnonzero(groups != NO_GROUP)
    order = member[np.argsort(groups[member], kind="stable")]
    if not len(order):
        return []
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def _conflicts(index: DatasetIndex, exact: Ints) -> list[Finding]:
    if index.objects is not None:
        return _other_objects(index, exact)
    if not index.class_names:
        return []
    bad = [rows for rows in _members(exact) if len(np.unique(index.targets[rows])) > 1]
    if not bad:
        return []
    items = []
    for rows in bad:
        index.splits[rows] = LEFT_OUT
        labels = ", ".join(sorted({index.class_names[t] for t in index.targets[rows]}))
        items.append(" = ".join(index.name(int(r)) for r in rows) + f": {labels}")
    return [Finding("label_conflict", "warning", sum(len(rows) for rows in bad), tuple(items),
                    "one content, two labels: all copies left out", "keep the copy with the right label, or labels=fixes.csv")]  # fmt: skip


def _other_objects(index: DatasetIndex, exact: Ints) -> list[Finding]:
    """Equal pictures whose objects differ: one copy says that there is nothing where the other has an object. Both are kept, as a
    pixel more or less is no contradiction; a person has to look."""
    objects = index.objects
    assert objects is not None

    def told(row: int) -> list[tuple[float, ...]]:
        part = objects.of(row)
        kept = objects.kept[part]
        rows = np.column_stack([objects.classes[part], np.rint(objects.boxes[part])])[kept]
        return sorted(map(tuple, rows.tolist()))

    bad = [rows for rows in _members(exact) if any(told(int(r)) != told(int(rows[0])) for r in rows[1:])]
    if not bad:
        return []
    items = tuple(" = ".join(index.name(int(r)) for r in rows) + ": " + ", ".join(f"{len(told(int(r)))} objects" for r in rows)
                  for rows in bad)  # fmt: skip
    return [Finding("label_conflict", "warning", sum(len(rows) for rows in bad), items,
                    "one picture, different objects: kept as it is, but for leaks", "keep the copy with all of the objects")]  # fmt: skip


def _pairs(index: DatasetIndex, exact: Ints, near: list[tuple[int, int, float]]) -> list[Finding]:
    """Twins within one split, or where no split is given."""
    items: list[str] = []
    count = 0
    for rows in _members(exact):
        rows = rows[index.splits[rows] != LEFT_OUT]  # conflicts are another finding
        sizes = np.bincount(index.splits[rows] - LEFT_OUT)
        count += int((sizes * (sizes - 1) // 2).sum())
        for a, b in islice(combinations(rows.tolist(), 2), max(0, MAX_ITEMS - len(items))):
            if index.splits[a] == index.splits[b]:
                items.append(f"{index.name(a)} = {index.name(b)}")
    found = []
    if count:
        found.append(
            Finding("duplicate_exact", "info", count, tuple(items), "the same content: kept together in one split")
        )
    same = [(a, b) for a, b, _ in near if index.splits[a] == index.splits[b]]
    if same:
        lines = tuple(f"{index.paths[a]} = {index.paths[b]}{_labels(index, a, b)}" for a, b in same)
        differ = sum(": " in line for line in lines)
        also = f"; {differ} of the pairs carry two labels" if differ else ""
        found.append(Finding("duplicate_near", "warning" if differ else "info", len(same), lines,
                             f"nearly the same picture: kept together in one split{also}"))  # fmt: skip
    return found


def _labels(index: DatasetIndex, a: int, b: int) -> str:
    first, second = int(index.targets[a]), int(index.targets[b])
    return "" if first == second else f": {index.class_names[first]}, {index.class_names[second]}"


def _leaks(
    index: DatasetIndex, places: npt.NDArray[np.int8], exact: Ints, near: list[tuple[int, int, float]]
) -> list[Finding]:
    """Twins in two of the given splits, also those whose labels differ."""
    items: list[str] = []
    count = 0
    for rows in _members(exact):
        sizes = np.bincount(places[rows])
        count += (len(rows) * (len(rows) - 1) - int((sizes * (sizes - 1)).sum())) // 2
        for a, b in islice(combinations(rows.tolist(), 2), max(0, MAX_ITEMS - len(items))):
            if places[a] != places[b]:
                items.append(f"{index.name(a)} = {index.name(b)}")
    across = [(a, b) for a, b, _ in near if places[a] != places[b]]
    items += [f"{index.paths[a]} = {index.paths[b]}" for a, b in across]
    if not count + len(across):
        return []
    kinds = " and ".join(w for w, n in ((f"{count} equal", count), (f"{len(across)} nearly equal", len(across))) if n)
    return [Finding("leak", "warning", count + len(across), tuple(items),
                    f"{kinds} pairs in two splits: the copy nearer to {SPLITS[0]} was left out", "mend the splits")]  # fmt: skip


def _leave_copies(
    index: DatasetIndex, places: npt.NDArray[np.int8], exact: Ints, links: Ints, scan: Scan | None
) -> int:
    """Of equal samples, and of nearly equal pairs, in several given splits, those in the most sealed one stay. Of what is like them only by
    others in between, each is compared with them itself: a film whose end is also in validation loses its end and not all of it. Where
    that would be too many comparisons, all of it leaves. Returns how many rows left."""
    alone = np.arange(len(index)) + exact.max(initial=0) + 1
    _, unit = np.unique(np.where(exact == NO_GROUP, alone, exact), return_inverse=True)
    usable = index.splits != LEFT_OUT
    own = np.zeros(int(unit.max(initial=-1)) + 1, np.int64)
    np.maximum.at(own, unit[usable], places[usable].astype(np.int64))
    most = own.copy()
    for a, b in ((0, 1), (1, 0)):  # of an equal group only the first stands for all in the links
        np.maximum.at(most, unit[links[:, a]], own[unit[links[:, b]]])
    going = usable & (places < most[unit])
    for rows in _members(components(len(index), exact, links)) if scan is not None and len(links) else ():
        rows = rows[usable[rows]]
        waiting = rows[~going[rows] & (places[rows] < places[rows].max(initial=0))]
        sealed = rows[places[rows] > places[rows].min(initial=len(SPLITS))]
        if len(waiting) * len(sealed) > MOST_PAIRS:
            going[waiting] = True
        elif len(waiting):
            assert scan is not None
            pairs = np.stack([np.repeat(waiting, len(sealed)), np.tile(sealed, len(waiting))], axis=1)
            pairs = pairs[places[pairs[:, 0]] < places[pairs[:, 1]]]
            same = are_copies(scan.thumbnails, pairs)
            same &= np.array(
                [not s or _same_objects(index, scan, a, b) for s, (a, b) in zip(same, pairs.tolist(), strict=True)]
            )
            going[pairs[same, 0]] = True
    index.splits[going] = LEFT_OUT
    return int(going.sum())


def _same_objects(index: DatasetIndex, scan: Scan, a: int, b: int) -> bool:
    """Whether two pictures that look alike show the same: half of their objects or more have one of their class near them in the other, as in
    a copy cropped by 5 % of its sides; or no other object is where the pictures differ, as labels that are missing make no other picture."""
    if index.objects is None:
        return True
    mine, theirs = (_kept_objects(index, row) for row in (a, b))
    lonely = np.concatenate([_without_partner(mine, theirs), _without_partner(theirs, mine)])
    if 2 * len(lonely) <= len(mine[0]) + len(theirs[0]):
        return True
    first, second = (scan.thumbnails[row].astype(np.float64) for row in (a, b))
    apart = np.abs(first - second * (first.mean() / max(1.0, second.mean())))
    limit, side = max(VISIBLE, VISIBLE_TIMES * float(apart.mean())), len(first)
    corners = np.stack([np.floor(lonely[:, :2] * side) - 1, np.ceil(lonely[:, 2:] * side) + 1], axis=1)
    edges = corners.clip(0, side).astype(np.int64)
    return not any(apart[low[1] : high[1], low[0] : high[0]].max(initial=0.0) > limit for low, high in edges)


def _kept_objects(index: DatasetIndex, row: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """Boxes of a picture's objects in shares of its sides, and their classes."""
    assert index.objects is not None and index.sizes is not None
    part = index.objects.of(row)
    kept = index.objects.kept[part]
    boxes = index.objects.boxes[part][kept].astype(np.float64) / np.tile(index.sizes[row], 2)
    return boxes, index.objects.classes[part][kept]


def _without_partner(
    mine: tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]], theirs: tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]
) -> npt.NDArray[np.float64]:  # fmt: skip
    """Boxes that have none of their class near them among others. Shape: (B, 4)."""
    (boxes, kinds), (others, other_kinds) = mine, theirs
    apart = np.abs((boxes[:, None, :2] + boxes[:, None, 2:] - others[None, :, :2] - others[None, :, 2:]) / 2).max(
        axis=2, initial=0.0
    )
    return boxes[~((apart <= MOVED) & (kinds[:, None] == other_kinds[None, :])).any(axis=1)]
