"""Words to options: `key=value`, `--key value`, `--key=value`, `--flag` and `--no-flag` all mean the same."""

from __future__ import annotations

from collections.abc import Sequence

from goodfit.config.parse import unknown_option
from goodfit.config.request import options, spellings
from goodfit.core.errors import RequestError

OUTPUT = {
    "json": "turn the last line of standard output into one JSON object",
    "debug": "show the traceback of an error",
    "cfg": "YAML file of options; the command line wins over it",
}


def split_words(words: Sequence[str], *, extra: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """Separate places from options.

    Args:
        words: What followed the command.
        extra: Options of this command alone.

    Returns:
        The positional words, and the options by the spelling used.

    Raises:
        RequestError: an option is given twice, or has no value.
    """
    places: list[str] = []
    asked: dict[str, str] = {}
    problems: list[str] = []
    waiting = list(words)
    only_places = False
    while waiting:
        word = waiting.pop(0)
        if only_places or word in ("-", "") or not _is_option(word):
            places.append(word)
            continue
        if word == "--":
            only_places = True
            continue
        key, equals, value = word.lstrip("-").partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            key, value = _without_equals(key, waiting, problems)
        if key in asked:
            problems.append(f"{key}: given twice")
        asked[key] = value.strip()
    if problems:
        _check_names(asked, extra, problems)
        raise RequestError("The options cannot be used:\n" + "\n".join(f"  {p}" for p in problems),
                           kept="nothing was started", next="goodfit train --help lists every option")  # fmt: skip
    return places, asked


def _is_option(word: str) -> bool:
    if word.startswith("--"):
        return True
    key, equals, _ = word.partition("=")
    return bool(equals) and key.strip().replace("-", "_").isidentifier()


def _without_equals(key: str, waiting: list[str], problems: list[str]) -> tuple[str, str]:
    """`--key value`, or a flag: `--key` alone is true, `--no-key` is false."""
    names = spellings()
    kinds = options()
    flags = {s for s, n in names.items() if kinds[n].kind == "bool"} | {"json", "debug", "amp"}
    if key.startswith("no_") and key[3:] in flags:
        return key[3:], "false"
    follows = waiting and not _is_option(waiting[0])
    if key in flags and (
        not follows or waiting[0].lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off")
    ):
        return key, "true"
    if not follows:
        problems.append(f"--{key.replace('_', '-')}: a value is missing")
        return key, ""
    return key, waiting.pop(0)


def _check_names(asked: dict[str, str], extra: Sequence[str], problems: list[str]) -> None:
    known = [*spellings(), *OUTPUT, *extra, "amp"]
    problems += [unknown_option(key, known) for key in asked if key not in known]


def take_output_options(asked: dict[str, str]) -> dict[str, bool]:
    """Remove `json` and `debug` from the options and return them as truth values."""
    return {name: asked.pop(name, "false").lower() in ("true", "1", "yes", "on") for name in ("json", "debug")}
