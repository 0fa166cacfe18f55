"""Stage `rehearse` of a detector."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from goodfit.api.detect_parts import DetectParts
from goodfit.api.prepare import stage
from goodfit.api.rehearse import LOADING_SECONDS, NUM_BATCHES, write_checks
from goodfit.config.sizes import InputSizes
from goodfit.core.journal import Journal
from goodfit.data.loader import MicroBatch
from goodfit.engine.loop import halve_micro_batch, is_out_of_memory
from goodfit.models.detection.family import OneStage
from goodfit.outcome.detector_export import traced_problem
from goodfit.planning.checks import Check
from goodfit.planning.detection_checks import check_found
from goodfit.planning.module_rehearsal import rehearse_module
from goodfit.planning.rehearsal import Rehearsal, RehearsalError


def rehearse_detector(parts: DetectParts, journal: Journal, folder: Path | None = None) -> None:
    """Raises RehearsalError if the detector would not learn, or could not be exported."""
    with stage(journal, "rehearse") as note:
        found = None
        while found is None:
            try:
                found = _rehearse(parts)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                halve_micro_batch(parts.state, parts.train, journal, parts.context)
            except RehearsalError as error:
                error.where = write_checks(folder, error.checks)
                raise
        write_checks(folder, found.checks)
        sizes = InputSizes.of(parts.plan)
        rate = found.bare_rate * sizes.cost(sizes.typical)
        note.text = f"{found.describe()} · {rate:,.1f} img/s bare step"
        note.fields = {"bare_rate": rate, "checks": [check.to_dict() for check in found.checks]}


def _rehearse(parts: DetectParts) -> Rehearsal:
    start = time.monotonic()
    sizes, num_micro = InputSizes.of(parts.plan), parts.state.progress.num_micro
    batches: list[Sequence[MicroBatch]] = []
    for number in range(min(NUM_BATCHES, parts.train.steps_per_epoch)):
        if batches and time.monotonic() - start > LOADING_SECONDS:
            break
        batches.append(parts.train.group(0, number * parts.train.batch, num_micro, size=sizes.typical))
    few = parts.few_samples()
    context = replace(parts.context, task=parts.task.dense())
    made = rehearse_module(parts.state.model, context, schedule=parts.state.progress.schedule, build_optimizer=parts.optimizer_for,
                           few=few, batches=batches)  # fmt: skip
    if isinstance(parts.task.family, OneStage):
        found = check_found(copy.deepcopy(parts.state.model), parts.context, parts.context.transform.evaluate(parts.context.device.move(few.data)),
                            len(few.samples))  # fmt: skip
        made = replace(made, checks=(*made.checks, found))
        if not found.passed:
            raise RehearsalError([*made.checks])
    if not parts.task.family.exports:
        return made
    problem = traced_problem(parts.state.model, parts.preprocessing, parts.task.family, few.data["image"])
    check = Check("export", not problem, problem or "the detector can be traced, and its trace computes the same",
                  "the network decides in Python by the values or the number of its inputs, or uses what cannot be exported")  # fmt: skip
    if problem:
        raise RehearsalError([*made.checks, check])
    return replace(made, checks=(*made.checks, check))
