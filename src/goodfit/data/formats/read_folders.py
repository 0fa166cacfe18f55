"""One folder of images per class, with or without folders of splits around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from goodfit.core.errors import DataError
from goodfit.data.formats.groups import group_names
from goodfit.data.index import NO_GROUP, NO_SPLIT, SPLITS, DatasetIndex
from goodfit.data.reading import (
    How,
    Problem,
    Reading,
    files_below,
    folders,
    is_image,
    relative,
    split_number,
    unread_picture,
    unread_pictures,
)

FEW_FOLDERS = 4  # more are classes, two of which happen to be called so
_IMAGES = ("images", "image", "imgs", "img")
_MASKS = ("masks", "mask", "labels", "label", "annotations", "segmentations")


def recognise(data: Path) -> str | None:
    """One line if images lie in folders below, else None."""
    if not data.is_dir() or not any(_has_images(f) for f in folders(data)):
        return None
    return "one folder per class"


def read(data: Path, how: How) -> Reading:
    """Read class folders.

    Raises:
        DataError: there are no images, no class folders, one class only, or folders of unclear meaning.
    """
    if data.is_file():
        raise DataError("This is a file, not a folder of class folders.", where=str(data),
                        next="give the folder that holds one folder per class")  # fmt: skip
    children = folders(data)
    given = {n: child for child in children if (n := split_number(child.name)) is not None}
    places = _places(data, children, given)
    rows: list[tuple[str, str, int]] = []
    problems: list[Problem] = []
    for split, root in places:
        _refuse_masks(root)
        problems += [Problem("missing_label", relative(p, data), lost=True) for p in loose_images(root)]
        for folder in folders(root):
            files = files_below(folder)
            unread = set(unread_pictures(files))
            for file in files:
                if is_image(file):
                    rows.append((relative(file, data), folder.name, split))
                elif file in unread:
                    problems.append(unread_picture(relative(file, data), file))
                else:
                    problems.append(Problem("wrong_type", relative(file, data)))
    if not rows:
        lost = next((p for p in problems if p.kind == "unreadable"), None)
        if lost is not None:
            raise DataError(
                f"No image that can be read was found: {lost.item}: {lost.message}",
                where=str(data),
                next="convert them",
            )
        refuse_no_images(data)
    paths = [path for path, _, _ in rows]
    groups = {} if how.group is None else dict(zip(paths, group_names(paths, how.group), strict=True))
    if how.resplit:
        rows = [(path, name, NO_SPLIT) for path, name, _ in rows]
    split_given = len(places) > 1
    names = [root.name for _, root in places]
    layout = f"class folders under {', '.join(names)}" if split_given else "one folder per class"
    return Reading(
        index=class_index(data, rows, {path: name for path, name in groups.items() if name}),
        format="folders",
        note=layout + ("; their split is ignored" if split_given and how.resplit else ""),
        given_splits=tuple(SPLITS[n] for n in sorted(given)) if split_given and not how.resplit else (),
        problems=tuple(problems),
    )


def _refuse_masks(root: Path) -> None:
    """Pictures and their masks are no two classes."""
    names = {folder.name.lower(): folder.name for folder in folders(root)}
    images, masks = (next((names[n] for n in known if n in names), None) for known in (_IMAGES, _MASKS))
    if images is not None and masks is not None and len(names) <= FEW_FOLDERS:
        raise DataError(f"The folders {images} and {masks} are no classes.", where=str(root), next="of masks these layouts are read: "
                        "ID/images/ and ID/masks/ with one file per object, COCO JSON, or YOLO polygons")  # fmt: skip


def _places(data: Path, children: list[Path], given: dict[int, Path]) -> list[tuple[int, Path]]:
    """The folders that hold class folders, with the split of each."""
    if 0 in given and len(given) > 1:
        extra = [c.name for c in children if c not in given.values() and _has_images(c)]
        if extra:
            raise DataError(f"Beside {', '.join(p.name for p in given.values())} there are folders with images: "
                            f"{', '.join(extra)}.", where=str(data),
                            next="move them away, or put them into one of the splits")  # fmt: skip
        return [(n, given[n]) for n in sorted(given)]
    if len(children) == 1 and folders(children[0]) and not loose_images(children[0]):
        raise DataError("There is one folder, and it holds folders: the class folders may be one level down.",
                        where=str(data), next=f"try: goodfit train {children[0]}")  # fmt: skip
    return [(NO_SPLIT, data)]


def class_index(root: Path, rows: list[tuple[str, str, int]], groups: dict[str, str] | None = None) -> DatasetIndex:
    """An index of (path, class, split) rows in the order of their paths.

    Raises:
        DataError: there is one class only.
    """
    rows = sorted(rows)
    names = tuple(sorted({name for _, name, _ in rows}))
    if len(names) < 2:
        raise DataError(f"There is one class only: {names[0]}.", where=str(root),
                        next="a classifier needs at least two class folders")  # fmt: skip
    number = {name: i for i, name in enumerate(names)}
    groups = groups or {}
    group_number = {name: i for i, name in enumerate(sorted(set(groups.values())))}
    return DatasetIndex(
        root=root,
        paths=tuple(path for path, _, _ in rows),
        targets=np.array([number[name] for _, name, _ in rows], np.int64),
        class_names=names,
        splits=np.array([split for _, _, split in rows], np.int8),
        groups=np.array([group_number[groups[p]] if p in groups else NO_GROUP for p, _, _ in rows], np.int64),
    )


def refuse_no_images(root: Path) -> None:
    """Say what a folder without class folders of images looks like instead; always raises DataError."""
    loose = loose_images(root) if root.is_dir() else []
    if loose:
        raise DataError(f"There are {len(loose)} images, but no class folders around them.", where=str(root),
                        next="put the images of each class into a folder of its name, or give a CSV list")  # fmt: skip
    if root.is_dir() and not any(root.iterdir()):
        raise DataError("The folder is empty.", where=str(root), next="put one folder of images per class into it")
    raise DataError("No images were found.", where=str(root),
                    next="give the folder that holds one folder per class, with images in each")  # fmt: skip


def loose_images(folder: Path) -> list[Path]:
    """Images directly in a folder."""
    return sorted(p for p in folder.iterdir() if is_image(p) and p.is_file())


def _has_images(folder: Path) -> bool:
    return any(is_image(p) for p in files_below(folder))
