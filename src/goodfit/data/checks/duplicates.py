"""Near duplicates: pictures that are re-encoded, resized, brighter, darker or slightly cropped copies of others.

Hashes only propose pairs; an alignment of the thumbnails confirms them (data/alignment.py). Time and memory are linear
in the number of pictures.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from goodfit.data.checks.alignment import Floats, agreement

Ints = npt.NDArray[np.int64]

SIDE = 64  # of a thumbnail, pixels
CONFIRMED = 0.80  # agreement of twins: 99.5 % of copies of 32-pixel photos reach it, 99.8 % of larger ones
_WAVES = 8  # cosines per axis that describe a thumbnail
_LENGTH = 0.5  # a description shorter than this is noise: rounding alone gives 0.2
_PARTS = {"all": (0.0, 1.0), "start": (0.0, 0.95), "middle": (0.025, 0.975), "end": (0.05, 1.0)}  # shares of a side
_WHOLE = [("all", "all")]
_CROPS = _WHOLE + [(y, x) for y in ("start", "middle", "end") for x in ("start", "middle", "end")]
_TABLES = 8  # orders in which neighbours are looked for
_KEY_BITS = 24  # of a key's 32, from the hash: enough to tell 16 million pictures apart
_NEIGHBOURS = 4  # on each side in each order: what bounds the cost of a picture, however many look alike
_MAX_DISTANCE = 22  # of 64 bits: a similarity of 0.85 differs in 11.3 of them on average, with a deviation of 3.1
_MIN_SIMILARITY = 0.85  # the least of 10,000 planted twins, best of the ten crops, was 0.87
_BEST = 4  # proposals kept for each picture
_CHUNK = 2048  # pictures at once
_SAMPLE = 20_000  # pictures that the centre of the hashes is measured on


def thumbnail(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A picture as `near_duplicates` wants it: grey, squashed to a square.

    Args:
        pixels: RGB, uint8, shape (height, width, 3).

    Returns:
        uint8, shape (SIDE, SIDE).
    """
    grey = Image.fromarray(pixels).convert("L")
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0))


def near_duplicates(thumbnails: npt.NDArray[np.uint8], *, known: Ints) -> list[tuple[int, int, float]]:
    """Pairs of pictures that show the same: copies re-encoded, resized, up to 10 % brighter or darker, or with up to
    5 % of each side cropped off.

    Many copies of one picture are linked to each other, but not each to each: join the pairs into groups. Pictures
    without detail are twins only where their thumbnails have the same pixels.

    Args:
        thumbnails: What `thumbnail` returned, uint8, shape (rows, SIDE, SIDE); an array, or a memory map, which is
            read in parts.
        known: Group of exact duplicates of each row, or -1 where it has no duplicate; int64, shape (rows,). Of each
            group only the first row is searched and reported.

    Returns:
        (row, later row, agreement from CONFIRMED to 1), ascending.

    Raises:
        ValueError: the shapes or the type are others.
    """
    if thumbnails.shape[1:] != (SIDE, SIDE) or thumbnails.dtype != np.uint8 or known.shape != thumbnails.shape[:1]:
        raise ValueError(f"thumbnails are {thumbnails.dtype} of shape {thumbnails.shape}, known of {known.shape}")
    alone = np.flatnonzero(known < 0)
    grouped = np.flatnonzero(known >= 0)
    _, first = np.unique(known[grouped], return_index=True)
    rows = np.sort(np.concatenate([alone, grouped[first]]))
    if len(rows) < 2:
        return []
    pairs, crops = _propose(thumbnails, rows)
    found: list[tuple[int, int, float]] = []
    for start in range(0, len(pairs), _CHUNK):
        part = pairs[start : start + _CHUNK]
        scores = agreement(thumbnails[part[:, 0]], thumbnails[part[:, 1]], crops[start : start + _CHUNK])
        for number in np.flatnonzero(scores >= CONFIRMED):
            low, high = sorted(part[number].tolist())
            found.append((low, high, round(float(scores[number]), 4)))
    return sorted(found)


def are_copies(thumbnails: npt.NDArray[np.uint8], pairs: Ints) -> npt.NDArray[np.bool_]:
    """Whether the pictures of each pair show the same, as `near_duplicates` has it, whatever else is like them. Shape: (pairs,)."""
    found = np.zeros(len(pairs), bool)
    for one, two in ((0, 1), (1, 0)):
        for y, x in _CROPS:
            left = np.flatnonzero(~found)
            for part in (left[start : start + _CHUNK] for start in range(0, len(left), _CHUNK)):
                crops = np.tile(np.array(_PARTS[y] + _PARTS[x], np.float32), (len(part), 1))
                found[part] = agreement(thumbnails[pairs[part, one]], thumbnails[pairs[part, two]], crops) >= CONFIRMED
    return found


def _basis(part: tuple[float, float]) -> Floats:
    """Means of cosines over the pixels of a part of the side, cut pixels by their share. Shape: (_WAVES, SIDE)."""
    low, high = part
    wave = np.arange(_WAVES)[:, None]
    edges = (np.clip(np.linspace(0, 1, SIDE + 1), low, high) - low) / (high - low)
    integral = np.where(wave == 0, edges, np.sin(np.pi * wave * edges) / (np.pi * np.maximum(wave, 1)))
    return np.diff(integral, axis=1).astype(np.float32)


_BASES = {name: _basis(part) for name, part in _PARTS.items()}
_FREQUENCY = np.hypot(*np.meshgrid(np.arange(_WAVES), np.arange(_WAVES))).reshape(-1).astype(np.float32)


def _describe(thumbnails: npt.NDArray[np.uint8], crops: list[tuple[str, str]]) -> Floats:
    """The low frequencies of crops of each thumbnail, weighted by frequency, at length 1 whatever the brightness.

    What pictures with less detail than _LENGTH lack goes into the first component, the place of the mean: so they are
    like each other, and like no other picture. Shape: (rows, crops, _WAVES squared).
    """
    names = sorted({x for _, x in crops})
    across = thumbnails.astype(np.float32) @ np.concatenate([_BASES[name] for name in names]).T
    out = np.empty((len(thumbnails), len(crops), _WAVES**2), np.float32)
    for number, (y, x) in enumerate(crops):
        at = names.index(x) * _WAVES
        out[:, number] = (_BASES[y] @ across[:, :, at : at + _WAVES]).reshape(len(thumbnails), -1)
    out *= _FREQUENCY
    out /= np.maximum(np.linalg.norm(out, axis=2, keepdims=True), _LENGTH)
    out[:, :, 0] = np.sqrt(np.maximum(0, 1 - (out**2).sum(2)))
    return out


class _Hashes:
    """Signs of random projections (Charikar, 2002). Signatures judge the similarity of descriptions; keys, from
    centred descriptions, bring like pictures together in the order of a table, also where all are nearly alike."""

    def __init__(self, described: Floats) -> None:
        count = len(described)
        weight = count / (count + 50)  # the centre of a few pictures is none: with two it would make them opposites
        self._mean = described.mean(0) * weight
        self._spread = np.sqrt(described.var(0) * weight + (1 - weight) / described.shape[1] + 1e-4)
        planes = np.random.default_rng(3).standard_normal((described.shape[1], 64 + _TABLES * _KEY_BITS))
        self._sign_planes, self._key_planes = np.split(planes.astype(np.float32), [64], axis=1)

    def signatures(self, described: Floats) -> npt.NDArray[np.uint64]:
        """Shape: (rows,) for described (rows, features)."""
        return np.packbits(described @ self._sign_planes > 0, axis=1).view(np.uint64)[:, 0]

    def keys(self, described: Floats, brightness: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
        """Sortable keys, shape (_TABLES, rows); the brightness orders pictures without detail."""
        bits = ((described - self._mean) / self._spread) @ self._key_planes > 0
        words = np.zeros((len(described), _TABLES, 4), np.uint8)
        words[:, :, :3] = np.packbits(bits.reshape(len(described), _TABLES, _KEY_BITS), axis=2)
        words[:, :, 3] = brightness[:, None]
        return words.view(">u4")[:, :, 0].T.astype(np.uint32)


class _Tables:
    """All pictures, uncropped, in several orders. About 0.2 KiB a picture."""

    def __init__(self, thumbnails: npt.NDArray[np.uint8], rows: Ints) -> None:
        self.described = np.empty((len(rows), _WAVES**2), np.float16)
        self.brightness = np.empty(len(rows), np.uint8)
        parts = [slice(start, start + _CHUNK) for start in range(0, len(rows), _CHUNK)]
        for part in parts:
            pictures = thumbnails[rows[part]]
            self.described[part] = _describe(pictures, _WHOLE)[:, 0]
            self.brightness[part] = pictures.mean((1, 2))
        self.hashes = _Hashes(self.described[:: max(1, len(rows) // _SAMPLE)].astype(np.float32))
        self.signatures = np.empty(len(rows), np.uint64)
        keys = np.empty((_TABLES, len(rows)), np.uint32)
        for part in parts:
            described = self.described[part].astype(np.float32)
            self.signatures[part] = self.hashes.signatures(described)
            keys[:, part] = self.hashes.keys(described, self.brightness[part])
        orders = [np.argsort(key, kind="stable") for key in keys]
        self.tables = [(key[order], order.astype(np.int32)) for key, order in zip(keys, orders, strict=True)]

    def neighbours(self, described: Floats, brightness: npt.NDArray[np.uint8]) -> tuple[Ints, Ints]:
        """Queries (positions in `described`) and pictures that stand near them in some order and have a like signature,
        each pair once."""
        signatures = self.hashes.signatures(described)[:, None]
        steps = np.arange(-_NEIGHBOURS, _NEIGHBOURS)
        found = []
        for (keys, order), wanted in zip(self.tables, self.hashes.keys(described, brightness), strict=True):
            at = np.searchsorted(keys, wanted)[:, None] + steps
            near = order[np.clip(at, 0, len(order) - 1)]
            query, step = np.nonzero(np.bitwise_count(self.signatures[near] ^ signatures) <= _MAX_DISTANCE)
            found.append(query * np.int64(len(order)) + near[query, step])
        query, other = np.divmod(np.unique(np.concatenate(found)), np.int64(len(self.signatures)))
        return query, other


def _propose(thumbnails: npt.NDArray[np.uint8], rows: Ints) -> tuple[Ints, Floats]:
    """Pairs of rows worth aligning, shape (pairs, 2), and the crop of the first that resembles the second most, as
    shares: top, bottom, left, right; shape (pairs, 4)."""
    tables = _Tables(thumbnails, rows)
    parts = [_proposals(tables, thumbnails[rows[i : i + _CHUNK]], i) for i in range(0, len(rows), _CHUNK)]
    first, second, crop, similarity = (np.concatenate(column) for column in zip(*parts, strict=True))
    low, high = np.minimum(first, second), np.maximum(first, second)
    best = _first_of_each(low, high, order=(-similarity, high, low))
    shares = np.array([_PARTS[y] + _PARTS[x] for y, x in _CROPS], np.float32)
    return np.stack([rows[first[best]], rows[second[best]]], 1), shares[crop[best]]


def _proposals(tables: _Tables, pictures: npt.NDArray[np.uint8], start: int) -> tuple[Ints, Ints, Ints, Floats]:
    """The _BEST proposals for each of these pictures: position, position of the other, crop, similarity."""
    crops = len(_CROPS)
    described = _describe(pictures, _CROPS).reshape(len(pictures) * crops, -1)
    brightness = np.repeat(pictures.mean((1, 2)).astype(np.uint8), crops)
    query, other = tables.neighbours(described, brightness)
    similarity = np.empty(len(query), np.float32)
    for i in range(0, len(query), _CHUNK * 16):
        part = slice(i, i + _CHUNK * 16)
        similarity[part] = (described[query[part]] * tables.described[other[part]]).sum(1, dtype=np.float32)
    row = query // crops + start
    good = np.flatnonzero((similarity >= _MIN_SIMILARITY) & (row != other))
    row, other, crop, similarity = row[good], other[good], (query % crops)[good], similarity[good]
    best = _first_of_each(row, other, order=(-similarity, other, row))
    apart = np.abs(tables.brightness[row].astype(np.int16) - tables.brightness[other])  # decides without detail
    best = best[np.lexsort((other[best], apart[best], -similarity[best].round(3), row[best]))]
    rank = np.arange(len(best)) - np.searchsorted(row[best], row[best])
    best = best[rank < _BEST]
    return row[best], other[best], crop[best], similarity[best]


def _first_of_each(one: Ints, two: Ints, *, order: tuple[npt.NDArray[np.generic], ...]) -> Ints:
    """Positions of the first entry of each (one, two), after a lexsort that ends in them."""
    at = np.lexsort(order)
    one, two = one[at], two[at]
    new = np.ones(len(at), bool)
    new[1:] = (one[1:] != one[:-1]) | (two[1:] != two[:-1])
    return at[new]
