"""Counter-based random numbers: pure functions of a key, with no generator to carry along.

A draw is a hash of its key, so any worker, process or resumed run that knows the key (seed, epoch, sample) draws the
same number, in any order. The hash is the finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom
number generators", OOPSLA 2014), applied once per part of the key.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Key = int | npt.NDArray[np.integer]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def stream(name: str) -> int:
    """A 63-bit key part for a named use, so that two uses of one (seed, epoch) never share their draws."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def hash64(*keys: Key) -> npt.NDArray[np.uint64]:
    """Hash the parts of a key to 64 bits each; arrays among the parts broadcast. Shape: that of the broadcast parts."""
    state: npt.NDArray[np.uint64] = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            part = np.asarray(key).astype(np.int64).view(np.uint64) if not isinstance(key, int) else _as_uint64(key)
            state = (state ^ part) + _GAMMA
            state = (state ^ (state >> np.uint64(30))) * _MIX_1
            state = (state ^ (state >> np.uint64(27))) * _MIX_2
            state = state ^ (state >> np.uint64(31))
    return state


def _as_uint64(value: int) -> np.uint64:
    return np.uint64(value & 0xFFFFFFFFFFFFFFFF)


def uniform(*keys: Key) -> npt.NDArray[np.float64]:
    """Draws from [0, 1), 53 bits each; arrays among the parts of the key broadcast."""
    return (hash64(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(num: int, *keys: int) -> npt.NDArray[np.int64]:
    """A permutation of range(num) that depends on the key alone. Shape: (num,)."""
    return np.argsort(hash64(*keys, np.arange(num)), kind="stable").astype(np.int64)


def derive_seed(*keys: int) -> int:
    """A seed for a library's own generator (63 bits, never negative)."""
    return int(hash64(*keys)) >> 1
