"""From words to a checked `TrainRequest`: all problems are reported together, each with the nearest valid name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from goodfit.config.durations import parse_length, parse_seconds
from goodfit.config.request import Option, TrainRequest, options, spellings
from goodfit.config.yaml12 import read_yaml
from goodfit.core.errors import RequestError

_TRUE = ("true", "1", "yes", "on")
_FALSE = ("false", "0", "no", "off")
_DECIDE = ("auto", "null", "")


class BadValue(ValueError):
    """One value that its option does not take; the text says what it takes."""


def parse_request(asked: Mapping[str, Any], *, allowed: Sequence[str] | None = None) -> TrainRequest:
    """Check what was asked and turn it into a request.

    Args:
        asked: Option names or aliases and their values, as text (command line) or plain types (Python, YAML).
        allowed: Field names that the command takes; None allows all.

    Raises:
        RequestError: any name is unknown or any value is bad; every problem is listed, each on its own line.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    amp = None
    asked = _other_fields(asked)
    names = spellings()
    for key, value in asked.items():
        spelling = str(key).replace("-", "_")
        if spelling == "amp" and (allowed is None or "precision" in allowed):
            amp = value
            continue
        name = names.get(spelling)
        if name is None or (allowed is not None and name not in allowed):
            problems.append(unknown_option(spelling, names if allowed is None else allowed, known=name is not None))
            continue
        if name in values:
            problems.append(f"{spelling}: given twice (an alias of {name})")
            continue
        try:
            values[name] = coerce(name, options()[name], value)
        except BadValue as error:
            problems.append(f"{spelling}={value}: {error}")
    if amp is not None:
        _ask_amp(values, amp, problems)
    if values.get("lr") is not None and values.get("lr_find"):
        problems.append(f"lr={values['lr']:g} contradicts lr=find: one of them")
    if problems:
        count = "One option" if len(problems) == 1 else f"{len(problems)} options"
        raise RequestError(
            f"{count} cannot be used:\n" + "\n".join(f"  {p}" for p in problems),
            kept="nothing was started",
            next="goodfit train --help lists every option",
        )
    return TrainRequest(**values)


def read_request(words: Mapping[str, Any], *, allowed: Sequence[str] | None = None) -> TrainRequest:
    """As parse_request, where `cfg` may name a YAML file of options; the other words win over the file."""
    merged = dict(words)
    cfg = merged.pop("cfg", None)
    if cfg is not None:
        names = spellings()
        later = {names.get(str(key).replace("-", "_"), key) for key in merged}
        merged = {k: v for k, v in read_yaml(Path(str(cfg))).items() if names.get(k, k) not in later} | merged
    return parse_request(merged, allowed=allowed)


def unknown_option(name: str, known_names: Sequence[str] | Mapping[str, str], *, known: bool = False) -> str:
    """One line about a name that is not an option, with the nearest one that is."""
    if known:
        return f"{name}: this command does not take it"
    near = difflib.get_close_matches(name, list(known_names), n=1, cutoff=0.6)
    return f"{name}: no such option" + (f"; did you mean {near[0]}?" if near else "")


def coerce(name: str, option: Option, value: Any) -> Any:
    """Turn one value into its field's type.

    Raises:
        BadValue: the value is of another type, not among the choices, or out of range.
    """
    if value is None or (option.kind != "text" and isinstance(value, str) and value.strip().lower() in _DECIDE):
        return None
    if (name, str(value).strip().lower()) in (("batch", "-1"), ("model", "auto")):
        return None
    if option.kind == "bool":
        return _to_bool(value)
    if option.kind in ("int", "float"):
        return _to_number(option, value)
    if option.kind == "milliseconds":
        return _to_milliseconds(option, value)
    if option.kind in ("length", "lengths", "seconds"):
        return _to_length(option, value)
    if option.kind == "choice":
        return _to_choice(name, option, value)
    if option.kind == "split":
        return _to_split(value)
    if option.kind == "pretrained" and (isinstance(value, bool) or str(value).lower() in (*_TRUE, *_FALSE)):
        return str(_to_bool(value)).lower()
    if isinstance(value, Path | str | int | float) and not isinstance(value, bool) and str(value).strip():
        return str(value)
    raise BadValue("must be text")


def _other_fields(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Words that are asked of one field and mean another: a share of the memory, a study, a search."""
    made = dict(asked)
    for field, translate in (("batch", _batch_words), ("lr", _lr_words)):
        for spelling in [s for s, name in spellings().items() if name == field and s in made]:
            other = translate(str(made[spelling]).strip().lower())
            if other is not None:
                del made[spelling]
                made[other[0]] = other[1]
    return made


def _batch_words(text: str) -> tuple[str, Any] | None:
    """`batch=0.7` is a share of the memory, not a number of samples; `batch=study` trains the sizes."""
    if text == "study":
        return "batch_study", True
    try:
        number = float(text.removesuffix("%")) * (0.01 if text.endswith("%") else 1)
    except ValueError:
        return None
    return ("memory", number) if 0 < number < 1 else None


def _lr_words(text: str) -> tuple[str, Any] | None:
    return ("lr_find", True) if text == "find" else None


def _ask_amp(values: dict[str, Any], value: Any, problems: list[str]) -> None:
    """`amp=false` asks for fp32; `amp=true` leaves bf16 or fp16 to the hardware, which is what the plan does anyway."""
    try:
        amp = _to_bool(value)
    except BadValue as error:
        problems.append(f"amp={value}: {error}")
        return
    precision = values.get("precision")
    if precision is not None and amp == (precision in ("fp32", "tf32")):
        problems.append(f"amp={str(amp).lower()} contradicts precision={precision}")
    elif not amp:
        values["precision"] = "fp32"


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise BadValue("must be true or false")


def _to_number(option: Option, value: Any) -> int | float:
    whole = option.kind == "int"
    wanted = "a whole number" if whole else "a number"
    if isinstance(value, bool):
        raise BadValue(f"must be {wanted}")
    text = str(value).strip().replace("_", "")
    scale = 1.0
    if not whole and text.endswith("%"):
        text, scale = text[:-1], 0.01
    try:
        number = float(text) * scale
    except ValueError:
        raise BadValue(f"must be {wanted}") from None
    if not math.isfinite(number) or (whole and number != int(number)):
        raise BadValue(f"must be {wanted}")
    if option.low is not None and number < option.low:
        raise BadValue(f"must be {wanted} of at least {option.low:g}")
    if option.high is not None and number > option.high:
        raise BadValue(f"must be {wanted} of at most {option.high:g}")
    return int(number) if whole else number


_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def _to_milliseconds(option: Option, value: Any) -> float:
    """`10ms`, `0.5s`, `800us`, or a number in Python and YAML, which is milliseconds; text without a unit is refused."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(_to_number(option, value))
    text = str(value).strip().lower().replace(" ", "").replace("µs", "us")
    unit = next((u for u in _UNITS if text.endswith(u)), None)
    if unit is None:
        raise BadValue("must be a time with its unit, as 10ms, 0.5s or 800us")
    return float(_to_number(option, text.removesuffix(unit))) * _UNITS[unit]


def _to_length(option: Option, value: Any) -> str | float:
    """A length of training, several of them joined by commas, or a length of time (seconds; also a number in YAML)."""
    try:
        if option.kind == "seconds":
            return float(value) if isinstance(value, float) and value > 0 else parse_seconds(value)
        if option.kind == "lengths":
            parts = value if isinstance(value, list | tuple) else str(value).split(",")
            return ",".join(parse_length(part) for part in parts)
        return parse_length(value)
    except ValueError as error:
        raise BadValue(str(error)) from error


_OFF = {"false": "off", "none": "off", "no": "off"}
_CHOICE_WORDS = {  # other words for a choice; cache=True means "keep them", as elsewhere
    "cache": {"true": "ram", **_OFF}, "augment": _OFF, "compile": {"true": "default", **_OFF},
    "policy": {**_OFF, "trivialaugment": "trivial", "randaugment": "rand"},
    "balance": {**_OFF, "weights": "loss"}, "format": {"csv": "table", "tsv": "table", "jsonl": "table", "parquet": "table"},
    "schedule": {"one-cycle": "onecycle", "1cycle": "onecycle", "warm-restarts": "restarts", "cyclical": "triangular",
                 "cyclic": "triangular", "multi-step": "multistep", "cos": "cosine", "exp": "exponential", "exp_range": "exp-range"},
    "task": {"classification": "classify", "detection": "detect", "segmentation": "segment"},
}  # fmt: skip


def _to_choice(name: str, option: Option, value: Any) -> str:
    text = str(value).strip().lower()
    text = _CHOICE_WORDS.get(name, {}).get(text, text)
    if text not in option.choices:
        near = difflib.get_close_matches(text, option.choices, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadValue(f"must be one of {', '.join(option.choices)}{hint}")
    return text


def _to_split(value: Any) -> str:
    try:
        shares = [float(part) for part in str(value).split("/")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(math.isfinite(s) and s > 0 for s in shares):
        raise BadValue("must be three shares above zero, as 70/15/15")
    total = sum(shares)
    return "/".join(f"{100 * share / total:g}" for share in shares)
