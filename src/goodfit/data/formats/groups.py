"""Which samples belong together, where no column says so: by the folder that a file lies in, or by a part of its name."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import RequestError
from goodfit.data.index import NO_GROUP

FOLDER = "folder"
_WAYS = "a key of COCO's images, group=folder for the folder that a file lies in, or a pattern with the part of the path in parentheses, as group='(.*)_[0-9]+'"


def group_names(paths: Sequence[str], asked: str) -> list[str]:
    """The group of each path; "" where it belongs to none.

    Args:
        paths: Relative to the dataset, with forward slashes.
        asked: "folder", or a regular expression whose only group, found anywhere in a path, names the samples that belong together.

    Raises:
        RequestError: it is neither, or found in no path.
    """
    if asked == FOLDER:
        return [path.rpartition("/")[0] for path in paths]
    try:
        pattern = re.compile(asked)
    except re.error as error:
        raise RequestError(f"group={asked} is no pattern: {error}.", where="group=", next=f"use {_WAYS}") from error
    if pattern.groups != 1:
        raise RequestError(
            f"group={asked} does not say which part of a file's path names the group.",
            where="group=",
            next=f"use {_WAYS}",
        )
    found = [pattern.search(path) for path in paths]
    if paths and not any(found):
        raise RequestError(f"group={asked} is found in none of the {len(paths):,} paths; the first is {paths[0]}.", where="group=",
                           next=f"mend it, or use {_WAYS}")  # fmt: skip
    return [match[1] or "" if match else "" for match in found]


def group_numbers(names: Sequence[str]) -> npt.NDArray[np.int64]:
    """A number for each name, NO_GROUP for "". Shape: (rows,)."""
    numbers = {name: number for number, name in enumerate(sorted(set(names) - {""}))}
    return np.array([numbers.get(name, NO_GROUP) for name in names], np.int64)
