"""Do two thumbnails show the same picture? Align one on the other, then compare their details where they overlap."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_QUARTER = np.float32(0.25)

MIN_SCALE, MAX_SCALE = 0.86, 1.05  # side of the overlap in the first picture: 0.90 to 1 by cropping, and room for error
MAX_SHIFT = 0.08  # of the side: 0.05 by cropping, and room for error
MAX_GAIN = 1.25  # between the pictures: 1.1 / 0.9 by brightness, rounded up
SATURATED = 250.0  # from here on a brightened picture may have lost what the other still shows
FAINT = 0.5  # grey levels (RMS): less detail than this is rounding and JPEG noise, and confirms nothing
SAME_PIXELS = 1  # grey levels: how far pictures that have too little detail may differ anywhere
_COARSE = 0.5  # agreement at half size from which the full size is tried; planted twins have 0.8 and more
_RADIUS = 5  # of the squares whose mean is taken off, pixels: objects of a sixth of the side keep their contrast
_LOCAL_RADIUS = 3  # of the squares whose strength of detail is evened out, pixels
# What encoding changes grows with the detail there is. So, in shares of the detail's strength, between grey levels:
_LOCAL_NOISE = (0.5, 0.5, 1.5)  # weaker detail is not amplified
_WINDOW_NOISE = (0.8, 0.7, 2.5)  # a window of 11 x 11 pixels may differ by as much without being noticed
_BATCH = 32  # pairs at once: an array of 32 x 64 x 64 float32 is 512 KiB, a few of which a cache holds


def agreement(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8], crops: Floats) -> Floats:
    """How well the details of two pictures agree, once one is aligned on the other.

    Args:
        first, second: Grey thumbnails, uint8, shape (pairs, T, T), T even.
        crops: The part of `first` that `second` may show, where the alignment starts: top, bottom, left, right as
            shares of the side, float32, shape (pairs, 4).

    Returns:
        float32, shape (pairs,): the smallest of four measures, 1 at most (see `_detail_scores`); 0 where there is too
        little detail; 1 where no pixel differs by more than SAME_PIXELS.
    """
    scores = np.zeros(len(first), np.float32)
    for start in range(0, len(first), _BATCH):
        part = slice(start, start + _BATCH)
        scores[part] = _agreement(first[part].astype(np.float32), second[part].astype(np.float32), crops[part])
    return scores


def _agreement(first: Floats, second: Floats, crops: Floats) -> Floats:
    scores = (np.abs(first - second).max((1, 2)) <= SAME_PIXELS).astype(np.float32)
    small = _halved(first), _halved(second)
    open_ = (scores == 0) & (_strength(small[0]) >= FAINT / 2) & (_strength(small[1]) >= FAINT / 2)
    left = np.flatnonzero(open_)
    if len(left):
        maps = _align(small[0][left], small[1][left], _map_of(crops[left], small[0].shape[1]), rounds=5)
        coarse, _ = _detail_scores(small[0][left], small[1][left], maps, windows=False)
        left, maps = left[coarse >= _COARSE], maps[coarse >= _COARSE]
    if len(left):
        maps = _align(first[left], second[left], _doubled(maps), rounds=2)
        fine, detail = _detail_scores(first[left], second[left], maps, windows=True)
        scores[left] = np.where(detail >= FAINT, fine, 0)
    return scores


def _map_of(crops: Floats, side: int) -> Floats:
    """Crops as maps: pixel v of the second picture lies at scale * v + shift of the first.
    Returns (pairs, 4): scale and shift of the rows, then of the columns; float32."""
    low, high = crops[:, 0::2], crops[:, 1::2]
    scale = high - low
    return np.stack([scale, low * side + 0.5 * scale - 0.5], 2).reshape(-1, 4).astype(np.float32)


def _doubled(maps: Floats) -> Floats:
    """The maps for pictures of twice the side."""
    grown = maps.copy()
    grown[:, 1::2] = 2 * maps[:, 1::2] + 0.5 - 0.5 * maps[:, 0::2]
    return grown


def _halved(pictures: Floats) -> Floats:
    pairs = pictures[:, ::2] + pictures[:, 1::2]
    return (pairs[:, :, ::2] + pairs[:, :, 1::2]) * _QUARTER


def _warped(pictures: Floats, maps: Floats) -> Floats:
    """Pictures resampled bilinearly on the grid of their partners; rows and columns are separate matrices."""
    side = np.arange(pictures.shape[1], dtype=np.float32)

    def matrix(scale: Floats, shift: Floats) -> Floats:
        at = np.clip(scale[:, None] * side + shift[:, None], 0, len(side) - 1)
        return np.maximum(0, 1 - np.abs(at[:, :, None] - side)).astype(np.float32, copy=False)

    rows, columns = matrix(maps[:, 0], maps[:, 1]), matrix(maps[:, 2], maps[:, 3])
    return np.matmul(rows @ pictures, columns.transpose(0, 2, 1), dtype=np.float32)


def _smoothed(pictures: Floats) -> Floats:
    """[1 2 1] / 4 both ways: takes off what resampling changes most."""
    out = np.pad(pictures, ((0, 0), (1, 1), (1, 1)), mode="edge")
    out = (out[:, :-2] + np.float32(2) * out[:, 1:-1] + out[:, 2:]) * _QUARTER
    return (out[:, :, :-2] + np.float32(2) * out[:, :, 1:-1] + out[:, :, 2:]) * _QUARTER


def _band(side: int, radius: int) -> Floats:
    """Multiplied from both sides: sums over squares of 2 * radius + 1 pixels, zeros around."""
    place = np.arange(side)
    return (np.abs(place[:, None] - place) <= radius).astype(np.float32)


def _boxes(pictures: Floats, radius: int) -> Floats:
    band = _band(pictures.shape[1], radius)
    return np.matmul(band @ pictures, band, dtype=np.float32)


def _counts(shown: npt.NDArray[np.bool_], radius: int) -> Floats:
    """How many pixels of each square are shown, at least 1; from rows and columns, shape (pairs, 2, side)."""
    sums = shown.astype(np.float32) @ _band(shown.shape[2], radius)
    return np.maximum(sums[:, 0, :, None] * sums[:, 1, None, :], np.float32(1))


def _detail(pictures: Floats, mask: npt.NDArray[np.bool_], counts: Floats) -> Floats:
    """What is left of the smoothed pictures less their means over squares, 0 outside the mask."""
    kept = _smoothed(pictures) * mask
    return kept - _boxes(kept, _RADIUS) / counts * mask


def _strength(pictures: Floats) -> Floats:
    """How much detail there is, grey levels (RMS). Shape: (pictures,)."""
    whole = np.ones((1, 2, pictures.shape[1]), bool)
    detail = _detail(pictures, np.ones((1, 1, 1), bool), _counts(whole, _RADIUS))
    return np.sqrt((detail**2).mean((1, 2)))


def _align(first: Floats, second: Floats, maps: Floats, *, rounds: int) -> Floats:
    """Improve the maps by Gauss-Newton over scale and shift of each axis (inverse compositional: the Jacobian is that
    of `second`; Baker and Matthews, 2004), on high-passed pictures of equal energy, so that brightness cancels out."""
    side = first.shape[1]
    whole = np.ones((1, 1, 1), bool)
    counts = _counts(np.ones((1, 2, side), bool), _RADIUS)
    inner = np.zeros((side, side), np.float32)
    inner[side // 16 : -(side // 16), side // 16 : -(side // 16)] = 1
    moving, fixed = _detail(first, whole, counts), _detail(second, whole, counts)
    fixed = fixed / np.maximum(np.sqrt((fixed**2).mean((1, 2), keepdims=True)), 0.1)
    middle = (side - 1) / 2
    place = (np.arange(side, dtype=np.float32) - middle) / side
    down, right = np.gradient(fixed, axis=1) * inner, np.gradient(fixed, axis=2) * inner
    slopes = np.stack([down * place[:, None], down, right * place, right], 1).reshape(len(first), 4, -1)
    normal = slopes @ slopes.transpose(0, 2, 1)
    damping = 1e-3 * np.trace(normal, axis1=1, axis2=2) + 1e-3
    normal = normal + damping[:, None, None] * np.eye(4, dtype=np.float32)
    share = inner.mean()
    low = np.array([MIN_SCALE, -MAX_SHIFT * side] * 2, np.float32)
    high = np.array([MAX_SCALE, (MAX_SHIFT + 1 - MIN_SCALE) * side] * 2, np.float32)
    for _ in range(rounds):
        seen = _warped(moving, maps) * inner
        seen /= np.maximum(np.sqrt((seen**2).mean((1, 2), keepdims=True) / share), 0.1)
        gain = np.maximum((seen * fixed).mean((1, 2), keepdims=True) / share, 0.3)
        error = (seen - gain * fixed * inner).reshape(len(first), -1, 1)
        step = np.clip(np.linalg.solve(normal, slopes @ error)[:, :, 0], -3, 3)
        grow = step[:, 0::2] / side
        scale, shift = maps[:, 0::2], maps[:, 1::2]
        shift = shift - scale * (step[:, 1::2] - grow * middle)
        maps = np.clip(np.stack([scale * (1 - grow), shift], 2).reshape(-1, 4), low, high).astype(np.float32)
    return maps


def _detail_scores(first: Floats, second: Floats, maps: Floats, *, windows: bool) -> tuple[Floats, Floats]:
    """How well aligned details agree, and how much detail there is (RMS grey levels of the poorer picture).

    The score is the smallest of four measures over the pixels that both pictures show: the correlation of the details;
    their correlation after division by their local strength, so that a faint object counts as much as the sharp edge
    beside it; their ratio of contrast plus 0.1 (resampling takes off up to 0.1); and, with `windows`, the structural
    similarity of the window that agrees least (Wang et al., 2004, without its term for brightness), so that one other
    object on the same background tells. The last, w in -1 to 1, counts as (w + 2.5) / 3.5: 0.3 there weighs as much as
    a correlation of 0.8.
    """
    shown = _shown(maps, first.shape[1])
    mask = shown[:, 0, :, None] & shown[:, 1, None, :]
    moved, second = _equally_bright(_warped(first, maps), second, mask)
    counts = _counts(shown, _RADIUS)
    one, two = _detail(moved, mask, counts), _detail(second, mask, counts)
    pixels = np.maximum(mask.sum((1, 2), dtype=np.float32), 1)
    strengths = np.sqrt((one**2).sum((1, 2)) / pixels), np.sqrt((two**2).sum((1, 2)) / pixels)
    weak = np.minimum(*strengths)
    contrast = weak / np.maximum(np.maximum(*strengths), np.float32(1e-3))
    power = one**2 + two**2
    local = _boxes(power, _LOCAL_RADIUS) / (2 * _counts(shown, _LOCAL_RADIUS))
    level = np.sqrt(local + _noise(weak, _LOCAL_NOISE) ** 2)
    scores = np.minimum(_correlation(one, two), _correlation(one / level, two / level))
    if windows:
        noise = ((2 * _RADIUS + 1) * _noise(weak, _WINDOW_NOISE)) ** 2
        worst = ((_boxes(2 * one * two, _RADIUS) + noise) / (_boxes(power, _RADIUS) + noise)).min((1, 2))
        scores = np.minimum(scores, (worst + 2.5) / 3.5)
    return np.minimum(scores, contrast + np.float32(0.1)), weak


def _noise(strength: Floats, bounds: tuple[float, float, float]) -> Floats:
    """What encoding may have changed, grey levels (RMS). Shape: (pairs, 1, 1)."""
    share, low, high = bounds
    return (share * strength).clip(low, high)[:, None, None].astype(np.float32, copy=False)


def _equally_bright(first: Floats, second: Floats, mask: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Scale the second pictures to the brightness of the first, and cut both off where either has lost its lights."""
    both = mask & (first < SATURATED) & (second < SATURATED)
    sums = (np.where(both, first, 0).sum((1, 2)) + 1) / (np.where(both, second, 0).sum((1, 2)) + 1)
    gain = sums.clip(1 / MAX_GAIN, MAX_GAIN)[:, None, None].astype(np.float32)
    ceiling = SATURATED * np.minimum(1, gain)
    return np.minimum(first, ceiling), np.minimum(second * gain, ceiling)


def _shown(maps: Floats, side: int) -> npt.NDArray[np.bool_]:
    """Which rows and columns of the second pictures the first ones show, their edges left off.
    Shape: (pairs, 2, side)."""
    at = maps[:, 0::2, None] * np.arange(side, dtype=np.float32) + maps[:, 1::2, None]
    shown = (at >= -0.1) & (at <= side - 0.9)
    shown[:, :, [0, -1]] = False
    return shown


def _correlation(one: Floats, two: Floats) -> Floats:
    both = (one**2).sum((1, 2)) * (two**2).sum((1, 2))
    return (one * two).sum((1, 2)) / np.sqrt(np.maximum(both, 1e-6))
