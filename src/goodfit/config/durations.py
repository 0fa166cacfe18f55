"""Lengths of training as people write them: epochs, steps, or a share of the whole; and lengths of time."""

from __future__ import annotations

import math
import re

_LENGTH = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(epochs?|steps?|%)?")
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(hours|hour|h|minutes|minute|min|m|seconds|second|sec|s|days|day|d)")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "d": 86400.0}


def parse_length(value: object) -> str:
    """A length of training in its shortest spelling: "3" (epochs), "500steps" or "5%".

    Raises:
        ValueError: it is none of these, or not finite.
    """
    found = _LENGTH.fullmatch(str(value).strip().lower())
    if found is None or isinstance(value, bool) or not math.isfinite(float(found[1])):
        raise ValueError("must be a length, as 3 (epochs), 500steps or 5%")
    unit = (found[2] or "").rstrip("s")
    if unit == "%" and float(found[1]) > 100:
        raise ValueError("must be at most 100 % of the run")
    return f"{float(found[1]):g}" + {"step": "steps", "%": "%"}.get(unit, "")


def in_epochs(length: str, *, epochs: int, steps_per_epoch: int) -> float:
    """A length, as `parse_length` gives it, in epochs of a run of so many epochs."""
    if length.endswith("steps"):
        return float(length.removesuffix("steps")) / steps_per_epoch
    if length.endswith("%"):
        return float(length.removesuffix("%")) / 100 * epochs
    return float(length)


def parse_seconds(value: object) -> float:
    """A length of time with its units, as "2h", "90 min" or "1h30m", in seconds. A number alone is refused: peers mean
    hours by it, others seconds.

    Raises:
        ValueError: it is not such a length, or zero.
    """
    text = str(value).strip().lower().replace(" ", "")
    parts = _TIME.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("must be a time with its unit, as 2h, 90m or 1h30m")
    seconds = sum(float(number) * _SECONDS[unit[0]] for number, unit in parts)
    if not 0 < seconds < 1e9:
        raise ValueError("must be a time above zero")
    return seconds
