"""Look at every sample before training, and decide in the index what may be used. Files are never changed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError
from goodfit.data.checks.audit_objects import audit_objects, crowds
from goodfit.data.checks.findings import Finding, from_problems, merged
from goodfit.data.checks.patterns import outliers, shortcut_findings, split_shift
from goodfit.data.checks.scan import Scan, scan_images
from goodfit.data.checks.twins import audit_twins
from goodfit.data.index import LEFT_OUT, NO_GROUP, DatasetIndex, class_counts
from goodfit.data.reading import Reading

MIN_PER_CLASS = 3  # one for each of train, val and test
IMBALANCE = 3.0  # largest class over smallest, from which it is reported


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The accepted dataset, the findings, and the figures that the plan asks for.

    `scan` is None for texts.
    """

    index: DatasetIndex
    findings: tuple[Finding, ...]
    num_items: int
    scan: Scan | None
    median_side: int = 0
    median_aspect: float = 1.0
    grey_share: float = 0.0


def audit_dataset(
    reading: Reading, *, max_bad: float, progress: Callable[[int, int], None] | None = None, keep_twins: bool = False
) -> Audit:
    """Read and decode every file, find what is wrong, and leave it out in the index.

    Args:
        keep_twins: Nearly equal samples are told, and kept as others are.

    Raises:
        DataError: more than `max_bad` of the samples (and more than one) cannot be used, or fewer than two classes are
            left.
    """
    index = replace(reading.index, splits=reading.index.splits.copy())
    num_asked = int((index.splits == LEFT_OUT).sum())  # by labels=, which is no fault of the data
    findings = from_problems(reading.problems, background=index.objects is not None)
    scan = None
    if index.task in ("classify", "detect", "segment"):
        scan = scan_images(index, progress)
        index = replace(index, contents=scan.contents, sizes=scan.sizes)
        findings += _file_findings(index, scan)
        index, found = _check_objects(index)
        findings += found
    index, found, num_copies = audit_twins(index, scan, keep=keep_twins)
    findings += found
    num_lost = sum(p.lost for p in reading.problems)
    _gate(index, findings, num_lost, num_asked + num_copies, max_bad)
    index, found = _small_classes(index, reading.given_splits)
    findings += found + _imbalance(index)
    if scan is not None:
        findings += outliers(index, scan) + shortcut_findings(index, scan)
        findings += split_shift(index, scan, reading.given_splits)
    audit = Audit(index=index, findings=merged(findings), num_items=len(index) + num_lost, scan=scan)
    return audit if scan is None else _with_figures(audit, scan)


def _with_figures(audit: Audit, scan: Scan) -> Audit:
    kept = audit.index.splits != LEFT_OUT
    long, short = scan.sizes[kept].max(axis=1), scan.sizes[kept].min(axis=1)
    return replace(audit, median_side=int(np.median(long)), median_aspect=float(np.median(long / short)),
                   grey_share=float(scan.grey[kept].mean()))  # fmt: skip


def _file_findings(index: DatasetIndex, scan: Scan) -> list[Finding]:
    found = []
    for kind in ("unreadable", "truncated", "wrong_type", "huge"):
        rows = [row for row, (error, _) in scan.errors.items() if error == kind]
        if rows:
            index.splits[rows] = LEFT_OUT
            items = tuple(f"{index.paths[r]}: {scan.errors[r][1]}" for r in rows)
            found.append(Finding(kind, "warning", len(rows), items, "left out", "replace or delete the files"))
    odd = tuple(f"{index.paths[r]}: {name}" for r, name in scan.wrong_suffix.items())
    if odd:
        found.append(Finding("wrong_type", "info", len(odd), odd, "named as another image format: kept, they decode"))
    hurt = tuple(f"{index.paths[r]}: {text}" for r, text in scan.damaged.items())
    if hurt:
        found.append(Finding("truncated", "info", len(hurt), hurt, "slightly damaged: kept, they decode"))
    return found


def _check_objects(index: DatasetIndex) -> tuple[DatasetIndex, list[Finding]]:
    if index.objects is None:
        return index, []
    objects, problems = audit_objects(index)
    index = replace(index, objects=objects)
    return index, [*from_problems(problems, background=True), *crowds(index)]


def _gate(index: DatasetIndex, findings: Iterable[Finding], num_lost: int, num_excused: int, max_bad: float) -> None:
    """Refuse data of which too much cannot be used. Excused is what a person left out, and copies of good samples."""
    num_bad = int((index.splits == LEFT_OUT).sum()) + num_lost - num_excused
    total = len(index) + num_lost
    nothing_left = not (index.splits != LEFT_OUT).any()
    if num_bad <= max(1, int(max_bad * total + 1e-9)) and not nothing_left:
        return
    bad = [f for f in findings if f.severity != "info" and "left out" in f.action and f.kind != "leak"]
    lines = "; ".join(f"{f.count} {f.kind} (first: {f.items[0]})" for f in bad)
    if nothing_left:
        raise DataError(f"None of {total} samples can be used{f': {lines}' if lines else ''}.", where=str(index.root), kept="no file was changed",
                        next="mend them, or give other data")  # fmt: skip
    raise DataError(
        f"{num_bad} of {total} samples cannot be used, more than the limit of {max_bad:.1%}: {lines}.",
        where=str(index.root),
        kept="no file was changed",
        next=f"mend or remove them, or allow it: max_bad={min(1.0, math.ceil(100 * num_bad / total) / 100):g}",
    )


def _small_classes(index: DatasetIndex, given: tuple[str, ...]) -> tuple[DatasetIndex, list[Finding]]:
    """Leave out classes of samples that cannot be in every split that is to be made."""
    if index.objects is not None or not index.class_names:
        return index, []
    kept = np.flatnonzero((index.splits != LEFT_OUT) & (index.targets >= 0))
    units = np.where(index.groups[kept] == NO_GROUP, -2 - kept, index.groups[kept])
    pairs = np.unique(np.stack([index.targets[kept], units], axis=1), axis=0)
    num = len(index.class_names)
    num_units = np.bincount(pairs[:, 0], minlength=num)
    in_train = np.bincount(index.targets[kept][index.splits[kept] <= 0], minlength=num)
    counts = np.bincount(index.targets[kept], minlength=num)
    too_few = (in_train == 0) if given else (num_units < MIN_PER_CLASS)
    gone = {int(t) for t in np.flatnonzero(too_few)}
    if not gone:
        return index, []
    where = ", none of them in train" if given else ""
    items = tuple(f"{index.class_names[t]}: {counts[t]} samples{where}" for t in sorted(gone))
    if num - len(gone) < 2:
        raise DataError(f"Fewer than two classes have enough different samples to be split: {'; '.join(items)}.",
                        where=str(index.root), next=f"add samples: each class needs at least {MIN_PER_CLASS}")  # fmt: skip
    index.splits[np.isin(index.targets, list(gone))] = LEFT_OUT
    what = "no sample in train" if given else f"fewer than {MIN_PER_CLASS} different samples"
    return index.without_classes(gone), [
        Finding("too_few", "warning", len(gone), items, f"{what}: class left out", "add samples of these classes")
    ]


def _imbalance(index: DatasetIndex) -> list[Finding]:
    counts = class_counts(index, np.flatnonzero(index.splits != LEFT_OUT))
    if len(counts) < 2:
        return []
    if counts.min() == 0 and index.objects is not None:  # what a split lacks is another finding
        counts = np.where(counts == 0, counts[counts > 0].min(initial=counts.max()), counts)
    ratio = counts.max() / max(1, counts.min())
    if ratio < IMBALANCE:
        return []
    order = np.argsort(-counts, kind="stable")
    items = tuple(f"{index.class_names[t]}: {counts[t]}" for t in order)
    ways = "off|sample|loss|logit" if index.objects is None else "off|sample"
    return [Finding("imbalance", "warning", int(counts.sum()), items, f"the largest class is {ratio:.1f} times the smallest",
                    f"the plan decides: balance={ways}")]  # fmt: skip


def changed_files(index: DatasetIndex, rows: npt.NDArray[np.int64] | None = None) -> list[str]:
    """Paths of accepted samples, or of some rows, whose bytes are not those of the audit, or that are gone."""

    def digest(row: int) -> bytes:
        try:
            return hashlib.blake2b(index.file(row).read_bytes(), digest_size=16).digest()
        except OSError:
            return b""

    asked = (np.flatnonzero(index.splits != LEFT_OUT) if rows is None else rows).tolist()
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(digest, asked))
    return [index.paths[r] for r, d in zip(asked, found, strict=True) if d != index.contents[r].tobytes()]
