"""A short rehearsal before the long run: does this model, with this data and these settings, learn at all?

After Karpathy, "A Recipe for Training Neural Networks" (2019). The definite checks come first (checks.py, batches.py);
where one of them fails, nothing is trained. Then come short trainings (trials.py) and the way to disk and back. All
works on copies: model, optimizer and random state of the run are what they were.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from goodfit.core.errors import TrainingError
from goodfit.engine.contracts import Micro
from goodfit.engine.schedule import Schedule
from goodfit.engine.state import LossScale, Progress, TrainState
from goodfit.engine.step import StepContext
from goodfit.planning.batches import check_labels, check_normalisation
from goodfit.planning.checks import (
    Build,
    Check,
    check_evaluation,
    check_gradients,
    check_leak,
    check_learning_rate,
    check_loss,
    check_outputs,
    check_start,
    check_target,
    evaluating,
)
from goodfit.planning.tensors import tensors_of
from goodfit.planning.trials import PlainTransform, check_blind, check_overfit, check_sizes, check_subset, overfit

KNOWN_SLACK = (
    0.1  # of the chance level, by which the loss may rise where the head knows its classes: it is low from the start
)
SHOWN = ("loss at start", "overfit a few samples", "save, load, predict")  # in the terminal's line


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """The samples that a rehearsal is made on.

    Attributes:
        few: Eight samples of several classes, through the serving path.
        batches: The first batches of training, augmented, each as its micro-batches.
        served: The first samples of the first micro-batch, through the serving path, in the same order.
        extremes: A batch of the smallest and one of the largest input, where the run has several sizes.
    """

    few: Micro
    batches: Sequence[Sequence[Micro]]
    served: Micro
    extremes: Sequence[Sequence[Micro]] = ()


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """All checks, and the samples per second of the bare step on batches in memory."""

    checks: tuple[Check, ...]
    bare_rate: float

    def describe(self) -> str:
        """One line for the terminal."""
        shown = [check.evidence for check in self.checks if check.name in SHOWN]
        return " · ".join([*shown, f"{len(self.checks)} checks"])


class RehearsalError(TrainingError):
    """A check of the rehearsal failed.

    Attributes:
        checks: All that were made, those that passed among them.
    """

    def __init__(self, checks: Sequence[Check]) -> None:
        failed = [c for c in checks if not c.passed]
        super().__init__(
            "The rehearsal failed: " + "; ".join(f"{c.name}: {c.evidence}" for c in failed),
            kept="nothing was trained",
            next="; ".join(c.meaning for c in failed) + "; to go on nevertheless: rehearse=false",
        )
        self.checks = tuple(checks)


def describe_checks(checks: Sequence[Check]) -> str:
    """Every check with its verdict, its evidence and what a failure usually means, as text for people."""
    rows = []
    for check in checks:
        rows.append(f"{'ok' if check.passed else 'FAILED':<8}{check.name}: {check.evidence}")
        rows.append(f"{'':<8}{'usually means' if not check.passed else 'a failure usually means'}: {check.meaning}")
    return "\n".join(rows) + "\n"


def rehearse(
    model: nn.Module, context: StepContext, *, schedule: Schedule, build_optimizer: Build,
    rebuild: Callable[[], nn.Module], export: Callable[[nn.Module], str], material: Material, known_head: bool = False,
) -> Rehearsal:  # fmt: skip
    """Check that training can work, in some seconds.

    Args:
        model: The initialised model, on its device; it is copied.
        schedule: The run's learning-rate schedule.
        build_optimizer: Makes the run's optimizer for a model.
        rebuild: Makes the model again, with other weights, to load into.
        export: Tries to export a model; says what went wrong, nothing if it did not.
        known_head: Whether the head came with the weights, at least for some classes, so that the loss may start low.

    Raises:
        RehearsalError: a check failed; the message names each, with what was seen and what that usually means.
    """
    with torch.random.fork_rng():
        checks = _definite(model, context, schedule, build_optimizer, material, known_head=known_head)
        facts = context.task.describe()
        lowest, chance = float(facts["lowest_loss"]), float(facts["chance_loss"])
        checks.append(check_start(model, context, material.batches[0], chance, known_head=known_head))
        if material.extremes:
            checks.append(check_sizes(trial_state(model, context, build_optimizer), context, material.extremes))
        stop_if_failed(checks)
        context = replace(context, freezing=context.freezing.thawed())
        plain = replace(context, transform=PlainTransform(context.transform))
        trained = trial_state(model, context, build_optimizer)
        losses = overfit(trained, plain, material.few, lowest)
        start = max(losses[0], chance) if known_head else losses[0]
        frozen = bool(context.freezing.frozen[0])
        checks.append(check_overfit(losses, len(material.few.samples), lowest, start, frozen=frozen))
        if math.isfinite(losses[-1]):
            state = trial_state(model, context, build_optimizer)
            checks.append(check_blind(state, context, material.few, losses, lowest))
        stop_if_failed(checks)
        checks.append(check_round_trip(trained.model, context, rebuild, material.few))
        checks.append(_check_export(trained.model, export))
        subset, bare_rate = check_subset(trial_state(model, context, build_optimizer), context, material.batches,
                                         slack=KNOWN_SLACK * chance if known_head else 0.0)  # fmt: skip
        checks.append(subset)
        stop_if_failed(checks)
    return Rehearsal(tuple(checks), bare_rate)


def _definite(
    model: nn.Module, context: StepContext, schedule: Schedule, build_optimizer: Build, material: Material,
    *, known_head: bool,
) -> list[Check]:  # fmt: skip
    """The checks without training, in float32 where they compare outputs. Those that only repeat what an earlier one
    found are left out."""
    micro, few = material.batches[0][0], material.few
    num = len(few.samples)
    precise = replace(context, device=replace(context.device, precision="fp32"))
    judged = evaluating(model)
    data = context.transform.evaluate(context.device.move(few.data))
    augmented = context.transform.train(context.device.move(few.data), epoch=0, step=0, rank=0, micro=0,
                                        samples=few.samples, closing=False)  # fmt: skip
    checks = [
        check_labels(micro, material.served, context),
        check_normalisation(micro, context, len(material.served.samples)),
        check_outputs(judged, precise, data),
        check_target(judged, precise, data, known_head=known_head),
        check_evaluation(judged, precise, data, num),
    ]
    if checks[-1].passed:
        checks.append(check_leak(judged, precise, data, num))
        checks.append(check_loss(judged, precise, (data, augmented), num))
    checks.append(check_gradients(model, precise, build_optimizer, data))
    if checks[-1].passed:
        plain = replace(context, transform=PlainTransform(context.transform))
        checks.append(check_learning_rate(trial_state(model, context, build_optimizer), plain, schedule, few))
    return checks


def stop_if_failed(checks: Sequence[Check]) -> None:
    """Raises RehearsalError if one of the checks failed."""
    if not all(c.passed for c in checks):
        raise RehearsalError(checks)


def trial_state(model: nn.Module, context: StepContext, build_optimizer: Build) -> TrainState:
    """A state around a copy of a model, for a short training at the peak learning rate."""
    copied = copy.deepcopy(model)
    schedule = Schedule(kind="wsd", warmup_steps=0, stable_until=10**9, total_steps=10**9, lrf=0.0)
    scale = LossScale(context.device.torch_device, active=context.device.scales_loss)
    return TrainState(copied, build_optimizer(copied), None, scale, Progress(schedule))


def check_round_trip(model: nn.Module, context: StepContext, rebuild: Callable[[], nn.Module], few: Micro) -> Check:
    """Weights that were trained for some steps predict the same after the way to disk and into a new model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}, str(path))
        other = rebuild()
        other.load_state_dict(load_file(str(path)))
    batch = context.transform.evaluate(context.device.move(few.data))
    outputs = []
    for network in (model, context.device.place(other)):
        network.eval()
        with torch.inference_mode(), context.device.autocast():
            outputs.append(context.task.predict(network, batch))
    mine, theirs = (tensors_of(made) for made in outputs)
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    return Check(
        "save, load, predict",
        same,
        "round trip ok" if same else "a saved and loaded model predicts something else",
        "the model keeps state outside its parameters and buffers, or computes at random in evaluation mode",
    )


def _check_export(model: nn.Module, export: Callable[[nn.Module], str]) -> Check:
    problem = export(model)
    return Check(
        "export",
        not problem,
        problem or "the network can be traced, and its trace computes the same",
        "the network decides in Python by the values or the number of its inputs, or uses what cannot be exported",
    )
