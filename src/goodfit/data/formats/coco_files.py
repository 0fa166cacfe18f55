"""Which files of a folder are COCO JSON with boxes, and of which split each is."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from goodfit.core.errors import DataError
from goodfit.data.formats.read_objects import split_of, split_words
from goodfit.data.index import NO_SPLIT
from goodfit.data.reading import clean, folders, is_regular

_WINDOW = 1_000_000  # bytes looked at, at the start, in the middle and at the end, to recognise a large JSON


def candidates(data: Path, asked: str | None) -> list[tuple[Path, int]]:
    """COCO files with the split that their names, else their folders, say; sorted by split, then name.

    A file is taken with its siblings of other splits; of a folder, the JSON files at its top, in annotations/ and in
    folders named as splits.

    Args:
        data: File or folder.
        asked: A part of the name or a pattern that files must match.

    Raises:
        OSError: a folder or file cannot be read.
    """
    if data.is_file():
        if data.suffix.lower() != ".json" or not (_looks_like_coco(data) or asked):
            return []
        return sorted([(data, _split(data, False)), *_siblings(data)], key=lambda f: f[1])
    if not data.is_dir():
        return []
    places = [data, *(f for f in folders(data) if f.name.lower() in ("annotations", "labels") or _split(f, False) >= 0)]
    found = []
    for place in places:
        for path in sorted(p for p in place.iterdir() if p.suffix.lower() == ".json" and not p.name.startswith(".")):
            name = path.relative_to(data).as_posix()
            if asked is not None and asked not in name and not fnmatch(name, asked) and not fnmatch(path.name, asked):
                continue
            if is_regular(path) and _looks_like_coco(path):
                found.append((path, _split(path, place != data)))
    return sorted(found, key=lambda f: (f[1], f[0].as_posix()))


def _split(path: Path, or_folder: bool) -> int:
    found = split_of(path.stem if path.suffix else path.name)
    if found is None and or_folder:
        found = split_of(path.parent.name)
    return NO_SPLIT if found is None else found


def _siblings(path: Path) -> Iterator[tuple[Path, int]]:
    """The files beside one that differ from it by the split's word only, where there is one such for a split."""
    own = _split(path, False)
    if own < 0:
        return
    beside: dict[int, list[Path]] = {}
    for other in sorted(path.parent.glob("*.json")):
        split = _split(other, False)
        if split not in (NO_SPLIT, own) and _without_split(other) == _without_split(path) and is_regular(other):
            beside.setdefault(split, []).append(other)
    for split, paths in sorted(beside.items()):
        if len(paths) == 1 and _looks_like_coco(paths[0]):
            yield paths[0], split


def _without_split(path: Path) -> str:
    """The name with its split's word blanked: instances_*2017."""
    word, made = "", ""
    for letter in f"{path.stem.lower()} ":
        if letter.isalpha():
            word += letter
        else:
            made += ("*" if list(split_words(word)) else word) + letter
            word = ""
    return made


def _looks_like_coco(path: Path) -> bool:
    """By the keys in the first, middle and last megabyte; panoptic, caption and result files have others."""
    size = path.stat().st_size
    with open(path, "rb") as handle:
        sample = handle.read(_WINDOW)
        for start in (size // 2, size - _WINDOW) if size > _WINDOW else ():
            handle.seek(max(_WINDOW, start))
            sample += handle.read(_WINDOW)
    sample = sample.replace(b"\0", b"")  # UTF-16
    if b'"segments_info"' in sample or b'"images"' not in sample:
        return False
    objects = b'"image_id"' in sample and (b'"bbox"' in sample or b'"segmentation"' in sample)
    return objects or (b'"annotations"' in sample and b'"categories"' in sample and b'"image_id"' not in sample)


def refuse_doubtful(data: Path, chosen: list[tuple[Path, int]]) -> None:
    """Stop where several files are of the same split, or of none.

    Raises:
        DataError: with the files' names, asking for annotations=.
    """
    splits = [split for _, split in chosen]
    if len(set(splits)) == len(splits) and (len(splits) == 1 or NO_SPLIT not in splits):
        return
    names = ", ".join(sorted(p.name for p, _ in chosen))
    words = [w for w in dict.fromkeys(p.stem.split("_")[0] for p, _ in chosen) if split_of(w) is None]
    hint = words[0] if words else chosen[0][0].name
    raise DataError(f"There are several sets of COCO annotations, and it is not clear which to use: {clean(names)}.",
                    where=str(data), next=f"say which, by a part of the name: annotations={clean(hint)}")  # fmt: skip
