"""Multinomial logistic regression in numpy, its cross-validation in stratified and grouped folds, and the reduction of
wide features before it: what the checks for wrong labels and for shift share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError
from goodfit.core.random import hash64, stream

STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of the L2 penalty per row, strongest first
MAX_DIMS = 256  # principal components kept
LARGEST = 1e30  # of a feature: differences and sums stay finite in float32
MEMORY = 10  # pairs of steps that L-BFGS remembers
MAX_ITERATIONS = 100
Z_99 = 2.3263478740408408  # one-sided 99 % of the normal distribution
TOLERANCE = 3e-4  # of the gradient's largest entry, at a mean squared row norm of 1: converged

_FOLDS = stream("folds")
_SKETCH = stream("sketch")
_CHUNK = 4096  # rows at a time: float32 copies of wide features stay small

Float = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SparseRows:
    """A matrix of which only the entries that are not zero are kept, row after row (8 bytes an entry).

    Attributes:
        starts: Row r's entries are those from starts[r] to starts[r + 1]; int64, shape (rows + 1,).
        columns: Column of each entry, int32, shape (entries,).
        values: float32, shape (entries,).
        num_columns: Width of the matrix.
    """

    starts: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int32]
    values: Float
    num_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.starts) - 1, self.num_columns

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> SparseRows:
        """Some rows, by their numbers."""
        lengths = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        entries = np.arange(starts[-1]) + np.repeat(self.starts[:-1][rows] - starts[:-1], lengths)
        return SparseRows(starts, self.columns[entries], self.values[entries], self.num_columns)

    def __matmul__(self, weight: Float) -> Float:
        made = np.zeros((len(self), weight.shape[1]), np.float32)
        filled = np.flatnonzero(np.diff(self.starts))  # reduceat would repeat an entry for an empty row
        if len(filled):
            for k in range(weight.shape[1]):
                taken = np.take(np.ascontiguousarray(weight[:, k]), self.columns)  # twice as fast as an index
                made[filled, k] = np.add.reduceat(self.values * taken, self.starts[filled])
        return made

    def transposed_times(self, right: Float) -> Float:
        """The transpose of this matrix times `right`, float32 (columns, right's columns)."""
        lengths = np.diff(self.starts)
        made = np.empty((self.num_columns, right.shape[1]), np.float32)
        for k in range(right.shape[1]):
            weights = self.values * np.repeat(right[:, k], lengths)
            made[:, k] = np.bincount(self.columns, weights, self.num_columns)
        return made


def check_features(features: npt.ArrayLike, name: str = "features") -> Float:
    """The features as float32 of shape (N, D), unchanged where they already are.

    Raises:
        DataError: they are not a matrix of finite numbers.
    """
    try:
        with np.errstate(over="ignore"):
            made = np.asarray(features, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"The {name} are not numbers: {error}.") from error
    if made.ndim != 2:
        raise DataError(f"The {name} must have one row per sample, not the shape {made.shape}.")
    if made.size and not max(-float(made.min()), float(made.max())) <= LARGEST:  # false for NaN, too
        bad = int((~(np.abs(made) <= LARGEST)).any(1).sum())
        raise DataError(f"The {name} of {bad} samples hold infinite, undefined or absurdly large numbers.")
    return made


def reduce_features(features: Float, *, max_dims: int = MAX_DIMS, seed: int = 0) -> Float:
    """Standardised features on their principal components, scaled so that the mean squared norm of a row is 1.

    Constant features vanish. Where there are more than `max_dims` components, the largest are found by a randomised
    range finder with two power iterations (Halko, Martinsson, Tropp: "Finding structure with randomness", SIAM Review
    2011). Takes no more memory than a few blocks of 4096 rows beside the result, float32 (N, min(D, max_dims)).
    """
    num, dims = features.shape
    mean, inverse = _moments(features)
    if dims <= max_dims:
        basis = np.eye(dims, dtype=np.float32)
    else:
        basis = _range_finder(features, mean, inverse, min(dims, max_dims + 16), seed)
    gram = _gram(features, mean, inverse, basis) if num else np.eye(basis.shape[1])
    values, vectors = np.linalg.eigh(gram)
    used = values > 1e-7 * max(values.max(initial=0.0), 1e-30)
    top = np.argsort(values)[::-1][: min(max_dims, int(used.sum()))]
    basis = basis @ vectors[:, top].astype(np.float32)
    made = np.empty((num, len(top)), np.float32)
    for part in _blocks(num):
        made[part] = ((features[part] - mean) * inverse) @ basis
    norm = float(np.sqrt(np.square(made, dtype=np.float64).sum() / max(1, num))) if num else 1.0
    return made / np.float32(norm) if norm > 0 else made


def _blocks(num: int) -> list[slice]:
    return [slice(i, i + _CHUNK) for i in range(0, num, _CHUNK)]


def _moments(features: Float) -> tuple[Float, Float]:
    """Mean, and one over the standard deviation (0 for a constant feature). Shapes: (D,)."""
    num = max(1, len(features))
    mean = (
        sum((features[p].sum(0, dtype=np.float64) for p in _blocks(len(features))), np.zeros(features.shape[1])) / num
    )
    square = np.zeros(features.shape[1])
    for part in _blocks(len(features)):
        square += np.square(features[part] - mean).sum(0)
    std = np.sqrt(square / num)
    used = std > 1e-6 * np.maximum(1e-30, np.abs(mean))
    return mean.astype(np.float32), np.where(used, 1.0 / np.where(used, std, 1.0), 0.0).astype(np.float32)


def _range_finder(features: Float, mean: Float, inverse: Float, rank: int, seed: int) -> Float:
    """An orthonormal basis, float32 (D, rank), of nearly the span of the largest principal components."""
    dims = features.shape[1]
    uniform = hash64(_SKETCH, seed, np.arange(dims * rank).reshape(dims, rank)) >> np.uint64(40)
    basis = (uniform.astype(np.float32) / np.float32(1 << 23)) - 1
    for _ in range(3):
        made = np.zeros((dims, rank), np.float32)
        for part in _blocks(len(features)):
            block = (features[part] - mean) * inverse
            made += block.T @ (block @ basis)
        basis = np.linalg.qr(made)[0].astype(np.float32)
    return basis


def _gram(features: Float, mean: Float, inverse: Float, basis: Float) -> npt.NDArray[np.float64]:
    gram = np.zeros((basis.shape[1], basis.shape[1]))
    for part in _blocks(len(features)):
        block = ((features[part] - mean) * inverse) @ basis
        gram += block.T @ block
    return gram


def make_folds(
    targets: npt.NDArray[np.int64], groups: npt.NDArray[np.int64], num_folds: int, seed: int
) -> npt.NDArray[np.int64]:
    """A fold for each row: every class is spread evenly over the folds, and no group stands in two.

    Groups (-1: a row alone) count for the class of their first row, and are dealt out in an order that the seed
    shuffles. Shape: (rows,).
    """
    rows = np.arange(len(targets))
    alone = groups < 0
    unit = np.where(alone, rows, 0)
    if not alone.all():
        _, first, inverse = np.unique(groups[~alone], return_index=True, return_inverse=True)
        unit[~alone] = rows[~alone][first][inverse]  # the row that stands for the group
    heads, unit = np.unique(unit, return_inverse=True)
    kinds = targets[heads]
    order = np.lexsort((hash64(_FOLDS, seed, heads), kinds))
    starts = np.searchsorted(kinds[order], kinds[order])  # where each one's class begins
    folds = np.empty(len(heads), np.int64)
    turn = hash64(_FOLDS, seed, kinds[order]) % np.uint64(num_folds)  # small classes begin in different folds
    folds[order] = (np.arange(len(heads)) - starts + turn.astype(np.int64)) % num_folds
    return folds[unit]


def fit_logistic(
    x: Float | SparseRows, targets: npt.NDArray[np.int64], num_classes: int, strength: float, start: Float | None = None
) -> Float:
    """Minimise mean cross-entropy + strength / 2 * |weights|^2, the bias (last row) free, by L-BFGS (Liu and Nocedal
    1989) with a halving line search.

    Args:
        x: float32 (N, D); a mean squared row norm of about 1 suits STRENGTHS.
        targets: int64 (N,), from 0 to num_classes - 1.
        start: Weights to begin from.

    Returns:
        float32 (D + 1, num_classes).
    """
    weight = np.zeros((x.shape[1] + 1, num_classes), np.float32) if start is None else start.copy()
    if not len(x):
        return weight
    loss, gradient = _objective(x, targets, weight, strength)
    steps: list[tuple[Float, Float, float]] = []
    for _ in range(MAX_ITERATIONS):
        if float(np.abs(gradient).max()) < TOLERANCE:
            break
        direction = _direction(gradient, steps)
        slope = float(np.vdot(direction, gradient))
        if slope >= 0:
            direction, slope, steps = -gradient, -float(np.vdot(gradient, gradient)), []
        size = 1.0 if steps else min(1.0, 1.0 / float(np.abs(gradient).sum()))
        for _ in range(20):
            new = weight + np.float32(size) * direction
            new_loss, new_gradient = _objective(x, targets, new, strength)
            if new_loss <= loss + 1e-4 * size * slope:
                break
            size /= 2
        else:
            break  # float32 can go no lower
        moved, turned = new - weight, new_gradient - gradient
        curvature = float(np.vdot(moved, turned))
        if curvature > 1e-12:
            steps = [*steps[1 - MEMORY :], (moved, turned, 1.0 / curvature)]
        weight, loss, gradient = new, new_loss, new_gradient
    return weight


def _objective(
    x: Float | SparseRows, targets: npt.NDArray[np.int64], weight: Float, strength: float
) -> tuple[float, Float]:
    shares, logs = _softmax(x, weight)
    rows = np.arange(len(x))
    loss = -float(logs[rows, targets].mean(dtype=np.float64))
    shares[rows, targets] -= 1
    shares /= np.float32(len(x))
    gradient = np.empty_like(weight)
    product = x.transposed_times(shares) if isinstance(x, SparseRows) else x.T @ shares
    gradient[:-1] = product + np.float32(strength) * weight[:-1]
    gradient[-1] = shares.sum(0)
    return loss + 0.5 * strength * float(np.vdot(weight[:-1], weight[:-1])), gradient


def _softmax(x: Float | SparseRows, weight: Float) -> tuple[Float, Float]:
    logits = x @ weight[:-1] + weight[-1]
    logits -= logits.max(1, keepdims=True)
    shares = np.exp(logits)
    total = shares.sum(1, keepdims=True)
    shares /= total
    logits -= np.log(total)
    return shares, logits


def _direction(gradient: Float, steps: Sequence[tuple[Float, Float, float]]) -> Float:
    """The two-loop recursion of L-BFGS."""
    made = -gradient
    amounts = []
    for moved, turned, inverse in reversed(steps):
        amount = inverse * float(np.vdot(moved, made))
        amounts.append(amount)
        made = made - np.float32(amount) * turned
    if steps:
        _, turned, inverse = steps[-1]
        made = made * np.float32(1.0 / (inverse * float(np.vdot(turned, turned))))
    for (moved, turned, inverse), amount in zip(steps, reversed(amounts), strict=True):
        made = made + np.float32(amount - inverse * float(np.vdot(turned, made))) * moved
    return made


def predict_shares(x: Float | SparseRows, weight: Float) -> Float:
    """Class probabilities, float32 (N, classes)."""
    return _softmax(x, weight)[0]


def out_of_fold(
    x: Float | SparseRows, targets: npt.NDArray[np.int64], num_classes: int, folds: npt.NDArray[np.int64],
    strengths: Sequence[float] = STRENGTHS,
) -> tuple[Float, float]:  # fmt: skip
    """Probabilities of each row from a fit on the other folds, at the strength with the least out-of-fold log-loss.

    Strengths are tried from strong to weak, each fit beginning at the one before, until the log-loss rises.

    Returns:
        Probabilities, float32 (N, classes), and the strength.
    """
    parts = [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in np.unique(folds)]
    inner = [(x[train], targets[train]) for train, _ in parts]
    weights: list[Float | None] = [None] * len(parts)
    best, chosen, lowest = np.zeros((len(x), num_classes), np.float32), strengths[0], np.inf
    for strength in strengths:
        made = np.empty_like(best)
        for number, (_, held) in enumerate(parts):
            weight = fit_logistic(*inner[number], num_classes, strength, weights[number])
            weights[number] = weight
            made[held] = predict_shares(x[held], weight)
        loss = -float(np.log(np.maximum(made[np.arange(len(x)), targets], 1e-12)).mean(dtype=np.float64))
        if loss >= lowest:
            break
        best, chosen, lowest = made, strength, loss
    return best, chosen


def wilson_low(hits: float, total: float, z: float = Z_99) -> float:
    """One-sided lower bound of a proportion (Wilson 1927), 99 % by default; 0 without a sample."""
    if total <= 0:
        return 0.0
    share = hits / total
    centre = share + z * z / (2 * total)
    spread = z * float(np.sqrt(share * (1 - share) / total + z * z / (4 * total * total)))
    return max(0.0, (centre - spread) / (1 + z * z / total))
