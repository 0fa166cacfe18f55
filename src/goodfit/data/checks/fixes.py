"""Corrections that a person marked on the audit page: `fixes.csv`, read strictly and applied to the index alone."""

from __future__ import annotations

import csv
import difflib
import io
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from goodfit.core.errors import DataError
from goodfit.data.index import LEFT_OUT, DatasetIndex
from goodfit.data.reading import is_regular

ACTIONS = ("relabel", "leave_out", "keep")
MAX_BYTES = 256 * 2**20  # a line for each of a million files takes 100 MB; more is some other file

MAX_FIELD = 100_000  # characters of a path or label

_COLUMNS = ("path", "label", "action")
_HEADER = "the first line must be: path,label,action"


@dataclass(frozen=True, slots=True)
class Fix:
    """One line of fixes.csv.

    Attributes:
        path: What the index calls the sample: its file, with `@offset` for a line of a text file.
        label: The right class, for relabel.
        action: relabel, leave_out, or keep (the label is right: not to be reported as suspect again).
        where: File and line of the fix, for messages.
    """

    path: str
    label: str
    action: str
    where: str = ""


def read_fixes(path: Path) -> tuple[Fix, ...]:
    """Read corrections: CSV by RFC 4180 in UTF-8, with the columns path, label and (may be absent) action.

    Without an action, an empty label means leave_out and any other means relabel. The same line twice is one fix.

    Raises:
        DataError: the file cannot be read, is not such a table, or says two things about one path.
    """
    lines = csv.reader(io.StringIO(_read(path), newline=""), strict=True)
    places: list[int] = []
    fixes: dict[str, Fix] = {}
    start = 1
    try:
        for row in lines:
            where = f"{path}:{start}"
            start = lines.line_num + 1  # a quoted path may hold line breaks
            if not places:
                places = _places(row, where)
            elif any(row):
                fix = _fix(row, places, where)
                old = fixes.setdefault(fix.path, fix)
                if (old.action, old.label) != (fix.action, fix.label):
                    raise DataError(f"Two lines say different things about {fix.path!r}: {_say(old)} and {_say(fix)}.",
                                    where=where, next=f"delete one of them; the other is {old.where}")  # fmt: skip
    except csv.Error as error:
        raise DataError(f"This is not proper CSV: {error}.", where=f"{path}:{start}",
                        next='close every quote, and write a quote within a quoted field as ""') from error  # fmt: skip
    if not places:
        raise DataError("The file of fixes is empty.", where=str(path), next=_HEADER)
    return tuple(fixes.values())


def _read(path: Path) -> str:
    if not is_regular(path):
        raise DataError("There is no such file of fixes.", where=str(path),
                        next="save one from the audit page, or correct the path in labels=FILE")  # fmt: skip
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"The file of fixes is larger than {MAX_BYTES >> 20} MB.", where=str(path), next=_HEADER)
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"The file of fixes cannot be read: {error.strerror}.", where=str(path)) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError("The file of fixes is not in UTF-8.", where=f"{path}:{line}",
                        next='save it again as "CSV UTF-8"') from error  # fmt: skip


def _places(header: list[str], where: str) -> list[int]:
    """Where path, label and action stand in a row; -1 for an action that is absent."""
    names = [name.strip().lower() for name in header]
    unknown = [name for name in names if name not in _COLUMNS]
    missing = [name for name in _COLUMNS[:2] if name not in names]
    if unknown or missing or len(set(names)) != len(names):
        found = ", ".join(repr(n[:40]) for n in names[:6]) or "nothing"
        raise DataError(f"The columns must be path, label and action, not {found}.", where=where, next=_HEADER)
    return [names.index(name) if name in names else -1 for name in _COLUMNS]


def _fix(row: list[str], places: list[int], where: str) -> Fix:
    if len(row) != sum(p >= 0 for p in places):
        raise DataError(f"This line has {len(row)} fields, the first line {sum(p >= 0 for p in places)}.", where=where,
                        next='put quotes around a path or label that holds a comma: "a, b.jpg"')  # fmt: skip
    if max(map(len, row)) > MAX_FIELD:  # said here, since the csv module's own limit is one for the whole process
        raise DataError(f"This is not proper CSV: a field has more than {MAX_FIELD:,} characters.", where=where,
                        next="close every quote; no path or label is that long")  # fmt: skip
    path, label, action = (row[place] if place >= 0 else "" for place in places)
    label, action = label.strip(), action.strip().lower()
    action = action or ("relabel" if label else "leave_out")
    if action not in ACTIONS:
        near = difflib.get_close_matches(action[:40], ACTIONS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"There is no action {action[:40]!r}{hint}", where=where,
                        next="write relabel, leave_out or keep")  # fmt: skip
    if not path:
        raise DataError("This line names no path.", where=where, next="fill in the path, or delete the line")
    if action == "relabel" and not label:
        raise DataError(f"{path!r} is to be relabelled, but there is no label.", where=where,
                        next="fill in the label, or write leave_out as the action")  # fmt: skip
    return Fix(path, label if action == "relabel" else "", action, where)


def _say(fix: Fix) -> str:
    return f"{fix.action} {fix.label!r}" if fix.label else fix.action


def kept_paths(fixes: Sequence[Fix]) -> frozenset[str]:
    """The paths whose label a person has confirmed or given: no suspects any more."""
    return frozenset(fix.path for fix in fixes if fix.action != "leave_out")


def shown_path(path: str) -> str:
    """A path as a page or a table in UTF-8 can hold it: bytes of a file name that are no UTF-8 become U+FFFD."""
    try:
        return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return path.encode("utf-8", "replace").decode("utf-8")


def apply_fixes(index: DatasetIndex, fixes: Sequence[Fix]) -> tuple[DatasetIndex, list[str], list[str]]:
    """The index with corrected classes and without the rows to leave out; no file is changed.

    Meant for an index before its audit, so that a conflict that a fix settles is none any more. A path is found as the
    index calls it, and otherwise without "./", with backslashes, from the root of the file system, or (file names that
    are no UTF-8) as the audit page shows it.

    Returns:
        The index; the paths that were found, in the order of the fixes, `keep` among them; and those that were not.

    Raises:
        DataError: a label is no class of this dataset, or its samples have no single label.
    """
    rows_of = _find(index, fixes)
    numbers = {shown_path(name): number for number, name in enumerate(index.class_names)}  # folders may be no UTF-8
    numbers |= {name: number for number, name in enumerate(index.class_names)}
    targets, splits = index.targets.copy(), index.splits.copy()
    applied: list[str] = []
    unknown: list[str] = []
    for fix in fixes:
        if fix.action == "relabel":
            _check_label(index, fix, numbers)
        rows = rows_of.get(fix.path)
        (applied if rows else unknown).append(fix.path)
        if rows and fix.action == "relabel":
            targets[rows] = numbers[fix.label]
        elif rows and fix.action == "leave_out":
            splits[rows] = LEFT_OUT
    return replace(index, targets=targets, splits=splits), applied, unknown


def _check_label(index: DatasetIndex, fix: Fix, numbers: dict[str, int]) -> None:
    if index.objects is not None or not numbers:
        raise DataError(f"{fix.path!r} cannot be relabelled: a sample of this task has no single label.",
                        where=fix.where, next="write leave_out as the action, or correct its annotation")  # fmt: skip
    if fix.label not in numbers:
        near = difflib.get_close_matches(fix.label[:200], index.class_names, n=3)
        some = ", ".join(near or index.class_names[:8]) + (" …" if not near and len(numbers) > 8 else "")
        raise DataError(f"There is no class {fix.label[:200]!r} in this dataset.", where=fix.where,
                        next=f"write one of its classes, such as: {some}" if near else f"its classes are: {some}")  # fmt: skip


def _find(index: DatasetIndex, fixes: Sequence[Fix]) -> dict[str, list[int]]:
    """The rows of each fix, by its path; one pass over the index, and another if some are not found as they stand."""
    found: dict[str, list[int]] = {fix.path: [] for fix in fixes}
    for row, name in enumerate(_names(index) if found else ()):
        if name in found:
            found[name].append(row)
    missing = [path for path, rows in found.items() if not rows]
    if not missing:
        return found
    base = index.root.absolute().as_posix().rstrip("/") + "/"
    plain: dict[str, list[int]] = {_plain(path, base): [] for path in missing}
    shown: dict[str, list[int]] = {path: [] for path in missing if "\ufffd" in path}
    for row, name in enumerate(_names(index)):
        if name in plain:
            plain[name].append(row)
        elif shown and not name.isascii() and (as_shown := shown_path(name)) in shown:
            shown[as_shown].append(row)
    for path in missing:
        rows = plain[_plain(path, base)] or shown.get(path, [])
        if len({index.paths[r] for r in rows}) == 1:  # of two files that are shown alike nobody can say which is meant
            found[path] = rows
    return found


def _names(index: DatasetIndex) -> Sequence[str]:
    if index.offsets is None:
        return list(index.paths)
    return [f"{path}@{offset}" for path, offset in zip(index.paths, index.offsets.tolist(), strict=True)]


def _plain(path: str, base: str) -> str:
    """Another spelling of a path: relative to the root `base`, with forward slashes and without "./"."""
    path = posixpath.normpath(path.replace("\\", "/"))
    return path[len(base) :] if path.startswith(base) else path
