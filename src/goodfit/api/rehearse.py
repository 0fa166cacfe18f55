"""Stage `rehearse` of a run that learns one class per image, and what it is made on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from goodfit.api.assemble import ImageParts, Parts
from goodfit.api.prepare import stage
from goodfit.config.sizes import InputSizes
from goodfit.core.errors import ExportError
from goodfit.core.journal import Journal
from goodfit.core.safeio import write_text
from goodfit.data.loader import MicroBatch, row_of
from goodfit.engine.device import is_out_of_memory
from goodfit.engine.loop import halve_micro_batch
from goodfit.models.builder import build_network
from goodfit.outcome.export import TOLERANCE, traced_difference
from goodfit.planning.checks import Check
from goodfit.planning.rehearsal import Material, Rehearsal, RehearsalError, describe_checks, rehearse

NUM_BATCHES = 4  # of training, for the rehearsal ...
LOADING_SECONDS = 2.0  # ... as far as they are loaded by then
CHECKS = "rehearsal.txt"
NUM_SERVED = 16  # training samples that also go through the serving path, to be compared


def rehearsal_stage(parts: Parts, journal: Journal, folder: Path | None = None) -> None:
    """Stage `rehearse`: raises RehearsalError if the model would not learn.

    Args:
        folder: The run's, for `rehearsal.txt`: every check, its evidence and its meaning, whether they passed or not.
    """

    def look() -> Rehearsal:
        return rehearse(
            parts.state.model, parts.context, schedule=parts.state.progress.schedule,
            build_optimizer=parts.optimizer_for, material=rehearsal_material(parts),
            rebuild=lambda: build_network(parts.plan, parts.index.class_names)[0],
            export=lambda model: export_problem(parts, model),
            known_head=parts.weights is not None and bool(parts.weights.known),
        )  # fmt: skip

    rehearse_run(parts, journal, folder, look)


def rehearse_run(parts: ImageParts, journal: Journal, folder: Path | None, look: Callable[[], Rehearsal]) -> None:
    """The stage around the checks of any task, which `look` makes: again with a smaller micro-batch where memory ran out."""
    with stage(journal, "rehearse") as note:
        found = None
        while found is None:
            try:
                found = look()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                halve_micro_batch(parts.state, parts.train, journal, parts.context)
            except RehearsalError as error:
                error.where = write_checks(folder, error.checks)
                raise
        write_checks(folder, found.checks)
        sizes = InputSizes.of(parts.plan)
        rate = found.bare_rate * sizes.cost(sizes.typical)  # of a batch of mean cost
        note.text = f"{found.describe()} · {rate:,.{0 if rate >= 100 else 1}f} img/s bare step{' over all input sizes' if sizes.varies else ''}"
        note.fields = {"bare_rate": rate, "varies": sizes.varies, "checks": [check.to_dict() for check in found.checks]}


def write_checks(folder: Path | None, checks: Sequence[Check]) -> str:
    """Write `rehearsal.txt` into a run's folder, if there is one. Returns its path."""
    if folder is None:
        return ""
    pictures = f"labels drawn on the exact tensors of a batch: {folder / 'plots' / 'train_batch.png'}\n"
    write_text(folder / CHECKS, describe_checks(checks) + (pictures if (folder / "plots").is_dir() else ""))
    return str(folder / CHECKS)


def rehearsal_material(parts: Parts) -> Material:
    """The samples that the rehearsal looks at."""
    sizes, num_micro = InputSizes.of(parts.plan), parts.state.progress.num_micro
    batches = first_batches(parts)
    extremes = [parts.train.group(0, 0, num_micro, size=s) for s in (sizes.smallest, sizes.largest) if sizes.varies]
    (served,) = parts.eval_loader(row_of(batches[0][0].samples)[:NUM_SERVED])
    return Material(few=parts.few_samples(), batches=batches, served=served, extremes=extremes)


def first_batches(parts: ImageParts) -> list[Sequence[MicroBatch]]:
    """Up to four batches of training, each as its micro-batches; loading stops after two seconds, with one at least."""
    start, made = time.monotonic(), list[Sequence[MicroBatch]]()
    for number in range(min(NUM_BATCHES, parts.train.steps_per_epoch)):
        if made and time.monotonic() - start > LOADING_SECONDS:
            break
        made.append(parts.train.group(0, number * parts.train.batch, parts.state.progress.num_micro,
                                      size=InputSizes.of(parts.plan).typical))  # fmt: skip
    return made


def export_problem(parts: Parts, model: nn.Module) -> str:
    """Why a model could not be exported after training; empty if it can be."""
    try:
        difference = traced_difference(model, parts.preprocessing, parts.few_samples().data["image"])
    except ExportError as error:
        return error.message
    return "" if difference <= TOLERANCE else f"the traced network's outputs differ by {difference:.2g}"
