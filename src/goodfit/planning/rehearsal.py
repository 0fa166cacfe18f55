"""A short rehearsal before the long run: does this model, with this data and these settings, learn at all?

After Karpathy, "A Recipe for Training Neural Networks" (2019): the loss starts at chance, a handful of samples can be
overfitted, and what is saved predicts the same when loaded. Works on copies: the run's own state is not touched.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from goodfit.core.errors import TrainingError
from goodfit.engine.contracts import BatchTransform, Micro
from goodfit.engine.schedule import Schedule
from goodfit.engine.state import LossScale, Progress, TrainState, copy_buffers
from goodfit.engine.step import StepContext, train_step

NUM_OVERFIT = 8
MAX_OVERFIT_STEPS = 100
REACHED = 0.1  # of the way from the start to the lowest possible loss that may be left
FALLING = 0.75  # a loss below this share of the start after all steps still counts as learning
CHANCE_BAND = (0.5, 1.5)  # times the chance level, for the loss at the start
BARE_STEPS = 8


@dataclass(frozen=True, slots=True)
class Check:
    """One check of the rehearsal: what was seen, and what it usually means when it fails."""

    name: str
    passed: bool
    evidence: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """All checks, and the samples per second of the bare step on a batch in memory."""

    checks: tuple[Check, ...]
    bare_rate: float

    def describe(self) -> str:
        """One line for the terminal."""
        return " · ".join(check.evidence for check in self.checks)


class _Plain:
    """The evaluation transform in place of the training one: no augmentation while a few samples are overfitted."""

    def __init__(self, transform: BatchTransform) -> None:
        self._transform = transform

    def train(self, batch: Any, **_keys: Any) -> Any:
        return self._transform.evaluate(batch)

    def evaluate(self, batch: Any) -> Any:
        return self._transform.evaluate(batch)


def rehearse(
    model: nn.Module, context: StepContext, *, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    rebuild: Callable[[], nn.Module], few: Micro, batch: Sequence[Micro],
) -> Rehearsal:  # fmt: skip
    """Check that training can work, in some seconds.

    Args:
        model: The initialised model, on its device; it is copied.
        build_optimizer: Makes the run's optimizer for a model.
        rebuild: Makes the model again, with other weights, to load into.
        few: Eight samples of several classes, through the serving path.
        batch: One augmented batch of training.

    Raises:
        TrainingError: a check failed; the message says what that usually means.
    """
    card = context.task.describe()
    start_loss = _start_loss(model, context, batch)
    checks = [_check_start(start_loss, float(card["chance_loss"]))]
    plain = replace(context, transform=_Plain(context.transform))
    checks.append(_check_overfit(_state(model, context, build_optimizer), plain, few, float(card["lowest_loss"])))
    checks.append(_check_round_trip(model, context, rebuild, few))
    failed = [c for c in checks if not c.passed]
    if failed:
        raise TrainingError(
            "The rehearsal failed: " + "; ".join(f"{c.name}: {c.evidence}" for c in failed),
            kept="nothing was trained",
            next="; ".join(c.meaning for c in failed) + "; to go on nevertheless: rehearse=false",
        )
    return Rehearsal(tuple(checks), _bare_rate(_state(model, context, build_optimizer), context, batch))


def _state(
    model: nn.Module, context: StepContext, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> TrainState:
    copied = copy.deepcopy(model)
    schedule = Schedule(kind="wsd", warmup_steps=0, stable_until=10**9, total_steps=10**9, lrf=0.0)
    scale = LossScale(context.device.torch_device, active=context.device.scales_loss)
    return TrainState(copied, build_optimizer(copied), None, scale, Progress(schedule))


def _start_loss(model: nn.Module, context: StepContext, batch: Sequence[Micro]) -> float:
    """The training loss of a batch before any update, in evaluation mode (dropout off)."""
    total, count = 0.0, 0.0
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for micro in batch:
            data = context.transform.evaluate(context.device.move(micro.data))
            with context.device.autocast():
                terms = context.task.loss(model, data)
            total += sum(float(s) for s, _ in terms.values())
            count += max(float(c) for _, c in terms.values())
    model.train(was_training)
    return total / (count or 1.0)


def _check_start(loss: float, chance: float) -> Check:
    low, high = CHANCE_BAND
    return Check(
        "loss at start",
        math.isfinite(loss) and low * chance <= loss <= high * chance,
        f"loss at start {loss:.2f} (chance {chance:.2f})",
        "a loss far from chance means a head that is not new, images of the wrong scale, or labels that do not fit",
    )


def _check_overfit(state: TrainState, context: StepContext, few: Micro, lowest: float) -> Check:
    first = last = math.nan
    steps = 0
    for steps in range(1, MAX_OVERFIT_STEPS + 1):
        record = train_step(state, context, [few], 1.0, copy_buffers(state.model))
        last = float(record.loss)
        first = last if steps == 1 else first
        if not math.isfinite(last) or last <= lowest + REACHED * (first - lowest):
            break
    reached = math.isfinite(last) and last <= lowest + REACHED * (first - lowest)
    falling = math.isfinite(last) and last - lowest <= FALLING * (first - lowest)
    num = len(few.samples)
    evidence = (
        f"{num} images overfitted in {steps} steps"
        if reached
        else f"{num} images: loss {first:.2f} → {last:.2f} in {steps} steps"
    )
    return Check(
        "overfit a few samples",
        reached or falling,
        evidence,
        "a model that cannot fit eight samples has a learning rate of zero or far too high or low, frozen weights, or "
        "labels that do not belong to the images",
    )


def _check_round_trip(model: nn.Module, context: StepContext, rebuild: Callable[[], nn.Module], few: Micro) -> Check:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, str(path))
        other = rebuild()
        other.load_state_dict(load_file(str(path)))
    batch = context.transform.evaluate(context.device.move(few.data))
    outputs = []
    for network in (model, context.device.place(other)):
        was_training = network.training
        network.eval()
        with torch.inference_mode(), context.device.autocast():
            outputs.append(context.task.predict(network, batch))
        network.train(was_training)
    same = torch.equal(outputs[0], outputs[1])
    return Check(
        "save, load, predict",
        same,
        "round trip ok" if same else "a saved and loaded model predicts something else",
        "the model keeps state outside its parameters and buffers, or computes at random in evaluation mode",
    )


def _bare_rate(state: TrainState, context: StepContext, batch: Sequence[Micro]) -> float:
    """Samples per second of the training step alone, on a batch in memory: median of 8 steps after 2."""
    seconds = []
    for number in range(BARE_STEPS + 2):
        start = time.perf_counter()
        record = train_step(state, context, batch, 0.0, copy_buffers(state.model))
        float(record.loss)  # waits for the device
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    return sum(len(micro.samples) for micro in batch) / statistics.median(seconds)
