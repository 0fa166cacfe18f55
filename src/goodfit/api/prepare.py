"""The stages before the run folder exists: read, audit, split, look up the model, decide."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from goodfit.config.facts import DataFacts
from goodfit.config.plan import Plan, read_plan
from goodfit.config.request import TrainRequest
from goodfit.config.resolve import resolve_data
from goodfit.core.errors import DataError, RequestError
from goodfit.core.journal import Journal
from goodfit.data.checks.audit import Audit, audit_dataset
from goodfit.data.checks.findings import Finding, merged
from goodfit.data.checks.fixes import apply_fixes, kept_paths, read_fixes
from goodfit.data.checks.patterns import folder_shift
from goodfit.data.formats.readers import read_dataset
from goodfit.data.index import SPLITS, DatasetIndex, class_counts, data_hash
from goodfit.data.objects import object_counts, objects_of
from goodfit.data.reading import How, Problem, Reading
from goodfit.data.split import SealedTest, check_splits, split_dataset, subset
from goodfit.data.store import RESERVE


@dataclass(slots=True)
class StageNote:
    """What a stage wants said when it is done."""

    text: str = ""
    fields: dict[str, Any] | None = None


@contextmanager
def stage(journal: Journal, name: str) -> Iterator[StageNote]:
    """Emit one `stage` event with the stage's text and its seconds when it ends well."""
    start = time.monotonic()
    note = StageNote()
    yield note
    journal.emit("stage", name=name, text=note.text, seconds=time.monotonic() - start, **(note.fields or {}))


PROGRESS_SECONDS = 2.0  # between two lines about a long stage


@contextmanager
def progress_of(journal: Journal, name: str) -> Iterator[Callable[[int, int], None]]:
    """A counter that says now and then how far a long stage has come."""
    last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            journal.emit("progress", name=name, done=done, total=total)

    yield tell


@dataclass(frozen=True, slots=True)
class Audited:
    """A dataset that was read, audited and split."""

    reading: Reading
    audit: Audit
    index: DatasetIndex
    kept_labels: frozenset[str] = frozenset()

    def to_dict(self) -> dict[str, Any]:
        """The content of audit.json."""
        index = self.index
        counts = {s: len(index.rows(s)) for s in SPLITS}
        return {
            "data": {
                "task": index.task,
                "format": self.reading.format,
                "note": self.reading.note,
                "num_items": self.audit.num_items,
                "classes": list(index.class_names),
                "splits": counts,
                "class_counts": {s: class_counts(index, index.rows(s)).tolist() for s in SPLITS},
                "sha256": data_hash(index),
                "test_sha256": SealedTest.seal(index).sha256,
            },
            "findings": [f.to_dict() for f in self.audit.findings],
            "accepted": sum(counts.values()),
        }

    def with_findings(self, more: list[Finding]) -> Audited:
        """The same with more findings."""
        return replace(self, audit=replace(self.audit, findings=merged([*self.audit.findings, *more])))


def how_to_read(request: TrainRequest) -> How:
    """What was asked about how to read the data."""
    return How(**{f.name: v for f in fields(How) if (v := getattr(request, f.name)) is not None})


def read_and_audit(request: TrainRequest, journal: Journal, base: Plan | None = None) -> Audited:
    """Stages `data` and `audit`: nothing is written, and no file is changed.

    Raises:
        RequestError: no data was given.
        DataError: the data cannot be used.
    """
    if request.data is None:
        raise RequestError("No data was given.", next="goodfit train FOLDER, or goodfit demo to see a run")
    decided = resolve_data(request, base)
    with stage(journal, "data") as note:
        reading = read_dataset(Path(request.data), how_to_read(request))
        reading, kept_labels, fixed = _with_fixes(request, reading)
        given = reading.given_splits
        how = f"{'/'.join(given)} given" if given else f"no split given → {decided.split.value} stratified"
        what = {"text": "texts", "language": "blocks of text"}.get(reading.index.task, "images")
        note.text = (f"{len(reading.index):,} {what}, {len(reading.index.class_names)} classes, {reading.format}: "
                     f"{reading.note}, {how}{fixed}")  # fmt: skip
    with stage(journal, "audit") as note:
        with progress_of(journal, "audit") as progress:
            audit = audit_dataset(
                reading, max_bad=decided.max_bad.value, progress=progress, keep_twins=request.twins == "keep"
            )
        if request.twins is not None and audit.scan is None:
            raise RequestError("twins= is for images; this is a dataset of texts.", next="leave twins= out")
        index = split_dataset(audit.index, shares=decided.split.value, split_seed=decided.split_seed.value, given=given)
        absent = check_splits(index)
        audit = replace(audit, findings=merged([*audit.findings, *_absent(absent), *_compare(request, audit)]))
        for finding in audit.findings:
            journal.emit("finding", **finding.to_dict())
        _refuse_without_objects(audit, index)
        counts = " · ".join(f"{s} {len(index.rows(s)):,}" for s in SPLITS)
        found = f"{len(audit.findings)} findings" if audit.findings else "nothing found"
        note.text = f"every {'file decoded' if audit.scan is not None else 'text read'}: {found}; {counts}, test sealed"
    return Audited(reading, audit, index, kept_labels)


def _with_fixes(request: TrainRequest, reading: Reading) -> tuple[Reading, frozenset[str], str]:
    """Apply `labels=fixes.csv` to the index. Returns the reading, the paths whose labels a person confirmed, and a note."""
    if request.labels is None:
        return reading, frozenset(), ""
    fixes = read_fixes(Path(request.labels))
    index, applied, unknown = apply_fixes(reading.index, fixes)
    problems = [Problem("missing_label", path, "named in the list of fixes, not in the data") for path in unknown]
    reading = replace(reading, index=index, problems=(*reading.problems, *problems))
    return reading, kept_paths(fixes), f"; {len(applied):,} labels fixed by {Path(request.labels).name}"


def _absent(absent: dict[str, tuple[str, ...]]) -> list[Finding]:
    found = []
    for splits, severity, what in ((("train",), "warning", "learned"), (("val", "test"), "info", "judged there")):
        items = tuple(f"{split}: {', '.join(names)}" for split in splits if (names := absent.get(split)))
        if items:
            found.append(Finding("too_few", severity, sum(len(absent.get(split, ())) for split in splits), items,
                                 f"classes without an object in a split: they cannot be {what}", "add images of these classes, or resplit=true"))  # fmt: skip
    return found


def _refuse_without_objects(audit: Audit, index: DatasetIndex) -> None:
    """Refuse pictures none of which has an object to learn, as where every line of the labels is in another form.

    Raises:
        DataError: the training split has no object.
    """
    if index.objects is None or class_counts(index, index.rows("train")).sum():
        return
    objects = index.objects
    train = np.isin(objects.rows, index.rows("train"))
    crowd = int((train & objects.kept & objects.crowd).sum())
    bad = [f for f in audit.findings if f.kind in ("bad_box", "bad_mask")]
    reasons = [f"{crowd:,} are marked as crowds or as difficult"] if crowd else []
    reasons += (
        [f"of all splits {bad[0].count:,} were dropped or clipped, the first is {bad[0].items[0]}"] if bad else []
    )
    raise DataError(f"No picture of the training split has an object that can be learned: {'; '.join(reasons) or 'there is none'}", where=str(index.root),
                    kept="no file was changed", next="crowds=learn, where they are objects like others" if crowd else
                    "mend the annotations; the findings above say what was dropped")  # fmt: skip


def _compare(request: TrainRequest, audit: Audit) -> list[Finding]:
    """How `like=FOLDER` of production samples differs from the data."""
    if request.like is None:
        return []
    if audit.scan is None:
        raise RequestError("like= compares images; this is a dataset of texts.", next="leave like= out")
    return folder_shift(audit.index, audit.scan, Path(request.like))


def data_facts(request: TrainRequest, audited: Audited, base: Plan | None) -> DataFacts:
    """The figures about the accepted data that `resolve` looks at."""
    index, audit = audited.index, audited.audit
    decided = resolve_data(request, base)
    rows = subset(index, decided.fraction.value, decided.split_seed.value)
    counts = class_counts(index, rows)
    return DataFacts(
        format=audited.reading.format,
        format_reason=audited.reading.note,
        num_train=len(rows),
        num_val=len(index.rows("val")),
        num_test=len(index.rows("test")),
        num_classes=len(index.class_names),
        smallest_class=int(counts.min()),
        largest_class=int(counts.max()),
        median_side=audit.median_side,
        grey_share=audit.grey_share,
        given_splits=audited.reading.given_splits,
        pixel_bytes_at=3 * RESERVE**2 * audit.median_aspect,
        decode_seconds=audit.scan.seconds if audit.scan is not None else 0.0,
        task=index.task,
        shape=_picture_shape(index),
        most_objects=int(object_counts(index, rows).max(initial=0)),
        object_side=_object_side(index, rows),
    )


def _picture_shape(index: DatasetIndex) -> tuple[float, float]:
    """Width and height over the longer side that all but one picture in twenty stay within."""
    if index.sizes is None or not len(index.sizes[index.splits >= 0]):
        return 1.0, 1.0
    sizes = index.sizes[index.splits >= 0].astype(np.float64)
    wide, high = np.quantile(sizes / np.maximum(1.0, sizes.max(axis=1, keepdims=True)), 0.95, axis=0)
    return float(wide), float(high)


def _object_side(index: DatasetIndex, rows: npt.NDArray[np.int64]) -> float:
    """Side of the smaller objects (of all but one in ten) over the longer side of their picture; 0 where there are none."""
    if index.objects is None or index.sizes is None:
        return 0.0
    shares = []
    for row in rows.tolist():
        boxes = objects_of(index, row).boxes
        shares.append(np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])) / index.sizes[row].max())
    found = np.concatenate(shares) if shares else np.zeros(0)
    return float(np.quantile(found, 0.1)) if len(found) else 0.0


def base_plan(request: TrainRequest) -> Plan | None:
    """The earlier plan that `plan=` names.

    Raises:
        RequestError: it cannot be read.
    """
    return read_plan(Path(request.plan)) if request.plan is not None else None
