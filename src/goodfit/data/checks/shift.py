"""Do two sets of samples come from one source? Tests on picture statistics and on class shares, each with a floor on the effect, so that
large sets do not turn trifles into alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError
from goodfit.core.random import derive_seed, stream

LEVEL = 0.001  # of all tests of a call together
MIN_DISTANCE = 0.15  # Kolmogorov-Smirnov statistic: at some value, the shares of samples below it differ by this
MIN_SHARE = 0.05  # of the samples must change class, beyond what chance would make
NUM_DRAWS = 9999

_DRAWS = stream("shift draws")
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601

Values = npt.NDArray[np.floating] | npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """One statistic that differs between two sets.

    Attributes:
        name: Of the statistic.
        distance: Kolmogorov-Smirnov statistic, 0 to 1.
        p: Probability of such a distance by chance, corrected for the number of statistics (Bonferroni).
        median_a, median_b: Middle values of the two sets.
        outside: Share of b's samples that are below or above nearly all (99 %) of a's.
    """

    name: str
    distance: float
    p: float
    median_a: float
    median_b: float
    outside: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassShift:
    """How far the class shares of two sets differ.

    Attributes:
        distance: Total variation: the share of samples that would have to change class, 0 to 1.
        usual: The same by chance alone, on average.
        p: Probability of such a distance by chance.
        found: p is below LEVEL and the distance exceeds the usual one by MIN_SHARE.
        classes: Those that changed most first, int64.
    """

    distance: float
    usual: float
    p: float
    found: bool
    classes: npt.NDArray[np.int64]


def picture_statistics(pixels: npt.NDArray[np.uint8]) -> dict[str, float]:
    """What a picture looks like as a whole, whatever it shows.

    Args:
        pixels: uint8 (H, W, 3). Sharpness means something only between pictures of about the same size in pixels.

    Returns:
        brightness, contrast (mean and standard deviation of luma, 0 to 1), saturation (mean of HSV's, 0 to 1), warmth
        (mean red less mean blue, -1 to 1), sharpness (logarithm of the variance of the Laplacian over that of the
        luma; Pech-Pacheco et al., ICPR 2000), clipped (share of pixels that are black or white in every channel),
        aspect (logarithm of width over height).

    Raises:
        DataError: not such an array, or an empty one.
    """
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise DataError(f"A picture must be uint8 of shape (H, W, 3), not {pixels.dtype} {pixels.shape}.")
    luma = (pixels.astype(np.float32) @ _LUMA) / 255
    highest, lowest = pixels.max(2), pixels.min(2)
    variance = float(luma.var())
    laplacian = 0.0
    if min(luma.shape) >= 3:
        middle = luma[1:-1, 1:-1]
        edges = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * middle
        laplacian = float(edges.var())
    means = pixels.reshape(-1, 3).mean(0) / 255
    return {
        "brightness": float(luma.mean()),
        "contrast": math.sqrt(variance),
        "saturation": float(((highest - lowest) / np.maximum(highest, 1)).mean()),
        "warmth": float(means[0] - means[2]),
        "sharpness": math.log((laplacian + 1e-6) / (variance + 1e-4)),
        "clipped": float(((lowest >= 254) | (highest <= 1)).mean()),
        "aspect": math.log(pixels.shape[1] / pixels.shape[0]),
    }


def find_shift(a: Mapping[str, Values], b: Mapping[str, Values]) -> list[Shift]:
    """Statistics whose distributions differ, most different first: two-sample Kolmogorov-Smirnov tests.

    Reported are those with a corrected p below LEVEL and a distance of at least MIN_DISTANCE. Values that are not
    finite are left out; statistics that only one side has are not compared.

    Args:
        a, b: For each statistic one number a sample, shapes (N,) and (M,).

    Raises:
        DataError: a statistic is not a row of numbers.
    """
    names = [name for name in a if name in b]
    found = []
    for name in names:
        one, two = _finite(a[name], name), _finite(b[name], name)
        if not len(one) or not len(two):
            continue
        distance = _largest_gap(one, two)
        p = min(1.0, len(names) * _kolmogorov(distance, len(one), len(two)))
        if p < LEVEL and distance >= MIN_DISTANCE:
            below, above = np.quantile(one, [0.005, 0.995])
            found.append(Shift(name=name, distance=distance, p=p, median_a=float(np.median(one)),
                               median_b=float(np.median(two)),
                               outside=float(((two < below) | (two > above)).mean())))  # fmt: skip
    return sorted(found, key=lambda s: -s.distance)


def _finite(values: Values, name: str) -> npt.NDArray[np.float64]:
    try:
        made = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"The statistic {name!r} does not hold numbers: {error}.") from error
    if made.ndim != 1:
        raise DataError(f"The statistic {name!r} must hold one number a sample.")
    return np.sort(made[np.isfinite(made)])


def _largest_gap(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """The Kolmogorov-Smirnov statistic of two sorted rows."""
    both = np.concatenate([a, b])
    gaps = np.searchsorted(a, both, side="right") / len(a) - np.searchsorted(b, both, side="right") / len(b)
    return float(np.abs(gaps).max())


def _kolmogorov(distance: float, num_a: int, num_b: int) -> float:
    """The p value of a distance, asymptotically (Stephens 1970's correction for small sets); ties make it cautious."""
    size = math.sqrt(num_a * num_b / (num_a + num_b))
    x = (size + 0.12 + 0.11 / size) * distance
    if x < 0.2:
        return 1.0
    return min(1.0, max(0.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * x * x) for k in range(1, 101))))


def class_shift(counts_a: npt.NDArray[np.int64], counts_b: npt.NDArray[np.int64], *, seed: int = 0) -> ClassShift:
    """Do two labelled sets have the same class shares? A permutation test of the total variation distance.

    Args:
        counts_a, counts_b: Samples of each class, int64 (classes,).
        seed: Of the draws.

    Raises:
        DataError: the counts do not fit each other, or one is negative.
    """
    one, two = np.asarray(counts_a, np.int64), np.asarray(counts_b, np.int64)
    if one.shape != two.shape or one.ndim != 1 or (len(one) and min(one.min(), two.min()) < 0):
        raise DataError("Class counts must be two rows of the same classes, none below 0.")
    num_a, num_b = int(one.sum()), int(two.sum())
    if not num_a or not num_b:
        return ClassShift(distance=0.0, usual=0.0, p=1.0, found=False, classes=np.arange(len(one)))
    both = one + two
    gap = one / num_a - two / num_b
    distance = float(np.abs(gap).sum() / 2)
    kinds = np.flatnonzero(both)
    draws = np.random.default_rng(derive_seed(_DRAWS, seed))
    num_draws = min(NUM_DRAWS, max(2000, 10_000_000 // len(kinds)))
    drawn = draws.multivariate_hypergeometric(both[kinds], num_a, size=num_draws, method="marginals")
    chance = np.abs(drawn / num_a - (both[kinds] - drawn) / num_b).sum(1) / 2
    p = float((1 + (chance >= distance - 1e-12).sum()) / (1 + num_draws))
    usual = float(chance.mean())
    return ClassShift(distance=distance, usual=usual, p=p, found=p < LEVEL and distance - usual >= MIN_SHARE,
                      classes=np.argsort(-np.abs(gap), kind="stable"))  # fmt: skip
