"""Class, split and group of each row, noted while a table or a text file is read."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError
from goodfit.data.formats.encoding import BINARY, detect_encoding
from goodfit.data.formats.tables import Roles
from goodfit.data.index import NO_GROUP, NO_SPLIT, SPLITS
from goodfit.data.reading import is_regular, split_number

_NAME_FILES = ("classes.txt", "class_names.txt", "label_names.txt", "labels.txt")
_MAX_LABEL = 100  # characters of a class name that a message shows


@dataclass(slots=True)
class Marks:
    """Class, split and group of each row as the tables are read, one number each."""

    labels: dict[str, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    targets: array[int] = field(default_factory=lambda: array("q"))
    splits: array[int] = field(default_factory=lambda: array("b"))
    group_numbers: array[int] = field(default_factory=lambda: array("q"))

    def add(self, path: Path, roles: Roles, line: int, cells: list[str], split: int) -> bool:
        """Note one row; False, and nothing noted, where it has no label.

        Raises:
            DataError: its split is none, or it brings more classes than there can be.
        """
        label = cells[roles.label].strip()
        if not label:
            return False
        if roles.split is not None and (word := cells[roles.split].strip()):
            number = split_number(word)
            if number is None:
                raise DataError(f"The split {word[:50]!r} of line {line} is none of train, val, test.",
                                where=str(path),
                                next="mend it, name another column: split_column=COLUMN, or split anew: resplit=true")  # fmt: skip
            split = number
        group = cells[roles.group].strip() if roles.group is not None else ""
        self.targets.append(self.labels.setdefault(label, len(self.labels)))
        self.splits.append(split)
        self.group_numbers.append(self.groups.setdefault(group, len(self.groups)) if group else NO_GROUP)
        return True

    def sorted_targets(self, renamed: dict[str, str], where: Path) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
        """The targets by position in the sorted class names, and these names.

        Raises:
            DataError: there is one class only.
        """
        wanted = [renamed.get(label, label) for label in self.labels]
        names = tuple(sorted(set(wanted)))
        if len(names) < 2:
            raise DataError(f"There is one class only: {' '.join(' '.join(names).split())[:_MAX_LABEL]}.", where=str(where),
                            next="a classifier needs at least two classes; is it the right column? label_column=COLUMN")  # fmt: skip
        position = {name: i for i, name in enumerate(names)}
        return np.array([position[name] for name in wanted], np.int64)[np.asarray(self.targets)], names


def class_names_beside(folder: Path, labels: Iterable[str]) -> tuple[dict[str, str], str]:
    """Names for classes that are numbers, from a classes.txt beside the data, and what to say of it.

    Line n names class n, or class n - 1 where there is a class 0.
    """
    labels = list(labels)
    path = next((p for p in (folder / name for name in _NAME_FILES) if is_regular(p)), None)
    if path is None or not all(label.isdecimal() and len(label) < 6 for label in labels):
        return {}, ""
    try:
        data = path.read_bytes()
        encoding = detect_encoding(data)
        lines = [] if encoding == BINARY else [line.strip() for line in data.decode(encoding).splitlines()]
    except OSError:
        return {}, ""
    lines = lines[: next((i for i in range(len(lines), 0, -1) if lines[i - 1]), 0)]
    first = 0 if any(int(label) == 0 for label in labels) else 1
    if not all(0 <= int(label) - first < len(lines) for label in labels) or len(set(lines)) < len(lines):
        return {}, f"; {path.name} is not used: it has {len(lines)} names, which do not fit the classes"
    return {
        label: lines[int(label) - first] for label in labels
    }, f"; class names from {path.name}, line 1 is class {first}"


def given_splits(splits: npt.NDArray[np.int8]) -> tuple[str, ...]:
    """Which splits the rows name; with train, which is what is left, where they name any."""
    given = {int(s) for s in np.unique(splits)} - {NO_SPLIT}
    return tuple(name for i, name in enumerate(SPLITS) if i in given or i == 0) if given else ()
