"""Stage `rehearse` of a detector."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from goodfit.api.detect_parts import DetectParts
from goodfit.api.rehearse import first_batches, rehearse_run
from goodfit.core.journal import Journal
from goodfit.models.detection.family import OneStage
from goodfit.outcome.detector_export import traced_problem
from goodfit.planning.checks import Check
from goodfit.planning.detection_checks import check_found
from goodfit.planning.module_rehearsal import rehearse_module
from goodfit.planning.rehearsal import Rehearsal, RehearsalError


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
    if not all(check.passed for check in checks):
        raise RehearsalError(checks)
    return replace(made, checks=tuple(checks))
