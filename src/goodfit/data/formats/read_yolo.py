"""YOLO: a yaml that names folders or lists of images and the classes, and one text file of boxes or polygons per image.

The yaml's keys are those of Ultralytics' documentation: path, train, val, test, names, nc; and LightlyTrain's
skip_if_label_file_missing.
"""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import numpy as np

from goodfit.core.errors import DataError
from goodfit.data.columns import NO_MASK, POLYGONS
from goodfit.data.formats.read_objects import Listings, ObjectsBuilder, Samples, followed, read_text, shown, wants_masks
from goodfit.data.formats.yolo_layout import (
    NO_LABELS,
    Layout,
    has_labels,
    is_yolo_yaml,
    label_path,
    labels_of,
    layout_of,
    pairs_of,
    parse_line,
    yamls,
)
from goodfit.data.index import SPLITS
from goodfit.data.reading import (
    How,
    Reading,
    clean,
    files_below,
    is_image,
    is_regular,
    problem,
    unread_picture,
    unread_pictures,
)

_LIST_BYTES = 1_000_000_000


def recognise(data: Path) -> str | None:
    """One line on the yaml or the folders found, or None where there are none. Never raises."""
    try:
        if data.is_file():
            return clean(f"YOLO: {data.name}") if is_yolo_yaml(data) else None
        found = yamls(data)
        if found:
            return clean(f"YOLO: {', '.join(p.name for p in found)}")
        pairs = pairs_of(data)
        if pairs and any(has_labels(labels_of(folder)) for _, folder in pairs):
            return "YOLO: images/ and labels/ without a yaml"
    except (OSError, ValueError, DataError):
        pass
    return None


def read(data: Path, how: How) -> Reading:
    """Read a dataset in YOLO's layout, from its yaml, or from the folder that holds it or images/ and labels/.

    An image without a label file is background, unless the yaml says `skip_if_label_file_missing: true`.

    Raises:
        DataError: the layout is not YOLO's, several yaml files are there, the yaml cannot be used, or a folder or list
            that it names for train or val does not exist.
    """
    try:
        layout = layout_of(data, how)
        reader = _Reader(layout)
        for split, value in layout.sources:
            reader.find_images(split, value)
    except OSError as error:
        raise DataError(f"The folder cannot be read: {error.strerror}.", where=str(data)) from error
    reader.read_labels()
    reader.labels_without_image()
    samples, objects = reader.samples, reader.samples.objects
    if not samples.paths:
        first = [p for p in reader.problems if p.lost][:1]
        said = f": {first[0].item}: {first[0].message}" if first else "."
        raise DataError(f"No images were found{said}", where=str(layout.file or data),
                        next="check the folders that the yaml names: path, train and val")  # fmt: skip
    masks, boxes = objects.num_masks()
    with_masks, some = wants_masks(how, masks, len(objects), str(data), boxes=boxes)
    names = _classes(layout.names, objects)
    what = "polygons" if with_masks else "boxes"
    return samples.reading(
        format="yolo",
        note="; ".join(
            [f"YOLO: {layout.title}", f"{what} of {len(names)} classes{some}", *dict.fromkeys(layout.notes)]
        ),
        problems=reader.problems,
        class_names=names,
        how=how,
        with_masks=with_masks,
        relative=True,
    )


def _classes(names: dict[int, str] | None, objects: ObjectsBuilder) -> list[str]:
    """Class names in order of their numbers; the objects' class numbers become positions in it."""
    used = np.array(objects.classes, np.int64)
    if names is None:
        names = {number: str(number) for number in np.unique(used).tolist()} or {0: "0"}
    order = sorted(names)
    objects.classes = array("q", np.searchsorted(np.array(order, np.int64), used).tolist())
    return [names[number] for number in order]


class _Reader:
    """One reading: images, as (path, path as the yaml sees it), and what is noticed on the way."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.samples = Samples(layout.root)
        self.listings = Listings()
        self.problems = layout.problems
        self.images: dict[int, dict[str, str]] = {}  # by split: path as the yaml sees it, by path
        self.used: set[str] = set()  # label files
        self.folders: set[str] = set()  # where label files are expected

    def find_images(self, split: int, value: str) -> None:
        """The images of a folder or of a list file."""
        found = self.images.setdefault(split, {})
        for base in self.layout.bases:
            for words in dict.fromkeys((value, value.removeprefix("../"))):  # Roboflow writes one ../ too many
                seen = base / words.replace("\\", "/")
                real = followed(seen)
                if os.path.isdir(real):
                    files = files_below(real)
                    for path in unread_pictures(files):
                        self.unread(path, os.path.normpath(seen / path.relative_to(real)))
                    for path in files:
                        if is_image(path):
                            virtual = os.path.normpath(seen / path.relative_to(real))
                            found.setdefault(os.path.normpath(path), virtual)
                    if os.path.normpath(real) != os.path.normpath(seen):
                        self.layout.notes.append("a link that was unpacked as a text file is followed")
                    return
                if is_regular(real) and real.suffix.lower() == ".txt":
                    self._read_list(real, base, found)
                    return
        file, name = self.layout.file, SPLITS[split]
        if name != "test":
            raise DataError(f"The yaml names {shown(value)} for {name}, which does not exist.", where=str(file),
                            next="mend path or that line, paths start from the yaml's folder")  # fmt: skip
        self.problems.append(problem("missing_image", f"{self.samples.name(file or '')}:{name}",
                                     f"{shown(value)} does not exist: there is no {name} split of its own."))  # fmt: skip

    def unread(self, path: Path, virtual: str) -> None:
        """A picture of a kind that is not read; its label file belongs to it nevertheless."""
        self.problems.append(unread_picture(self.samples.name(path), path))
        self.used.update((label_path(virtual), f"{os.path.splitext(path)[0]}.txt"))

    def _read_list(self, file: Path, base: Path, found: dict[str, str]) -> None:
        try:
            lines = read_text(file, self.layout.encoding, _LIST_BYTES).splitlines()
        except ValueError as error:
            raise DataError(str(error), where=str(file), next="save the list as UTF-8, one path per line") from error
        starts = [str(followed(b)) for b in dict.fromkeys((base, file.parent, *self.layout.bases))]
        for number, line in enumerate(lines, start=1):
            name = line.strip().replace("\\", "/").removeprefix("./")
            if not name:
                continue
            for start in starts:
                path = self.listings.find(*os.path.split(name)) if name[0] == "/" else self.listings.find(start, name)
                if path is not None:
                    found.setdefault(os.path.normpath(path), os.path.normpath(path))
                    break
            else:
                self.problems.append(problem("missing_image", f"{self.samples.name(file)}:{number}",
                                             f"{shown(name)} does not exist.", lost=True))  # fmt: skip

    def read_labels(self) -> None:
        """A row and its objects for every image of every split."""
        for split, other in ((1, 0), (2, 0), (2, 1)):
            mine, theirs = self.images.get(split), self.images.get(other)
            if mine and theirs and mine.keys() <= theirs.keys():
                del self.images[split]
                self.layout.notes.append(f"{SPLITS[split]} names images of {SPLITS[other]} only: not taken as a split")
        for split, images in sorted(self.images.items()):
            for path in sorted(images):
                self._read_image(split, path, images[path])

    def _read_image(self, split: int, path: str, virtual: str) -> None:
        label = label_path(virtual)
        self.folders.add(os.path.dirname(label))
        name = self.samples.name(path)
        if os.path.basename(label) not in self.listings.names(os.path.dirname(label)):
            label = f"{os.path.splitext(path)[0]}.txt"
            if os.path.basename(label) not in self.listings.names(os.path.dirname(label)):
                skip = self.layout.skip_missing
                action = "left out, as the yaml says" if skip else "taken as background"
                self.problems.append(problem("missing_label", name, f"There is no label file: {action}."))
                if not skip:
                    self.samples.add(name, split, "")
                return
        self.used.add(label)
        try:
            text = read_text(Path(label), self.layout.encoding)
        except ValueError as error:
            self.problems.append(problem("unreadable", self.samples.name(label), str(error), lost=True))
            return
        row = self.samples.add(name, split, self.samples.name(label))
        for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
            if line and not line.isspace():
                self._read_line(row, number, line)

    def _read_line(self, row: int, number: int, line: str) -> None:
        parsed = parse_line(line, self.layout.boxes_only)
        names = self.layout.names
        if isinstance(parsed, tuple) and names is not None and parsed[0] not in names:
            parsed = f"class {parsed[0]} is not among the {len(names)} classes"
        if isinstance(parsed, str):
            kind = "bad_mask" if len(line.split()) > 6 and not self.layout.boxes_only else "bad_box"
            self.problems.append(problem(kind, f"{self.samples.files[row]}:{number}",
                                         f"{parsed[:1].upper()}{parsed[1:]}: {shown(line.strip())}."))  # fmt: skip
            return
        kind_of, box, mask = parsed
        mask_kind = POLYGONS if mask else NO_MASK
        self.samples.objects.add(row, box, kind_of, number, mask_kind=mask_kind, mask=mask)

    def labels_without_image(self) -> None:
        """Report label files that belong to no image."""
        for folder in sorted(self.folders):
            for name in sorted(self.listings.names(folder)):
                if name.endswith(".txt") and name.lower() not in NO_LABELS and f"{folder}/{name}" not in self.used:
                    item = self.samples.name(f"{folder}/{name}")
                    self.problems.append(problem("missing_image", item, "The label file belongs to no image."))
