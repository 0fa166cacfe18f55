"""Stage `rehearse` of a detector."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from goodfit.api.detect_finish import exporter_of, needs_of
from goodfit.api.detect_parts import DetectParts
from goodfit.api.finish import served_files
from goodfit.api.rehearse import first_batches, rehearse_run
from goodfit.core.errors import ExportError
from goodfit.core.journal import Journal
from goodfit.core.safeio import write_json
from goodfit.models.detection.family import OneStage
from goodfit.outcome.bundle import check_latency, draft_bundle
from goodfit.outcome.detector_export import traced_problem
from goodfit.planning.checks import Check
from goodfit.planning.detection_checks import check_found
from goodfit.planning.module_rehearsal import rehearse_module
from goodfit.planning.rehearsal import Rehearsal, RehearsalError

TOO_SLOW = (
    "the network is too large for this limit here: a smaller imgsz=, another model=, more latency_threads=, or a higher limit with goodfit resume RUN "
    "latency=...; without the rehearsal the bundle would be refused after training"
)


def rehearse_detector(parts: DetectParts, journal: Journal, folder: Path | None = None) -> None:
    """Raises RehearsalError if the detector would not learn, or could not be exported."""
    rehearse_run(parts, journal, folder, lambda: _rehearse(parts))


def _rehearse(parts: DetectParts) -> Rehearsal:
    few, model, family = parts.few_samples(), parts.state.model, parts.task.family
    made = rehearse_module(model, replace(parts.context, task=parts.task.dense()), schedule=parts.state.progress.schedule,
                           build_optimizer=parts.optimizer_for, few=few, batches=first_batches(parts))  # fmt: skip
    checks = list(made.checks)
    if isinstance(family, OneStage):
        data = parts.context.transform.evaluate(parts.context.device.move(few.data))
        checks.append(check_found(copy.deepcopy(model), parts.context, data, len(few.samples)))
    if family.exports:
        problem = traced_problem(model, parts.preprocessing, family, few.data["image"])
        checks.append(Check("export", not problem, problem or "the detector can be traced, and its trace computes the same",
                            "the network decides in Python by the values or the number of its inputs, or uses what cannot be exported"))  # fmt: skip
    if parts.plan.latency.value and all(check.passed for check in checks):
        checks.append(_check_latency(parts))
    if not all(check.passed for check in checks):
        raise RehearsalError(checks)
    return replace(made, checks=tuple(checks))


def _check_latency(parts: DetectParts) -> Check:
    """Whether the network alone, as it is before training, is served within the limit that was asked for: before hours are spent on one
    that is not. Nothing that it finds yet counts, as it rates all places alike; so it may still be too slow in the end."""
    family, network = parts.task.family, copy.deepcopy(parts.state.model).cpu().float().eval()
    exporter, described = exporter_of(family), parts.task.describe()
    card = {
        **described,
        **needs_of(family),
        "threshold": 1.0,
        "selection": {**described["selection"], "threshold": 1.0},
    }
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_json(folder / "plan.json", parts.plan.to_dict())
        save_file(
            {k: v.clone().contiguous() for k, v in network.state_dict().items()}, str(folder / "model.safetensors")
        )
        try:
            draft_bundle(folder, network, parts.preprocessing, card, exporter.export)
            found = check_latency(folder, served_files(parts), exporter.open)
        except ExportError as error:
            taken, over, _ = error.message.partition(", over the limit")
            if not over:
                return Check("export", False, error.message, "the network is one that cannot be exported here")
            taken = taken.replace("The bundle takes", "The network alone takes")
            return Check("latency", False, f"{taken}; the limit is {parts.plan.latency.value:g} ms", TOO_SLOW)
    return Check(
        "latency",
        True,
        f"{found['p95_ms']:.1f} ms for one image (p95), before anything is found: {found['verdict']}",
        TOO_SLOW,
    )
