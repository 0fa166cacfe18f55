"""Tables of images (CSV, TSV, JSON lines, Parquet) as a `DatasetIndex`, without opening an image."""

from __future__ import annotations

import os
import posixpath
import stat
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError
from goodfit.data.formats.labels import Marks, class_names_beside, given_splits
from goodfit.data.formats.records import Layout, explained, sniff
from goodfit.data.formats.tables import (
    IMAGE_NAMES,
    Roles,
    Table,
    find_tables,
    label_column,
    open_table,
    split_and_group,
)
from goodfit.data.index import NO_SPLIT, DatasetIndex
from goodfit.data.reading import IMAGE_SUFFIXES, How, Problem, Reading, folders, is_image, is_regular, relative

_BOXES = ({"xmin", "ymin", "xmax", "ymax"}, {"x1", "y1", "x2", "y2"}, {"x_min", "y_min", "x_max", "y_max"},
          {"left", "top", "right", "bottom"}, {"x", "y", "width", "height"}, {"x", "y", "w", "h"}, {"bbox"})  # fmt: skip
_LOOKED_UP = 200  # rows whose files show where image names start from
_SUFFIXES = ("", ".jpg", ".png", ".jpeg")  # that image names may lack in a table


def recognise(data: Path) -> str | None:
    """One line that says which table of images this is; None where it is none. Never raises.

    A folder whose pictures lie in folders named as the table's classes is not recognised: it says the same itself.
    """
    try:
        path, _ = find_tables(data, How())[0]
        if not is_regular(path) or sniff(path) is None:
            return None
        table = open_table(path, How())
        image = _image_column(table, How(), set())
        if are_boxes(table) or image is None:
            return None
        base, suffix = _base(table, image, How())
        seen = [_clean(row[image]) for row in table.sample[:_LOOKED_UP]]
        if 2 * sum(_is_file(base / (name + suffix)) for name in seen) <= len(seen):
            return None
        if data.is_dir():
            above = [posixpath.basename(posixpath.dirname(name)) for name in seen]
            same = sum(bool(name) and name in row for name, row in zip(above, table.sample, strict=False))
            if 2 * same > len(seen):
                return None
    except (DataError, OSError, ValueError):
        return None
    return f"{path.name}: a table of images, their paths in column {table.names[image]!r}"


def read(data: Path, how: How) -> Reading:
    """Read a table of images, or several that are splits of one another.

    Paths start from the table's folder, or from the one folder in it (or `how.images`) where they lead to files. Rows
    that say the same twice become one; a file that two rows call differently is left out.

    Raises:
        DataError: the table cannot be read, its columns are in doubt, it holds boxes, or no row can be used.
    """
    with explained(data, Layout(kind="")):
        return _read(find_tables(data, how), how)


def _read(tables: list[tuple[Path, int]], how: How) -> Reading:
    root = tables[0][0].parent
    problems: list[Problem] = []
    seen: dict[str, int] = {}  # the number of each path among those of files, -1 where there is no such file
    files: list[str] = []
    numbers: array[int] = array("q")
    marks, notes, label_name = Marks(), [], ""
    for path, split in tables:
        table = open_table(path, how)
        if label_name and label_name not in table.names:
            problems.append(Problem("missing_label", path.name, f"It has no column {label_name!r}: not read."))
            continue
        roles, image = _roles(table, replace(how, label_column=label_name or how.label_column))
        label_name = table.names[roles.label]
        base, suffix = _base(table, image, how)
        split = NO_SPLIT if how.resplit else split
        for line, _, _, cells in table.rows(problems, path.name):
            name = _clean(cells[image])
            if not name:
                problems.append(Problem("missing_image", f"{path.name}:{line}", "No image is named.", lost=True))
                continue
            name = _from_root(base, name + suffix, root)
            if name not in seen:
                seen[name] = len(files) if _is_file(os.path.join(root, name)) else -1
                if seen[name] >= 0:
                    files.append(name)
            if seen[name] < 0:
                problems.append(Problem("missing_image", name, f"Named in {path.name}:{line}.", lost=True))
            elif marks.add(table.path, roles, line, cells, split):
                numbers.append(seen[name])
            else:
                problems.append(Problem("missing_label", name, f"{path.name}:{line} has no class.", lost=True))
        notes.append(_note(table, roles, image, base, root))
    if not len(numbers):
        missing = sum(problem.kind == "missing_image" for problem in problems)
        detail = f"; {missing} files named in it do not exist" if missing else ""
        raise DataError(f"The list names no image with a class{detail}.", where=str(tables[0][0]),
                        next="paths in the list start from its own folder, or name another: images=FOLDER")  # fmt: skip
    index, said = _index(root, files, np.asarray(numbers, np.int64), marks, problems)
    given = () if how.resplit else given_splits(index.splits)
    return Reading(index=index, format="table", note="; ".join(notes) + said, given_splits=given,
                   problems=tuple(problems))  # fmt: skip


def _roles(table: Table, how: How) -> tuple[Roles, int]:
    """Which columns hold label, split and group, and which the image paths."""
    if are_boxes(table) and how.label_column is None:
        raise DataError("This table holds boxes, not one class per image.", where=str(table.path),
                        next="boxes are read as COCO, YOLO or VOC; for a class list say label_column=COLUMN")  # fmt: skip
    split, group = split_and_group(table, how)
    image = _image_column(table, how, {i for i in (split, group) if i is not None})
    if image is None:
        raise DataError(f"No column of image paths was recognised among {table.listed()}.", where=str(table.path),
                        next="name it: image_column=COLUMN; if its names start from another folder: images=FOLDER")  # fmt: skip
    label = label_column(table, how, {i for i in (split, group, image) if i is not None})
    return Roles(label=label, split=None if how.resplit else split, group=group), image


def _image_column(table: Table, how: How, taken: set[int]) -> int | None:
    """The column of image paths: as asked, by its name, or the one whose values are mostly files."""
    if how.image_column is not None:
        return table.column(how.image_column, "image_column")
    left = [i for i in range(len(table.names)) if i not in taken]
    named = [i for name in IMAGE_NAMES for i in left if table.names[i].lower() == name]
    if len(named) == 1:
        return named[0]
    base = _asked_base(table, how) or table.path.parent
    found: dict[int, float] = {}
    for column in named or left:
        seen = [_clean(value) for value in table.sampled(column)[:_LOOKED_UP]]
        found[column] = sum(_is_file(base / name) or (is_image(Path(name)) and 0.4) for name in seen) / max(
            1, len(seen)
        )
    best = max(found, key=lambda column: found[column], default=None)  # on a tie the first
    return best if best is not None and (named or found[best] > 0.5) else None


def are_boxes(table: Table) -> bool:
    """Whether columns are named as the corners or the size of boxes."""
    names = {name.lower() for name in table.names}
    return any(corners <= names for corners in _BOXES)


def _asked_base(table: Table, how: How) -> Path | None:
    if how.images is None:
        return None
    found = [folder for folder in (table.path.parent / how.images, Path(how.images)) if folder.is_dir()]
    if not found:
        raise DataError("There is no such folder of images.", where=f"images={how.images}",
                        next=f"name a folder, from {table.path.parent} on or with its whole path")  # fmt: skip
    return found[0]


def _base(table: Table, image: int, how: How) -> tuple[Path, str]:
    """The folder that names start from, and the suffix that they lack, by which the most of a sample are files.

    Raises:
        DataError: in several folders there are files of these names.
    """
    asked, root = _asked_base(table, how), table.path.parent
    names = [_clean(value) for value in table.sampled(image)[:_LOOKED_UP]]
    suffixes = ("",) if any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in names) else _SUFFIXES
    for places in ([asked],) if asked else ([root], folders(root)[:_LOOKED_UP]):
        fits = [
            (folder, suffix)
            for folder in places
            for suffix in suffixes
            if 2 * sum(_is_file(folder / (name + suffix)) for name in names) > len(names)
        ]
        if len({folder for folder, _ in fits}) > 1:
            listed = ", ".join(folder.name for folder, _ in fits[:10])
            raise DataError(f"Files of the names in the table are in several folders: {listed}.", where=str(table.path),
                            next=f"name the folder that they start from: images={fits[0][0].name}")  # fmt: skip
        if fits:
            return fits[0]
    return asked or root, ""


def _index(
    root: Path, files: list[str], numbers: npt.NDArray[np.int64], marks: Marks, problems: list[Problem]
) -> tuple[DatasetIndex, str]:
    """The rows in the order of their paths, once each, without files of two labels; and what to say of them."""
    renamed, said = class_names_beside(root, marks.labels)
    targets, names = marks.sorted_targets(renamed, root)
    by_number = np.array(files, object)
    order = np.argsort(by_number, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    table = np.stack([rank[numbers], targets, np.asarray(marks.splits, np.int64), np.asarray(marks.group_numbers)])
    table = table[:, np.lexsort(table[::-1])]
    new = np.append(True, (np.diff(table) != 0).any(axis=0))
    repeated = int((~new).sum())
    table = table[:, new]
    clash = np.flatnonzero((np.diff(table[0]) == 0) & (np.diff(table[1]) != 0))
    clashing = np.isin(table[0], table[0, clash])
    called: dict[int, set[str]] = {}
    for file, target in table[:2, clashing].T.tolist():
        called.setdefault(file, set()).add(names[target])
    for file, its in called.items():
        message = f"The table calls it {' and '.join(sorted(its))}: left out."
        problems.append(Problem("label_conflict", by_number[order[file]], message, lost=True))
    table = table[:, ~clashing]
    if not table.shape[1]:
        raise DataError("Every image in the list has two classes.", where=str(root),
                        next="look at the list: is it the right column? label_column=COLUMN")  # fmt: skip
    index = DatasetIndex(
        root=root,
        paths=by_number[order[table[0]]].tolist(),
        targets=table[1],
        class_names=names,
        splits=table[2].astype(np.int8),
        groups=table[3],
    )
    return index, said + (f"; {repeated} repeated rows are read once" if repeated else "")


def _note(table: Table, roles: Roles, image: int, base: Path, root: Path) -> str:
    note = f"{table.path.name}: images in column {table.names[image]!r}, classes in {table.names[roles.label]!r}"
    if base != root:
        note += f", files in {base.name}"
    if roles.split is not None:
        note += f", splits in {table.names[roles.split]!r}"
    if table.layout.encoding != "utf-8":
        note += f", in {table.layout.encoding}"
    return note


def _clean(cell: str) -> str:
    return cell.strip().replace("\\", "/")


def _from_root(base: Path, name: str, root: Path) -> str:
    if base != root and not os.path.isabs(name):
        name = posixpath.join(relative(base, root), name)
    return posixpath.normpath(name)


def _is_file(path: str | Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False
