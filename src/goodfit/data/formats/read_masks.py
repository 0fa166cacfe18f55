"""One PNG per object: <id>/images/*.png with <id>/masks/*.png, as in the Data Science Bowl of 2018."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

from goodfit.core.errors import DataError
from goodfit.data.columns import MASK_FILE
from goodfit.data.formats.read_objects import Samples, split_of, wants_masks
from goodfit.data.index import NO_SPLIT
from goodfit.data.reading import How, Problem, Reading, files_below, folders, is_image, problem

_CLASS = "object"  # where no class folders name one


def recognise(data: Path) -> str | None:
    """One line on the folders found, or None where no sample has images/ and masks/. Never raises."""
    try:
        places = _places(data)
    except OSError:
        return None
    return f"one mask file per object: {_title(places)}" if places else None


def read(data: Path, how: How) -> Reading:
    """Read samples of one folder each, here, one level down, or in one folder per split.

    No image is opened, so every box is (0, 0, 0, 0) until audit_objects takes it from the mask. The class is "object",
    or the folder that the mask lies in below masks/.

    Raises:
        DataError: no folder holds images/ and masks/, or none of them holds an image.
    """
    try:
        places = _places(data)
    except OSError as error:
        raise DataError(f"The folder cannot be read: {error.strerror}.", where=str(data)) from error
    if not places:
        raise DataError("No folder holds images/ and masks/.", where=str(data),
                        next="give the folder that holds one folder per image, with images/ and masks/ in it")  # fmt: skip
    samples = Samples(data)
    problems: list[Problem] = []
    classes: dict[str, int] = {}
    for place in places:
        split = split_of(place.name) if len(places) > 1 else None
        for folder in folders(place):
            _read_sample(folder, NO_SPLIT if split is None else split, samples, classes, problems)
    if not samples.paths:
        raise DataError("No image was found in any folder images/.", where=str(data),
                        next="put the image of each sample into its folder images/")  # fmt: skip
    wants_masks(how, len(samples.objects), len(samples.objects), str(data))
    names = sorted(classes) or [_CLASS]
    kinds = samples.objects.classes
    number = [names.index(name) for name in classes]
    for i, kind in enumerate(kinds):
        kinds[i] = number[kind]
    reading = samples.reading(  # with masks, also for boxes alone: they come from the masks
        format="masks",
        note=f"one mask file per object: {_title(places)}; {len(names)} classes, boxes taken from the masks",
        problems=problems,
        class_names=names,
        how=how,
        with_masks=True,
    )
    return replace(reading, index=replace(reading.index, task=how.task or "segment"))


def _places(data: Path) -> list[Path]:
    """Folders that hold samples: data itself, those in it that are named as splits, or all in it."""
    if not data.is_dir():
        return []
    if _holds_samples(data):
        return [data]
    found = [f for f in folders(data) if _holds_samples(f)]
    named = [f for f in found if split_of(f.name) is not None]
    return named if len(named) > 1 else found


def _holds_samples(folder: Path) -> bool:
    return any(_is_sample(f) for f in islice(folders(folder), 20))


def _is_sample(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "masks").is_dir()


def _title(places: list[Path]) -> str:
    return ", ".join(f"{p.name}/<id>/images and masks" for p in places)


def _read_sample(folder: Path, split: int, samples: Samples, classes: dict[str, int], problems: list[Problem]) -> None:
    """A row for a folder's image, and an object for each of its masks; what does not fit is reported."""
    name = samples.name(folder)
    images = [p for p in files_below(folder / "images") if is_image(p)] if (folder / "images").is_dir() else []
    masks = [p for p in files_below(folder / "masks") if is_image(p)] if (folder / "masks").is_dir() else []
    if not images:
        problems.append(problem("missing_image", name, "The folder has no image in images/.", lost=True))
        return
    if len(images) > 1:
        problems.append(problem("missing_label", name, f"{len(images)} images share one folder of masks: left out.",
                                lost=True))  # fmt: skip
        return
    if not (folder / "masks").is_dir():
        problems.append(problem("missing_label", name, "The folder has no masks/: left out.", lost=True))
        return
    if not masks:
        problems.append(problem("missing_label", name, "There are no masks: taken as background."))
    row = samples.add(samples.name(images[0]), split, samples.name(folder / "masks"))
    for position, path in enumerate(masks, start=1):
        inner = path.relative_to(folder / "masks").parts
        kind = classes.setdefault(inner[0] if len(inner) > 1 else _CLASS, len(classes))
        file = samples.name(path).encode("utf-8", "surrogateescape")
        samples.objects.add(row, (0.0, 0.0, 0.0, 0.0), kind, position, mask_kind=MASK_FILE, mask=file)
