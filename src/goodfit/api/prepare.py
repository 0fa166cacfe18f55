"""The stages before the run folder exists: read, audit, split, look up the model, decide."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from goodfit.config.facts import DataFacts, Facts
from goodfit.config.plan import Plan, read_plan
from goodfit.config.request import TrainRequest
from goodfit.config.resolve import resolve, resolve_data, resolve_model
from goodfit.core.errors import DataError, RequestError
from goodfit.core.journal import Journal
from goodfit.data.audit import Audit, audit_dataset
from goodfit.data.index import SPLITS, DatasetIndex, data_hash
from goodfit.data.readers import Columns, Reading, read_dataset
from goodfit.data.split import SealedTest, split_dataset, subset
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


@dataclass(frozen=True, slots=True)
class Audited:
    """A dataset that was read, audited and split."""

    reading: Reading
    audit: Audit
    index: DatasetIndex

    def to_dict(self) -> dict[str, Any]:
        """The content of audit.json."""
        counts = {s: len(self.index.rows(s)) for s in SPLITS}
        return {
            "data": {
                "task": "classify",
                "format": self.reading.format,
                "note": self.reading.note,
                "num_items": self.audit.num_items,
                "classes": list(self.index.class_names),
                "splits": counts,
                "sha256": data_hash(self.index),
                "test_sha256": SealedTest.seal(self.index).sha256,
            },
            "findings": [f.to_dict() for f in self.audit.findings],
            "accepted": sum(counts.values()),
        }


def read_and_audit(request: TrainRequest, journal: Journal, base: Plan | None = None) -> Audited:
    """Stages `data` and `audit`: nothing is written, and no file is changed.

    Raises:
        RequestError: no data was given.
        DataError: the data cannot be used.
    """
    if request.data is None:
        raise RequestError("No data was given.", next="goodfit train FOLDER, or goodfit demo to see a run")
    decided = resolve_data(request, base)
    columns = Columns(image=request.image_column, label=request.label_column, split=request.split_column,
                      group=request.group)  # fmt: skip
    with stage(journal, "data") as note:
        reading = read_dataset(Path(request.data), format=request.format, columns=columns)
        given = reading.given_splits
        how = f"{'/'.join(given)} given" if given else f"no split given → {decided.split.value} stratified"
        note.text = f"{len(reading.index):,} images, {len(reading.index.class_names)} classes, {reading.note}, {how}"
    with stage(journal, "audit") as note:
        audit = audit_dataset(reading, max_bad=decided.max_bad.value)
        index = split_dataset(audit.index, shares=decided.split.value, split_seed=decided.split_seed.value, given=given)
        _check_splits(index)
        for finding in audit.findings:
            journal.emit("finding", **finding.to_dict())
        counts = " · ".join(f"{s} {len(index.rows(s)):,}" for s in SPLITS)
        found = f"{len(audit.findings)} findings" if audit.findings else "nothing found"
        note.text = f"every file decoded: {found}; {counts}, test sealed"
    return Audited(reading, audit, index)


def _check_splits(index: DatasetIndex) -> None:
    for split in SPLITS:
        counts = np.bincount(index.targets[index.rows(split)], minlength=len(index.class_names))
        missing = [n for n, c in zip(index.class_names, counts, strict=True) if c == 0]
        if (missing and split == "train") or not counts.any():
            raise DataError(f"The {split} split has no image of {', '.join(missing)}.", where=str(index.root),
                            next="add images of that class to it, or leave the split to goodfit")  # fmt: skip


def decide(request: TrainRequest, audited: Audited, journal: Journal, base: Plan | None = None) -> Plan:
    """Stage `plan`: look at the machine and the model, then resolve.

    Raises:
        RequestError: something that was asked cannot be done.
        WeightsError: weights that were asked for cannot be had.
    """
    from goodfit.engine.device import find_machine
    from goodfit.models.catalog import look_up

    with stage(journal, "plan") as note:
        data = data_facts(request, audited, base)
        machine = find_machine(request.device)
        wanted = resolve_model(request, data, base)
        model = look_up(wanted.model.value, wanted.pretrained.value, asked=wanted.pretrained.source == "asked")
        plan = resolve(request, Facts(data=data, machine=machine, model=model), base)
        for name, decision in plan.decisions().items():
            journal.emit("decision", name=name, value=decision.value, reason=decision.reason, source=decision.source)
        licence = plan.weights.reason if plan.weights.value else "no pretrained weights"
        note.text = f"{model.num_parameters / 1e6:.1f} M parameters; {licence}; on {machine.device_name}"
    return plan


def data_facts(request: TrainRequest, audited: Audited, base: Plan | None) -> DataFacts:
    """The figures about the accepted data that `resolve` looks at."""
    index, audit = audited.index, audited.audit
    decided = resolve_data(request, base)
    rows = subset(index, decided.fraction.value, decided.split_seed.value)
    counts = np.bincount(index.targets[rows], minlength=len(index.class_names))
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
    )


def base_plan(request: TrainRequest) -> Plan | None:
    """The earlier plan that `plan=` names.

    Raises:
        RequestError: it cannot be read.
    """
    return read_plan(Path(request.plan)) if request.plan is not None else None
