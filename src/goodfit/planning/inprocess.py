"""Measuring in this process, on a copy: for a module handed over in Python, which cannot be built again elsewhere."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from goodfit.config.measured import BatchCost, StepCost, latest
from goodfit.engine.contracts import Micro
from goodfit.engine.ema import Ema
from goodfit.engine.schedule import Schedule
from goodfit.engine.state import LossScale, Progress, TrainState
from goodfit.engine.step import StepContext
from goodfit.planning.measure import measure_batches, measure_executions, timed_step


@contextlib.contextmanager
def copied_state(
    model: nn.Module, context: StepContext, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer], *, ema: bool
) -> Iterator[TrainState]:
    """A state of training around a deep copy of a module, to take steps with.

    The module, its gradients, buffers and mode are not touched, and the random state of torch (of the accelerator too),
    NumPy and Python is put back at the end.

    Args:
        model: The module, on its device; twice its memory is needed, and that of an optimizer.
        build_optimizer: Makes the run's optimizer for a module.
        ema: Whether the run averages its weights.
    """
    numbers, python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        try:
            copied = copy.deepcopy(model)
            for mine in copied.parameters():
                mine.grad = None
            schedule = Schedule(kind="wsd", warmup_steps=0, stable_until=10**9, total_steps=10**9, lrf=0.0)
            scale = LossScale(context.device.torch_device, active=context.device.scales_loss)
            average = Ema(copied, 0.9) if ema else None
            yield TrainState(copied, build_optimizer(copied), average, scale, Progress(schedule))
        finally:
            np.random.set_state(numbers)
            random.setstate(python)


def step_seconds_here(
    model: nn.Module, context: StepContext, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer], group: Sequence[Micro], *,
    ema: bool,
) -> float:  # fmt: skip
    """Seconds of one step on a copy of a module, after one to warm up; 0 where it cannot be taken, which training will tell of."""
    with (
        contextlib.suppress(RuntimeError, MemoryError),
        copied_state(model, context, build_optimizer, ema=ema) as state,
    ):
        timed_step(state, context, group)
        return timed_step(state, context, group)
    return 0.0


def measure_batches_here(
    model: nn.Module, context: StepContext, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    group_of: Callable[[int], Sequence[Micro]], sizes: Sequence[int], *, memory: int, seconds: float, ema: bool,
) -> list[BatchCost]:  # fmt: skip
    """Time the step at growing batch sizes on a copy of a module, as measure_batches does.

    Memory is the largest beyond what is held at the start; on the CPU, of this process.

    Args:
        group_of: A batch of so many samples.
        memory: Bytes that a batch may take. On the CPU no size is begun that would take more by the one before it: the system would
            end this process.
        seconds: After this many no further size is begun.
    """
    found: list[BatchCost] = []
    context.device.reset_peak_memory()
    held = context.device.peak_memory()
    with contextlib.suppress(MemoryError), copied_state(model, context, build_optimizer, ema=ema) as state:
        careful = context.device.kind == "cpu"
        for cost in measure_batches(
            state, context, lambda num: [group_of(num)], sizes, memory, seconds, held, careful=careful
        ):
            found.append(cost)
    return list(latest(found))


def measure_ways_here(
    model: nn.Module, context: StepContext, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    group: Sequence[Micro], ways: Sequence[tuple[str, bool]], *, seconds: float, ema: bool,
) -> list[StepCost]:  # fmt: skip
    """Time the step in every way on copies of a module, and compare loss and gradient with fp32, as measure_executions does.

    Args:
        group: One batch.
        ways: Precision and memory format, plain fp32 first.
        seconds: After this many no further round is begun.
    """
    with contextlib.ExitStack() as copies:

        def build(precision: str, channels_last: bool) -> tuple[TrainState, StepContext]:
            device = replace(context.device, precision=precision, channels_last=channels_last)
            other = replace(context, device=device)
            placed = device.place(copy.deepcopy(model))
            return copies.enter_context(copied_state(placed, other, build_optimizer, ema=ema)), other

        return list(measure_executions(build, group, ways, seconds))
