"""Shortcut features: does something about a file that is not its content tell its class?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError
from goodfit.data.checks.logistic import make_folds, wilson_low

NUM_FOLDS = 5
MIN_ROWS = 10  # of a value, below which it is pooled with other rare ones
LEVEL = 1e-3  # of all tests of a call together; a fold's choice is partly made on what it is tried on, hence not 0.01
MIN_SKILL = 0.05  # of the majority class's errors that the attribute surely avoids
MIN_CONTRAST = 0.25  # of a class found, minus of the others taken for it, that is sure
MAX_EXAMPLES = 6

Int = npt.NDArray[np.int64]
Column = Sequence[Hashable] | npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortcut:
    """An attribute that predicts the class of samples that it was not fitted on.

    Attributes:
        name: Of the attribute.
        target: The class that is told from all others, or -1 where the classes are predicted as a whole.
        accuracy: Share of samples whose class is predicted; for one class, the mean of the share of it that is found
            and the share of the others that is not taken for it.
        chance: What the same measure is without the attribute: the share of the most frequent class; 0.5 for one class.
        low: Bound that the accuracy surely exceeds (one-sided, at LEVEL over all tests of the call).
        examples: Frequent values with the class each points to, as "value: 95 % of class 2 (190 of 200)".
        values: (value, class, rows of the value in the class, rows of the value) of the same, for other wordings.
    """

    name: str
    target: int
    accuracy: float
    chance: float
    low: float
    examples: tuple[str, ...]
    values: tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Pairs:
    """How often each value meets each class, in all and in each fold; pairs that never meet are not kept."""

    values: Int  # code of each pair, ascending, (pairs,)
    classes: Int  # (pairs,)
    counts: Int  # rows of each pair in each fold, (pairs, folds)
    starts: Int  # first pair of each value, (values,)


def find_shortcuts(
    attributes: Mapping[str, Column], targets: Int, num_classes: int, *,
    groups: Int | None = None, seed: int = 0, class_names: Sequence[str] | None = None,
) -> list[Shortcut]:  # fmt: skip
    """Which attributes (file format, size in pixels, mode, folder and so on) predict the class, strongest first.

    Two questions are asked of each, by five-fold cross-validation. Does the most frequent class of its value beat the
    most frequent class of all? And is one class told from the rest, by the values that are commoner in it than in the
    rest (which an imbalance, or a hundred other classes, would hide from the first question)? An attribute is reported
    when the Wilson bound, corrected for the number of tests (Bonferroni), still avoids 5 % of the errors of guessing,
    or tells a class by 0.25 (share found less share of others taken for it). Chance alone then raises no alarm.

    Args:
        attributes: For each attribute, one value a row; numbers that vary freely should come in buckets.
        targets: Classes, int64 (N,); rows below 0 are ignored.
        num_classes: How many classes there are.
        groups: Of a group (0 or more), one row of each class counts: its files often come from one source; int64 (N,).
        seed: Of the folds.
        class_names: For the examples.

    Raises:
        DataError: an attribute, the targets and the groups do not have one value a row, or a class is out of range.
    """
    targets = np.asarray(targets, np.int64)
    sizes = {name: len(column) for name, column in attributes.items()}
    if groups is not None:
        sizes["groups"] = len(groups)
    for name, size in sizes.items():
        if size != len(targets):
            raise DataError(f"The attribute {name!r} has {size} values for {len(targets)} samples.")
    if len(targets) and targets.max() >= num_classes:
        raise DataError(f"Labels must be whole numbers below {num_classes}.")
    rows = _counted_rows(targets, None if groups is None else np.asarray(groups, np.int64))
    kinds = targets[rows]
    if len(rows) < 2 or len(np.unique(kinds)) < 2:
        return []
    folds = make_folds(kinds, np.full(len(rows), -1, np.int64), NUM_FOLDS, seed)
    tests = max(1, len(attributes)) * (1 + num_classes)
    z = NormalDist().inv_cdf(1 - LEVEL / tests)
    found = []
    for name, column in attributes.items():
        codes, words = _encode(column, rows)
        if len(words) < 2:
            continue
        pairs = _count(codes, kinds, folds, num_classes)
        made = _predict_all(pairs, kinds, z) or _tell_one(pairs, kinds, num_classes, z)
        if made is not None:
            values = _examples(pairs, words, made[0])
            found.append(_shortcut(name, made, values, class_names))
    return sorted(found, key=lambda s: (s.chance - s.accuracy) / (1 - s.chance))


def _counted_rows(targets: Int, groups: Int | None) -> Int:
    rows = np.flatnonzero(targets >= 0)
    if groups is None:
        return rows
    alone = rows[groups[rows] < 0]
    grouped = rows[groups[rows] >= 0]
    _, first = np.unique(np.stack([groups[grouped], targets[grouped]]), axis=1, return_index=True)
    return np.sort(np.concatenate([alone, grouped[first]]))


def _encode(column: Column, rows: Int) -> tuple[Int, list[str]]:
    """A number for each row's value, and the values' words; rare values share one."""
    table: dict[Hashable, int] = {}
    plain = column.tolist() if isinstance(column, np.ndarray) else column
    every = np.fromiter((table.setdefault(value, len(table)) for value in plain), np.int64, len(plain))
    codes = every[rows]
    counts = np.bincount(codes, minlength=len(table))
    common = counts >= MIN_ROWS
    number = np.where(common, np.cumsum(common) - 1, int(common.sum()))
    words = [str(v)[:80] for v, c in zip(table, common.tolist(), strict=True) if c]
    rare = int(((counts > 0) & ~common).sum())
    return number[codes], [*words, f"{rare} rare values"] if rare else words


def _count(codes: Int, kinds: Int, folds: Int, num_classes: int) -> _Pairs:
    pairs, inverse = np.unique(codes * num_classes + kinds, return_inverse=True)
    counts = np.bincount(inverse * NUM_FOLDS + folds, minlength=len(pairs) * NUM_FOLDS).reshape(-1, NUM_FOLDS)
    values = pairs // num_classes
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    return _Pairs(values, pairs % num_classes, counts, starts)


def _predict_all(pairs: _Pairs, kinds: Int, z: float) -> tuple[int, float, float, float] | None:
    """Target -1, accuracy, chance and low bound of predicting each row by the most frequent class of its value."""
    hits = 0
    per_class = np.zeros((int(kinds.max()) + 1, NUM_FOLDS), np.int64)
    np.add.at(per_class, pairs.classes, pairs.counts)
    for fold in range(NUM_FOLDS):
        train = pairs.counts.sum(1) - pairs.counts[:, fold]
        usual = int((per_class.sum(1) - per_class[:, fold]).argmax())
        best = np.maximum.reduceat(train, pairs.starts)
        top = train == np.repeat(best, np.diff(pairs.starts, append=len(train)))
        chosen = np.flatnonzero(top)
        first = np.unique(pairs.values[chosen], return_index=True)[1]
        chosen = chosen[first][best > 0]  # a tie goes to the lowest class
        hits += int(pairs.counts[chosen, fold].sum())
        unseen = np.repeat(best == 0, np.diff(pairs.starts, append=len(train)))
        hits += int(pairs.counts[unseen & (pairs.classes == usual), fold].sum())
    total = len(kinds)
    chance = float(per_class.sum(1).max() / total)
    low = wilson_low(hits, total, z)
    return (-1, hits / total, chance, low) if low - chance >= MIN_SKILL * (1 - chance) > 0 else None


def _tell_one(pairs: _Pairs, kinds: Int, num_classes: int, z: float) -> tuple[int, float, float, float] | None:
    """The class that is best told from the rest: its number, balanced accuracy, 0.5 and the low bound; or None."""
    size = np.bincount(kinds, minlength=num_classes)
    found, taken = np.zeros(num_classes), np.zeros(num_classes)
    lengths = np.diff(pairs.starts, append=len(pairs.values))
    whole = np.repeat(np.add.reduceat(pairs.counts, pairs.starts, axis=0), lengths, axis=0)  # rows of the pair's value
    in_class = np.zeros((num_classes, NUM_FOLDS), np.int64)
    np.add.at(in_class, pairs.classes, pairs.counts)
    for fold in range(NUM_FOLDS):
        own, other = pairs.counts[:, fold], whole[:, fold] - pairs.counts[:, fold]
        train = pairs.counts.sum(1) - own
        rest = whole.sum(1) - whole[:, fold] - train
        inside = (size - in_class[:, fold])[pairs.classes]
        outside = (len(kinds) - size - in_class.sum(0)[fold] + in_class[:, fold])[pairs.classes]
        points = train * outside > rest * inside
        found += np.bincount(pairs.classes[points], own[points], num_classes)
        taken += np.bincount(pairs.classes[points], other[points], num_classes)
    best: tuple[int, float, float, float] | None = None
    order = np.argsort(size, kind="stable")  # of two classes, which are told equally well, the rarer is named
    for k in order[(size[order] > 0) & (size[order] < len(kinds))].tolist():
        num_rest = len(kinds) - int(size[k])
        low = (wilson_low(found[k], size[k], z) + wilson_low(num_rest - taken[k], num_rest, z)) / 2
        accuracy = (found[k] / size[k] + 1 - taken[k] / num_rest) / 2
        if 2 * low - 1 >= MIN_CONTRAST and (best is None or low > best[3] + 1e-9):
            best = (k, float(accuracy), 0.5, float(low))
    return best


def _examples(pairs: _Pairs, words: list[str], target: int) -> tuple[tuple[str, int, int, int], ...]:
    """The most frequent values, each with its most frequent class; of one class, the values it is most seen in."""
    rows = pairs.counts.sum(1)
    totals = np.add.reduceat(rows, pairs.starts)
    weight = totals if target < 0 else np.bincount(pairs.values, rows * (pairs.classes == target), len(totals))
    made = []
    for value in np.argsort(-weight, kind="stable")[:MAX_EXAMPLES].tolist():
        if weight[value] > 0:
            start = int(pairs.starts[value])
            stop = int(pairs.starts[value + 1]) if value + 1 < len(pairs.starts) else len(rows)
            at = start + int(rows[start:stop].argmax())
            made.append((words[value], int(pairs.classes[at]), int(rows[at]), int(totals[value])))
    return tuple(made)


def _shortcut(
    name: str, made: tuple[int, float, float, float], values: tuple[tuple[str, int, int, int], ...],
    class_names: Sequence[str] | None,
) -> Shortcut:  # fmt: skip
    target, accuracy, chance, low = made
    lines = tuple(
        f"{value}: {100 * hits / total:.0f} % {class_names[k] if class_names else f'class {k}'} ({hits} of {total})"
        for value, k, hits, total in values
    )
    return Shortcut(name=name, target=target, accuracy=accuracy, chance=chance, low=low, examples=lines, values=values)
