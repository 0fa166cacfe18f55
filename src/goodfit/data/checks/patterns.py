"""What whole columns of a scan say: outliers, attributes that give the class away, and sets that differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError
from goodfit.data.checks.findings import Finding
from goodfit.data.checks.scan import Scan, scan_images
from goodfit.data.checks.shift import Shift, class_shift, find_shift
from goodfit.data.checks.shortcut import find_shortcuts
from goodfit.data.index import LEFT_OUT, NO_GROUP, NO_SPLIT, SPLITS, DatasetIndex, class_counts
from goodfit.data.reading import files_below, is_image, relative, split_number

OUTLIER_FACTOR = 8.0  # in area or aspect, from the median picture
OUTLIER_SHARE = 0.01  # a group of pictures above this share is no outlier but a part of the data
MAX_LIKE = 5000  # production samples that are looked at

Rows = npt.NDArray[np.int64]


def outliers(index: DatasetIndex, scan: Scan) -> list[Finding]:
    """Pictures of another size, shape or mode than nearly all others: kept, since they may be right."""
    rows = np.flatnonzero(index.splits != LEFT_OUT)
    if len(rows) < 20:
        return []
    sizes = scan.sizes[rows].astype(np.float64)
    area, aspect = np.log(sizes.prod(axis=1)), np.log(sizes[:, 0] / sizes[:, 1])
    items = []
    for what, values in (("size", area), ("shape", aspect)):
        far = np.abs(values - np.median(values)) > np.log(OUTLIER_FACTOR)
        if 0 < far.sum() <= max(1, OUTLIER_SHARE * len(rows)):
            items += [f"{index.paths[r]}: {scan.sizes[r, 0]} × {scan.sizes[r, 1]} pixels, unlike the others in {what}"
                      for r in rows[far]]  # fmt: skip
    modes = np.bincount(scan.modes[rows], minlength=len(scan.names))
    usual = scan.names[int(modes.argmax())]
    for mode in np.flatnonzero((modes > 0) & (modes <= OUTLIER_SHARE * len(rows))):
        items += [f"{index.paths[r]}: colour mode {scan.names[mode]}, while most are {usual}"
                  for r in rows[scan.modes[rows] == mode]]  # fmt: skip
    if not items:
        return []
    return [Finding("size_outlier", "info", len(items), tuple(items), "unlike nearly all others: kept", "look at them")]


def shortcut_findings(index: DatasetIndex, scan: Scan) -> list[Finding]:
    """Attributes of the files, not of what they show, that predict the class better than chance."""
    if index.objects is not None or len(index.class_names) < 2:
        return []
    rows = np.flatnonzero(index.splits != LEFT_OUT)
    attributes = {
        "file format": [scan.names[c] for c in scan.formats[rows]],
        "colour mode": [scan.names[c] for c in scan.modes[rows]],
        "size in pixels": [f"{w} × {h}" for w, h in scan.sizes[rows].tolist()],
        "size of the file": [f"{2**k:,} to {2 ** (k + 1):,} bytes" for k in _log2(scan.num_bytes[rows])],
        "shape": _shapes(scan.sizes[rows]),
        "folder": _folders(index, rows),
    }
    attributes = {name: values for name, values in attributes.items() if len(set(values)) > 1}
    found = find_shortcuts(attributes, index.targets[rows], len(index.class_names), groups=index.groups[rows],
                           class_names=index.class_names)  # fmt: skip
    if not found:
        return []
    items = []
    for shortcut in found:
        told = f"the class {index.class_names[shortcut.target]!r}" if shortcut.target >= 0 else "the class"
        items.append(f"{shortcut.name} alone tells {told} in {100 * shortcut.accuracy:.0f} % (chance "
                     f"{100 * shortcut.chance:.0f} %): {'; '.join(shortcut.examples[:3])}")  # fmt: skip
    return [Finding("shortcut", "warning", len(found), tuple(items),
                    "a model could learn this instead of what the pictures show: nothing was changed",
                    "collect all classes in the same way, or convert the files alike")]  # fmt: skip


def _log2(values: npt.NDArray[np.int64]) -> list[int]:
    return [int(v) for v in np.log2(np.maximum(1, values)).astype(int)]


def _shapes(sizes: npt.NDArray[np.int32]) -> list[str]:
    ratio = sizes[:, 0] / np.maximum(1, sizes[:, 1])
    names = np.array(["tall", "upright", "square", "lying", "wide"])
    return [str(name) for name in names[np.digitize(ratio, [0.5, 0.9, 1.1, 2.0])]]


def _folders(index: DatasetIndex, rows: Rows) -> list[str]:
    """The folder of each file without what names its class or its split."""
    skipped = {name.lower() for name in index.class_names}
    made = {}
    values = []
    for row in rows.tolist():
        folder = index.paths[row].rpartition("/")[0]
        if folder not in made:
            parts = [p for p in folder.split("/") if p.lower() not in skipped and split_number(p) is None]
            made[folder] = "/".join(parts)
        values.append(made[folder])
    return values


def split_shift(index: DatasetIndex, scan: Scan, given: tuple[str, ...]) -> list[Finding]:
    """Do given splits look alike? Made ones are drawn from one pot."""
    items: list[str] = []
    places = {s: np.flatnonzero(_place(index) == SPLITS.index(s)) for s in given}
    for split in given:
        if split == "train" or "train" not in places:
            continue
        one, other = places["train"], places[split]
        items += _differences(find_shift(_statistics(scan, one), _statistics(scan, other)), "train", split)
        if index.class_names:
            change = class_shift(class_counts(index, one), class_counts(index, other))
            if change.found:
                names = ", ".join(index.class_names[c] for c in change.classes[:3])
                items.append(f"class shares of train and {split} differ by {100 * change.distance:.0f} % of the samples "
                             f"(by chance {100 * change.usual:.0f} %), most in {names}")  # fmt: skip
    if not items:
        return []
    return [Finding("shift", "warning", len(items), tuple(items), "the given splits differ: nothing was changed",
                    "resplit=true draws the splits anew")]  # fmt: skip


def _place(index: DatasetIndex) -> npt.NDArray[np.int8]:
    return np.where(index.splits == NO_SPLIT, 0, index.splits)


def _statistics(scan: Scan, rows: Rows) -> dict[str, npt.NDArray[np.float64]]:
    chosen = np.isin(scan.sampled, rows)
    made = {name: values[chosen] for name, values in scan.statistics.items()}
    sizes = scan.sizes[scan.sampled[chosen]].astype(np.float64)
    return {**made, "size": np.sqrt(np.maximum(1, sizes.prod(axis=1)))}


def _differences(shifts: list[Shift], one: str, other: str) -> list[str]:
    return [f"{s.name} of {one} and {other} differs: median {s.median_a:.3g} and {s.median_b:.3g}, distance "
            f"{s.distance:.2f}" + (f", {100 * s.outside:.0f} % of {other} beyond nearly all of {one}" if s.outside > 0.05 else "")
            for s in shifts]  # fmt: skip


def folder_shift(index: DatasetIndex, scan: Scan, like: Path) -> list[Finding]:
    """How production samples in a folder differ from the accepted data.

    Raises:
        DataError: the folder does not exist, or holds no images.
    """
    files = [p for p in files_below(like) if is_image(p)] if like.is_dir() else []
    if not files:
        raise DataError(
            "like= names no folder with images.", where=str(like), next="give a folder of production samples"
        )
    step = max(1, len(files) // MAX_LIKE)
    chosen = [relative(p, like) for p in files[::step][:MAX_LIKE]]
    samples = DatasetIndex(
        root=like, paths=chosen, targets=np.full(len(chosen), -1), class_names=(),
        splits=np.full(len(chosen), NO_SPLIT, np.int8), groups=np.full(len(chosen), NO_GROUP),
    )  # fmt: skip
    other = scan_images(samples)
    kept = np.flatnonzero(index.splits != LEFT_OUT)
    shifts = find_shift(_statistics(scan, kept), _statistics(other, np.flatnonzero(other.usable)))
    items = _differences(shifts, "the data", "production samples")
    if not items:
        return []
    return [Finding("shift", "warning", len(items), tuple(items),
                    f"{len(chosen):,} production samples in {like.name} look different: nothing was changed",
                    "collect training samples as they come in production")]  # fmt: skip
