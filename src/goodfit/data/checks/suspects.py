"""Likely wrong labels: confident learning on out-of-fold probabilities, and plain features for it where no pretrained
network is at hand. Nothing here changes a label."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError
from goodfit.data.checks.logistic import (
    Float,
    SparseRows,
    check_features,
    make_folds,
    out_of_fold,
    reduce_features,
    wilson_low,
)

NUM_FOLDS = 5  # ten found 1 % more of the planted labels on CIFAR-10, at twice the time
MIN_UNITS = 5  # samples (groups count once) of a class, below which its labels are not judged
MIN_SKILL = 0.1  # share of the majority class's errors that the fit must avoid before anything is flagged

TEXT_COLUMNS = 1 << 18  # 2^12 columns found 38 % of the planted labels of SST-2 where these find 52 %
MAX_WORDS = 400  # of a text that are read
THUMBNAIL = 64  # pixels, longer side, to which a picture is cut down before its plain features

_WORDS = re.compile(r"\w+|[^\w\s]")
_CELLS = 4  # of the grid, each way
_ANGLES = 8  # bins of orientation over half a turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspects:
    """Which labels are likely wrong.

    Attributes:
        order: All rows, most suspicious first; int64, shape (N,). Rows that are not judged come last.
        scores: One minus the out-of-fold probability of the given label, 0 where a row is not judged; float32 (N,).
        flagged: Rows that confident learning counts as wrongly labelled, most suspicious first; int64.
        proposed: The most likely class of each row (often the given one), int64, shape (N,).
        accuracy: Share of rows whose given label is the most likely one, out of fold.
        majority: Share of the most frequent class: what guessing reaches.
        useful: Whether the features tell the classes apart; where they do not, nothing is flagged.
        strength: Of the L2 penalty, chosen by out-of-fold log-loss.
    """

    order: npt.NDArray[np.int64]
    scores: Float
    flagged: npt.NDArray[np.int64]
    proposed: npt.NDArray[np.int64]
    accuracy: float
    majority: float
    useful: bool
    strength: float


def find_suspects(
    features: npt.ArrayLike | SparseRows | tuple[npt.ArrayLike, ...], targets: npt.NDArray[np.int64], num_classes: int, *,
    groups: npt.NDArray[np.int64] | None = None, seed: int = 0,
) -> Suspects:  # fmt: skip
    """Rank rows by how little an out-of-fold logistic regression on frozen features believes their label.

    A row is flagged by the confident joint (Northcutt, Jiang, Chuang: "Confident learning", JAIR 2021): among the
    classes whose probability reaches that class's mean self-confidence, the likeliest is not the given one; and the
    likeliest of all must not be it either (on face masks, 63 % of the flags were then planted instead of 35 %, and as
    many of the planted were flagged). Rows are ranked by self-confidence: on CIFAR-10 with 5 % of the labels changed,
    the top tenth by it held 82 % of them, by the normalised margin 69 %. Nothing is flagged unless the accuracy is
    above the majority class's (one-sided 99 % Wilson bound) and avoids a tenth of its errors. Classes of fewer than
    five samples are not judged.

    Args:
        features: float32 (N, D); or a tuple of such, which count equally (a network's and plain ones together found 1
            to 2 % more of the planted labels on CIFAR-10 and face masks than the better alone); or
            sparse rows, which are taken as they are.
        targets: Classes, int64 (N,), from 0 to num_classes - 1.
        num_classes: How many classes there are.
        groups: Rows of one group never stand in two folds; -1: a row alone; int64 (N,).
        seed: Of the folds.

    Raises:
        DataError: features, targets and groups do not fit each other, or a feature is not finite.
    """
    if isinstance(features, SparseRows):
        blocks: tuple[Float | SparseRows, ...] = (features,)
    else:
        blocks = tuple(check_features(f) for f in (features if isinstance(features, tuple) else (features,)))
    targets, kin = _check_rows({len(b) for b in blocks}, targets, num_classes, groups)
    num = len(targets)
    counts = np.bincount(targets, minlength=num_classes)
    majority = float(counts.max() / num) if num else 1.0
    judged = _units(targets, kin, num_classes) >= MIN_UNITS
    if judged.sum() < 2:
        return Suspects(order=np.arange(num), scores=np.zeros(num, np.float32), flagged=np.zeros(0, np.int64),
                        proposed=targets.copy(), accuracy=majority, majority=majority, useful=False,
                        strength=0.0)  # fmt: skip
    x = _join(blocks, seed)
    shares, strength = out_of_fold(x, targets, num_classes, make_folds(targets, kin, NUM_FOLDS, seed))
    own = shares[np.arange(num), targets]
    hits = int((shares.argmax(1) == targets).sum())
    useful = wilson_low(hits, num) > majority and hits / num - majority >= MIN_SKILL * (1.0 - majority)
    scores = np.where(judged[targets], 1.0 - own, 0.0).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    joint = _confident(shares, targets, own, judged)
    likeliest = np.where(judged, shares, -1.0).argmax(1)
    wrong = (joint >= 0) & (joint != targets) & (likeliest != targets) & judged[targets]
    return Suspects(
        order=order,
        scores=scores,
        flagged=order[wrong[order]] if useful else np.zeros(0, np.int64),
        proposed=np.where(wrong, joint, likeliest),
        accuracy=hits / num,
        majority=majority,
        useful=useful,
        strength=strength,
    )


def _join(blocks: tuple[Float | SparseRows, ...], seed: int) -> Float | SparseRows:
    if isinstance(blocks[0], SparseRows):
        return blocks[0]
    scale = np.float32(1 / np.sqrt(len(blocks)))  # so that the mean squared norm of a row stays 1
    return np.concatenate([reduce_features(b, seed=seed) * scale for b in blocks if not isinstance(b, SparseRows)], 1)


def _check_rows(
    sizes: set[int], targets: npt.NDArray[np.int64], num_classes: int, groups: npt.NDArray[np.int64] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    targets = np.asarray(targets)
    num = len(targets)
    groups = np.full(num, -1, np.int64) if groups is None else np.asarray(groups)
    if sizes != {num} or targets.ndim != 1 or groups.shape != (num,):
        rows = " and ".join(str(s) for s in sorted(sizes))
        raise DataError(f"There are {rows} rows of features, but {num} labels and {len(groups)} groups.")
    if num and not (np.issubdtype(targets.dtype, np.integer) and targets.min() >= 0 and targets.max() < num_classes):
        raise DataError(f"Labels must be whole numbers from 0 to {num_classes - 1}.")
    return targets.astype(np.int64), groups.astype(np.int64)


def _units(targets: npt.NDArray[np.int64], groups: npt.NDArray[np.int64], num_classes: int) -> npt.NDArray[np.int64]:
    """Samples of each class, a group counted once. Shape: (classes,)."""
    pairs = np.unique(np.stack([targets, groups])[:, groups >= 0], axis=1)
    return np.bincount(targets[groups < 0], minlength=num_classes) + np.bincount(pairs[0], minlength=num_classes)


def _confident(
    shares: Float, targets: npt.NDArray[np.int64], own: Float, judged: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """The class that each row confidently belongs to, -1 where there is none. Shape: (N,)."""
    num_classes = shares.shape[1]
    counts = np.bincount(targets, minlength=num_classes)
    thresholds = np.bincount(targets, own, num_classes) / np.maximum(counts, 1)
    sure = (shares >= thresholds.astype(np.float32)) & judged
    made = np.where(sure, shares, -1.0).argmax(1)
    return np.where(sure.any(1), made, -1)


def plain_features(pixels: npt.NDArray[np.uint8]) -> Float:
    """Colours, layout and edges of a small picture, for use without a pretrained network.

    64 bins of colour (4 each of brightness, red-green and blue-yellow), a 4 x 4 thumbnail in the same opponent space,
    8 orientations of the gradient in 4 x 4 cells (after Dalal and Triggs, CVPR 2005), and six spreads; square roots of
    the shares, so that distances are Hellinger's.

    Args:
        pixels: uint8 (H, W, 3); THUMBNAIL pixels on the longer side are enough.

    Returns:
        float32 (246,).

    Raises:
        DataError: not such an array, or an empty one.
    """
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise DataError(f"A picture must be uint8 of shape (H, W, 3), not {pixels.dtype} {pixels.shape}.")
    step = -(-max(pixels.shape[:2]) // (2 * THUMBNAIL))
    colours = pixels[::step, ::step].astype(np.float32) / 255
    red, green, blue = colours[..., 0], colours[..., 1], colours[..., 2]
    light = (red + green + blue) / 3
    opponent = np.stack([np.sqrt(light), red - green, (red + green) / 2 - blue])
    bins = np.clip(opponent * np.array([4, 6, 6], np.float32)[:, None, None], -2, 3.999)
    bins[1:] = np.clip(bins[1:] + 2, 0, 3.999)
    codes = bins.astype(np.int64)
    histogram = np.bincount((codes[0] * 16 + codes[1] * 4 + codes[2]).ravel(), minlength=64) / light.size
    cells = _cell_numbers(*light.shape)
    sizes = np.maximum(np.bincount(cells.ravel(), minlength=_CELLS**2), 1)
    layout = [np.bincount(cells.ravel(), plane.ravel(), _CELLS**2) / sizes for plane in opponent]
    edges, spreads = _edges(opponent[0], cells)
    made = np.concatenate([np.sqrt(histogram), *layout, edges, opponent.std((1, 2)), spreads])
    return made.astype(np.float32)


def _cell_numbers(height: int, width: int) -> npt.NDArray[np.int64]:
    return (np.arange(height) * _CELLS // height)[:, None] * _CELLS + (np.arange(width) * _CELLS // width)[None]


def _edges(light: Float, cells: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Square roots of the share of each orientation in each cell, and the gradient's mean and spread, and the width
    over the height as a logarithm."""
    across, down = np.zeros_like(light), np.zeros_like(light)
    across[:, 1:-1] = light[:, 2:] - light[:, :-2]
    down[1:-1] = light[2:] - light[:-2]
    strength = np.hypot(across, down)
    angle = ((np.arctan2(down, across) / np.pi * _ANGLES).astype(np.int64)) % _ANGLES
    made = np.bincount((cells * _ANGLES + angle).ravel(), strength.ravel(), _CELLS**2 * _ANGLES)
    total = made.reshape(-1, _ANGLES).sum(1).repeat(_ANGLES)
    shares = made / (total + 0.02 * light.size / _CELLS**2)  # a flat cell has no edges, not noise blown up
    aspect = np.log(light.shape[1] / light.shape[0])
    return np.sqrt(shares), np.array([strength.mean(), strength.std(), aspect])


def text_features(texts: Iterable[str]) -> SparseRows:
    """Hashed words, word pairs and four-letter pieces of texts, as logarithms of counts, weighted by rarity (tf-idf)
    and scaled to norm 1; terms of a single text are left out, since they say nothing about another.

    Returns:
        Sparse rows, about 8 bytes a distinct term of each text; as many columns as there are terms in two texts.
    """
    columns, counts, lengths = [], [], []
    for text in texts:
        terms, repeats = np.unique(_terms(text), return_counts=True)
        columns.append(terms)
        counts.append(repeats)
        lengths.append(len(terms))
    if not sum(lengths):
        return SparseRows(np.zeros(len(lengths) + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), 1)
    column = np.concatenate(columns)
    row = np.repeat(np.arange(len(lengths)), lengths)
    texts_with = np.bincount(column, minlength=TEXT_COLUMNS)
    number = np.cumsum(texts_with > 1) - 1
    kept = texts_with[column] > 1
    weights = np.log((1 + len(lengths)) / (1 + texts_with)) + 1
    values = np.log1p(np.concatenate(counts)[kept]) * weights[column[kept]]
    row = row[kept]
    norm = np.sqrt(np.bincount(row, values**2, len(lengths)))
    starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(lengths)))])
    return SparseRows(
        starts.astype(np.int64),
        number[column[kept]].astype(np.int32),
        (values / norm[row]).astype(np.float32),
        max(1, int(number[-1]) + 1),
    )


def _terms(text: str) -> npt.NDArray[np.int64]:
    words = [w[:64] for w in _WORDS.findall(text[: 16 * MAX_WORDS].lower())[:MAX_WORDS]]
    terms = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
    terms += [f"#{w[k : k + 4]}" for w in (f"^{w}$" for w in words) for k in range(len(w) - 3)]
    hashes = [zlib.crc32(t.encode("utf-8", "surrogatepass")) for t in terms]
    return np.array(hashes, np.int64) % TEXT_COLUMNS
