"""Look at every file before training, and decide in the index what may be used. Files are never changed."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError
from goodfit.data.index import LEFT_OUT, NO_GROUP, SPLITS, DatasetIndex
from goodfit.data.readers import Reading
from goodfit.runtime.images import ImageError, open_image, to_rgb, upright

MAX_ITEMS = 1000  # items listed per finding; the count is always whole
MIN_PER_CLASS = 3  # one for each of train, val and test
IMBALANCE = 3.0  # largest class over smallest, from which it is reported

_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe"), "MPO": (".jpg", ".jpeg", ".jpe"), "PNG": (".png",), "BMP": (".bmp",),
    "GIF": (".gif",), "TIFF": (".tif", ".tiff"), "WEBP": (".webp",), "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing the audit found: how bad, how often, where, what was done about it, and how to do otherwise."""

    kind: str
    severity: str  # info, warning or error
    count: int  # files; pairs for duplicates and leaks
    items: tuple[str, ...]
    action: str
    override: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "count": self.count,
            "items": list(self.items[:MAX_ITEMS]),
            "action": self.action,
            "override": self.override,
        }


@dataclass(frozen=True, slots=True)
class FileScan:
    """What one file is: hashes of its bytes and of its decoded pixels, size in pixels, and what is wrong with it."""

    content: str
    pixels: str = ""
    width: int = 0
    height: int = 0
    grey: bool = False
    wrong_suffix: str = ""
    error: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The accepted dataset, the findings, and the figures that the plan asks for."""

    index: DatasetIndex
    findings: tuple[Finding, ...]
    median_side: int
    median_aspect: float
    grey_share: float
    num_items: int


def scan_file(path: Path) -> FileScan:
    """Read and decode one file. Never raises: what is wrong is in the result."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return FileScan("", error="unreadable", message=f"The file cannot be read: {error.strerror}.")
    content = hashlib.blake2b(data, digest_size=16).hexdigest()
    try:
        image = open_image(data, where=str(path))
        suffixes = _SUFFIXES.get(image.format or "", ())
        wrong = (image.format or "") if suffixes and path.suffix.lower() not in suffixes else ""
        image.load()
        pixels = np.asarray(to_rgb(upright(image)))
    except ImageError as error:
        return FileScan(content, error=error.kind, message=error.message)
    except Exception as error:
        kind = "truncated" if isinstance(error, OSError | SyntaxError | EOFError | IndexError) else "unreadable"
        return FileScan(content, error=kind, message=f"The image is cut off or damaged: {error}")
    digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    part = pixels[:: max(1, pixels.shape[0] // 64), :: max(1, pixels.shape[1] // 64)].astype(np.int16)
    grey = bool((part.max(axis=2) - part.min(axis=2)).max() <= 8) if part.size else False
    return FileScan(content, digest.hexdigest(), pixels.shape[1], pixels.shape[0], grey, wrong)


def audit_dataset(reading: Reading, *, max_bad: float, progress: Callable[[int, int], None] | None = None) -> Audit:
    """Read and decode every file, find what is wrong, and leave it out in the index.

    Raises:
        DataError: more than `max_bad` of the images (and more than one) cannot be used, or fewer than two classes are
            left.
    """
    index = reading.index
    scans = _scan_all(index, progress)
    splits = index.splits.copy()
    findings = [*_reading_findings(reading), *_file_findings(index, scans, splits)]
    groups = _duplicate_groups(scans)
    findings += _conflicts(index, groups, splits)
    num_bad = int((splits == LEFT_OUT).sum()) + len(reading.missing_images) + len(reading.missing_labels)
    _gate(reading, findings, num_bad, max_bad)
    findings += _duplicates(index, groups, splits)
    index = replace(index, splits=splits, groups=_merge_groups(index.groups, groups),
                    contents=tuple(s.content for s in scans))  # fmt: skip
    index, few = _small_classes(index, reading.given_splits)
    findings += few + _imbalance(index)
    kept = [s for s, split in zip(scans, index.splits, strict=True) if split != LEFT_OUT]
    return Audit(
        index=index,
        findings=tuple(findings),
        median_side=int(np.median([max(s.width, s.height) for s in kept])),
        median_aspect=float(np.median([max(s.width, s.height) / min(s.width, s.height) for s in kept])),
        grey_share=float(np.mean([s.grey for s in kept])),
        num_items=len(scans) + len(reading.missing_images) + len(reading.missing_labels),
    )


def _scan_all(index: DatasetIndex, progress: Callable[[int, int], None] | None) -> list[FileScan]:
    scans = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        for done, scan in enumerate(pool.map(scan_file, (index.file(r) for r in range(len(index)))), start=1):
            scans.append(scan)
            if progress is not None:
                progress(done, len(index))
    return scans


def _reading_findings(reading: Reading) -> list[Finding]:
    rows = (
        ("wrong_type", "info", reading.not_images, "not images by their names: ignored", ""),
        ("missing_label", "warning", reading.missing_labels, "no class: left out", "move them into class folders"),
        ("missing_image", "warning", reading.missing_images, "the file does not exist: left out", "mend the list"),
    )
    return [
        Finding(kind, severity, len(items), items, action, how) for kind, severity, items, action, how in rows if items
    ]


def _file_findings(index: DatasetIndex, scans: list[FileScan], splits: npt.NDArray[np.int8]) -> list[Finding]:
    found = []
    for kind in ("unreadable", "truncated", "wrong_type", "huge"):
        rows = [row for row, scan in enumerate(scans) if scan.error == kind]
        if rows:
            splits[rows] = LEFT_OUT
            items = tuple(f"{index.paths[r]}: {scans[r].message}" for r in rows)
            found.append(Finding(kind, "warning", len(rows), items, "left out", "replace or delete the files"))
    odd = tuple(f"{index.paths[r]}: {s.wrong_suffix}" for r, s in enumerate(scans) if s.wrong_suffix)
    if odd:
        found.append(Finding("wrong_type", "info", len(odd), odd, "named as another image format: kept, they decode"))
    return found


def _duplicate_groups(scans: list[FileScan]) -> list[list[int]]:
    """Rows with equal decoded pixels, two or more each."""
    table: dict[str, list[int]] = {}
    for row, scan in enumerate(scans):
        if scan.pixels:
            table.setdefault(scan.pixels, []).append(row)
    return [rows for rows in table.values() if len(rows) > 1]


def _conflicts(index: DatasetIndex, groups: list[list[int]], splits: npt.NDArray[np.int8]) -> list[Finding]:
    bad = [rows for rows in groups if len({int(index.targets[r]) for r in rows}) > 1]
    if not bad:
        return []
    for rows in bad:
        splits[rows] = LEFT_OUT
    items = tuple(" = ".join(index.paths[r] for r in rows) for rows in bad)
    count = sum(len(rows) for rows in bad)
    return [Finding("label_conflict", "warning", count, items, "one picture, two labels: all copies left out",
                    "delete the copies with the wrong label")]  # fmt: skip


def _duplicates(index: DatasetIndex, groups: list[list[int]], splits: npt.NDArray[np.int8]) -> list[Finding]:
    """Copies in several given splits stay in the most sealed one; copies without a given split stay together."""
    twins: list[str] = []
    leaks: list[str] = []
    num_twins = num_leaks = 0
    for rows in groups:
        rows = [r for r in rows if splits[r] != LEFT_OUT]
        sealed = max((int(splits[r]) for r in rows), default=-1)
        for a, b in islice(combinations(rows, 2), MAX_ITEMS):
            across = splits[a] != splits[b]
            (leaks if across else twins).append(f"{index.paths[a]} = {index.paths[b]}")
        places = np.bincount(splits[rows] - LEFT_OUT)
        within = int((places * (places - 1) // 2).sum())
        num_twins += within
        num_leaks += len(rows) * (len(rows) - 1) // 2 - within
        for row in rows:
            if splits[row] != sealed:
                splits[row] = LEFT_OUT
    found = []
    if twins:
        found.append(Finding("duplicate_exact", "info", num_twins, tuple(twins), "kept together in one split"))
    if leaks:
        found.append(Finding("leak", "warning", num_leaks, tuple(leaks),
                             f"in two splits: the copy nearer to {SPLITS[0]} was left out"))  # fmt: skip
    return found


def _merge_groups(user: npt.NDArray[np.int64], duplicates: list[list[int]]) -> npt.NDArray[np.int64]:
    """Connected components of user groups and duplicate groups; NO_GROUP where a row stands alone. Shape: (rows,)."""
    parent = np.arange(len(user))

    def find(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = int(parent[row])
        return row

    first: dict[int, int] = {}
    links = [(rows[0], r) for rows in duplicates for r in rows[1:]]
    links += [(first.setdefault(int(g), r), r) for r, g in enumerate(user) if g != NO_GROUP]
    for a, b in links:
        parent[find(b)] = find(a)
    roots = np.array([find(r) for r in range(len(user))], np.int64)
    sizes = np.bincount(roots, minlength=len(user)) if len(user) else np.zeros(0, np.int64)
    return np.where(sizes[roots] > 1, roots, NO_GROUP)


def _gate(reading: Reading, findings: list[Finding], num_bad: int, max_bad: float) -> None:
    total = len(reading.index) + len(reading.missing_images) + len(reading.missing_labels)
    if num_bad <= max(1, int(max_bad * total + 1e-9)):
        return
    bad = [f for f in findings if f.severity != "info"]
    lines = "; ".join(f"{f.count} {f.kind} (first: {f.items[0]})" for f in bad)
    raise DataError(
        f"{num_bad} of {total} images cannot be used, more than the limit of {max_bad:.1%}: {lines}.",
        where=str(reading.index.root),
        kept="no file was changed",
        next=f"mend or remove them, or allow it: max_bad={min(1.0, math.ceil(100 * num_bad / total) / 100):g}",
    )


def _small_classes(index: DatasetIndex, given: tuple[str, ...]) -> tuple[DatasetIndex, list[Finding]]:
    """Leave out classes that cannot be in every split that is to be made."""
    gone: set[int] = set()
    items = []
    for target, name in enumerate(index.class_names):
        rows = np.flatnonzero((index.targets == target) & (index.splits != LEFT_OUT))
        units = len({int(index.groups[r]) if index.groups[r] != NO_GROUP else -2 - int(r) for r in rows})
        in_train = int((index.splits[rows] <= 0).sum())
        if (not given and units < MIN_PER_CLASS) or (given and in_train == 0):
            gone.add(target)
            index.splits[index.targets == target] = LEFT_OUT
            items.append(f"{name}: {len(rows)} images" + (", none of them in train" if given else ""))
    if not gone:
        return index, []
    left = [n for t, n in enumerate(index.class_names) if t not in gone]
    if len(left) < 2:
        raise DataError(
            f"Fewer than two classes have enough different images to be split: {'; '.join(items)}.",
            where=str(index.root),
            next=f"add images: each class needs at least {MIN_PER_CLASS}",
        )
    finding = Finding(
        "too_few",
        "warning",
        len(items),
        tuple(items),
        f"fewer than {MIN_PER_CLASS} different images: class left out",
        "add images of these classes",
    )
    return index.without_classes(gone), [finding]


def _imbalance(index: DatasetIndex) -> list[Finding]:
    counts = np.bincount(index.targets[index.splits != LEFT_OUT], minlength=len(index.class_names))
    ratio = counts.max() / max(1, counts.min())
    if ratio < IMBALANCE:
        return []
    items = tuple(f"{name}: {count}" for name, count in zip(index.class_names, counts, strict=True))
    return [Finding("imbalance", "warning", int(counts.sum()), items,
                    f"the largest class has {ratio:.1f} times the images of the smallest: reported only")]  # fmt: skip


def changed_files(index: DatasetIndex) -> list[str]:
    """Paths of accepted samples whose bytes are not those of the audit, or that are gone."""

    def digest(row: int) -> str:
        try:
            return hashlib.blake2b(index.file(row).read_bytes(), digest_size=16).hexdigest()
        except OSError:
            return ""

    rows = [int(r) for r in np.flatnonzero(index.splits != LEFT_OUT)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(digest, rows))
    return [index.paths[r] for r, d in zip(rows, found, strict=True) if d != index.contents[r]]
