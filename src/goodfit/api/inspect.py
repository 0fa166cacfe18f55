"""What a person looks at before training: likely wrong labels, audit.html, and pictures of what the model sees."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from goodfit.api.prepare import Audited, stage
from goodfit.config.plan import Plan
from goodfit.config.request import TrainRequest
from goodfit.config.time_rules import FORWARD, is_worth
from goodfit.core.journal import Journal
from goodfit.core.machine import num_cores
from goodfit.data.checks.findings import Finding
from goodfit.data.checks.fixes import read_fixes, shown_path
from goodfit.data.checks.scan import small_picture
from goodfit.data.checks.suspects import Suspects, find_suspects, plain_features, text_features
from goodfit.data.formats.records import TextRecords
from goodfit.data.index import LEFT_OUT, DatasetIndex

MAX_SUSPECT_ROWS = 20_000  # above this, looking for wrong labels by default would take minutes
MAX_CARDS = 120  # suspects shown on the page
MAX_PICTURES = 24  # items shown with pictures per finding
PICTURE_SIDE = 128
FEATURE_SIDE = 160


def suspect_stage(request: TrainRequest, audited: Audited, journal: Journal, plan: Plan | None = None) -> tuple[
    Audited, list[dict[str, Any]]]:  # fmt: skip
    """Stage `labels`: rank samples by how likely their label is wrong. Nothing is changed by it.

    Args:
        plan: Whose pretrained weights give the features; without them, simple ones are computed from the pictures.

    Returns:
        The audit with the finding, and the suspects with path, label, proposed label and confidence.
    """
    index = audited.index
    rows = np.flatnonzero((index.splits != LEFT_OUT) & (index.targets >= 0))
    asked = request.suspects
    if asked is False or index.objects is not None or index.task == "language" or len(index.class_names) < 2:
        return audited, []
    with stage(journal, "labels") as note:
        if asked is None and len(rows) > MAX_SUSPECT_ROWS:
            note.text = f"not searched for wrong ones among {len(rows):,} samples; suspects=true does"
            return audited, []
        if (
            asked is None
            and plan is not None
            and not is_worth(_search_seconds(audited, plan, len(rows)), plan.time.value)
        ):
            note.text = "not searched for wrong ones, which would take a large part of the time; suspects=true does"
            return audited, []
        features, what = _features(audited, rows, plan)
        found = find_suspects(features, index.targets[rows], len(index.class_names), groups=index.groups[rows], seed=0)
        confirmed = np.array([shown_path(index.name(row)) in audited.kept_labels for row in rows.tolist()])
        count = int((~confirmed[found.flagged]).sum())
        note.text = (f"{count:,} likely wrong of {len(rows):,} (features of {what} tell "
                     f"{100 * found.accuracy:.0f} % of the classes)")  # fmt: skip
        if not count:
            return audited, []
        table = _table(index, rows, found, confirmed)
        lines = tuple(
            f"{s['path']}: {s['label']}, " + (f"perhaps {s['proposed']}" if s["proposed"] != s["label"] else "doubtful")
            for s in table
        )
        finding = Finding("label_suspect", "warning", count, lines,
                          f"likely wrong labels, most likely first, by features of {what}: nothing was changed",
                          "mark them on audit.html, then labels=fixes.csv")  # fmt: skip
        journal.emit("finding", **finding.to_dict())
    return audited.with_findings([finding]), table


def _search_seconds(audited: Audited, plan: Plan, num: int) -> float:
    """What it takes to look for wrong labels among so many samples, about: each is decoded twice, and goes through the network once."""
    decoding = 0.0 if audited.audit.scan is None else audited.audit.scan.seconds / num_cores()
    return num * (2 * decoding + plan.sample_seconds / FORWARD)


def _table(
    index: DatasetIndex, rows: npt.NDArray[np.int64], found: Suspects, confirmed: npt.NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """The flagged samples and whatever is as suspicious as they are, at least a tenth of all, most suspicious first."""
    made = []
    for number in found.order[: max(len(found.flagged), len(rows) // 10)].tolist():
        row = int(rows[number])
        if not confirmed[number]:
            made.append({
                "path": index.name(row), "label": index.class_names[index.targets[row]],
                "proposed": index.class_names[int(found.proposed[number])], "confidence": float(found.scores[number]),
            })  # fmt: skip
    return made


def _features(audited: Audited, rows: npt.NDArray[np.int64], plan: Plan | None) -> tuple[Any, str]:
    index = audited.index
    if index.task == "text":
        records = TextRecords(index, audited.reading.layouts)
        return text_features(records.text(int(r)) for r in rows), "words"
    with ThreadPoolExecutor(num_cores()) as pool:
        plain = np.stack(list(pool.map(lambda r: _plain(index.file(r)), rows.tolist())))
    if plan is None or not plan.weights.value:
        return plain, "colour, shape and texture"
    return (_backbone(index, rows, plan), plain), f"{plan.model.value}, colour, shape and texture"


def _plain(path: Path) -> npt.NDArray[np.float32]:
    picture = small_picture(path, FEATURE_SIDE)
    return plain_features(np.asarray(picture if picture is not None else np.zeros((8, 8, 3)), np.uint8))


def _backbone(index: DatasetIndex, rows: npt.NDArray[np.int64], plan: Plan) -> npt.NDArray[np.float32]:
    """Features of the plan's pretrained network before any training."""
    from goodfit.api.assemble import assemble_probe, execution
    from goodfit.outcome.baselines import backbone_features

    with execution(plan):
        network, batches = assemble_probe(plan, index, rows)
        return backbone_features(network, batches).numpy().astype(np.float32)


def page_stage(
    request: TrainRequest, folder: Path, name: str, audited: Audited, suspects: Sequence[Mapping[str, Any]],
    journal: Journal,
) -> Path:  # fmt: skip
    """Stage `page`: write audit.html into a folder."""
    from goodfit.outcome.audit_page import split_item, write_audit_page

    with stage(journal, "page") as note:
        index, made = audited.index, audited.to_dict()
        row_of = {index.name(row): row for row in range(len(index))}
        shown = [str(s["path"]) for s in suspects[:MAX_CARDS]]
        for finding in made["findings"]:
            for item in finding["items"][:MAX_PICTURES]:
                shown += split_item(item, row_of, pairs=True)[0]
        wanted = {path: row_of[path] for path in dict.fromkeys(shown) if path in row_of}
        fixes = [{"path": f.path, "label": f.label, "action": f.action}
                 for f in (read_fixes(Path(request.labels)) if request.labels else ())]  # fmt: skip
        page = folder / "audit.html"
        write_audit_page(page, name=name, data=made["data"], findings=made["findings"], suspects=suspects[:MAX_CARDS],
                         pictures={} if audited.audit.scan is None else _pictures(index, wanted),
                         labels=_labels(index, wanted), texts=_texts(audited, wanted), fixes=fixes)  # fmt: skip
        note.text = str(page)
    return page


def _labels(index: DatasetIndex, wanted: Mapping[str, int]) -> dict[str, str]:
    return {p: index.class_names[index.targets[r]] for p, r in wanted.items() if index.targets[r] >= 0}


def _texts(audited: Audited, wanted: Mapping[str, int]) -> dict[str, str]:
    if audited.index.task != "text":
        return {}
    records = TextRecords(audited.index, audited.reading.layouts)
    return {path: records.text(row)[:300] for path, row in wanted.items()}


def _pictures(index: DatasetIndex, wanted: Mapping[str, int]) -> dict[str, bytes]:
    """Small JPEGs, with boxes drawn where there are any."""

    def draw(row: int) -> bytes:
        picture = small_picture(index.file(row), PICTURE_SIDE)
        if picture is None:
            return b""
        stream = io.BytesIO()
        _with_boxes(index, row, picture).save(stream, "JPEG", quality=80)
        return stream.getvalue()

    with ThreadPoolExecutor(num_cores()) as pool:
        made = dict(zip(wanted, pool.map(draw, wanted.values()), strict=True))
    return {path: data for path, data in made.items() if data}


def _with_boxes(index: DatasetIndex, row: int, picture: Any) -> Any:
    if index.objects is None or index.sizes is None or not index.sizes[row, 0]:
        return picture
    from goodfit.data.checks.draw import draw_objects

    part = index.objects.of(row)
    scale = picture.width / index.sizes[row, 0]
    boxes = np.nan_to_num(index.objects.boxes[part].astype(np.float64)) * scale
    return draw_objects(picture, boxes, index.objects.classes[part], index.class_names)
