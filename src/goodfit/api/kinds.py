"""What a run does differently by what it learns: one record per task, so that `train` and `resume` tell one story for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from goodfit.api import detect_finish, finish
from goodfit.api.assemble import assemble
from goodfit.api.detect_parts import assemble_detector
from goodfit.api.detect_rehearse import rehearse_detector
from goodfit.api.folder import Run
from goodfit.api.rehearse import rehearsal_stage
from goodfit.api.verdict import over_time
from goodfit.config.plan import Plan
from goodfit.core.journal import Journal
from goodfit.core.safeio import read_json
from goodfit.engine.budget import TimeBudget
from goodfit.engine.checkpoint import Checkpoints


@dataclass(frozen=True, slots=True)
class Kind:
    """The stages of one task; each takes the parts that `assemble` made.

    Attributes:
        assemble: From plan and index to all that `fit` takes.
        pictures: What the model really sees, drawn before training.
        rehearse: Raises RehearsalError if it would not learn.
        after: What is measured of the best model before the test.
        test: Opens the sealed split; the content of test.json.
        bundle, report: After the test.
        write_result: result.json.
    """

    assemble: Callable[..., Any]
    pictures: Callable[..., None]
    rehearse: Callable[..., None]
    after: Callable[..., Any]
    test: Callable[..., dict[str, Any]]
    bundle: Callable[..., dict[str, Any]]
    report: Callable[..., None]
    write_result: Callable[..., dict[str, Any]]


KINDS = {
    "classify": Kind(assemble, finish.picture_stage, rehearsal_stage, finish.training_accuracy, finish.final_test,
                     finish.bundle_stage, finish.report_stage, finish.write_result),
    "detect": Kind(assemble_detector, detect_finish.picture_stage, rehearse_detector, detect_finish.threshold_stage,
                   detect_finish.final_test, detect_finish.bundle_stage, detect_finish.report_stage, detect_finish.write_result),
}  # fmt: skip
KINDS["segment"] = KINDS["detect"]  # a mask is one more output


def kind_of(plan: Plan) -> Kind:
    """The record of a plan's task."""
    return KINDS[plan.task.value]


def finish_run(run: Run, parts: Any, checkpoints: Checkpoints, journal: Journal, budget: TimeBudget | None) -> Run:
    """From trained weights to a finished run: test, bundle, report. What is done is not done again.

    Args:
        budget: Of a run that was given a time.
    """
    kind = kind_of(parts.plan)
    finish.load_best(parts, checkpoints)
    kind.after(run, parts, journal)
    done = run.path / "test.json"
    test = read_json(done) if done.is_file() else kind.test(run, parts, journal)
    bundle = kind.bundle(run, parts, journal, test)
    kind.report(run, parts, journal, test, bundle)
    kind.write_result(run, parts, checkpoints, test)
    if text := over_time(budget):
        journal.emit("warning", text=text)
    journal.emit("done", path=str(run.path))
    return run
