"""Measure training steps of the real model: ways to execute them in turn, and batch sizes upwards.

Runs in a process of its own (api/probe.py), so that running out of memory hurts nothing. Everything is yielded as soon
as it is known: what was found before a process died counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from goodfit.config.measured import AllocatorCost, BatchCost, StepCost
from goodfit.core.machine import keep_freed_memory, return_freed_memory
from goodfit.engine.contracts import Micro
from goodfit.engine.device import is_out_of_memory
from goodfit.engine.state import TrainState, copy_buffers
from goodfit.engine.step import StepContext, train_step

Build = Callable[[str, bool], tuple[TrainState, StepContext]]  # precision, channels-last

WARM_STEPS = 2  # not counted: allocation, kernel choice
MIN_ROUNDS, MAX_ROUNDS = 4, 25
PATIENCE = 60.0  # seconds, after which the ways that are ready are timed once each, and no more are made ready
MIN_STEPS, MAX_STEPS = 3, 12
SECONDS_PER_SIZE = 2.5
NEAR = 0.85  # of the best rate, from which sizes are compared once more, in turn ...
NEAR_ROUNDS = (3, 12)  # ... so often at least and at most ...
NEAR_SECONDS = 8.0  # ... within this time
COMPILE_STEPS = 3  # the first ones of a compiled network: compiling, and on CUDA the recording of graphs
COMPARED_STEPS = (6, 25)  # of the compiled and of the eager network in turn, at least and at most
COMPARED_SECONDS = 8.0
ALLOCATOR_BLOCKS, BLOCK_STEPS = 5, 3  # pairs of blocks, steps of each that count
ALLOCATOR_SECONDS = 6.0
FALLING = 0.9  # of the best rate, below which larger batches are not tried


def measure_executions(
    build: Build, group: Sequence[Micro], ways: Sequence[tuple[str, bool]], seconds: float
) -> Iterator[StepCost]:
    """Time the step in every way, one step of each in turn, and compare loss and gradient with fp32.

    Interleaving keeps the comparison fair on a machine whose speed wanders: each way sees the same neighbours.

    Args:
        build: Makes the run's state and context at a precision and memory format.
        group: One batch.
        ways: Precision and memory format; the first must be fp32, which the others are compared with.
        seconds: After this many no further round is begun; four rounds are made in any case, but for `PATIENCE`.
    """
    start = time.monotonic()

    def late() -> bool:
        return time.monotonic() - start > PATIENCE

    ready: list[tuple[StepCost, TrainState, StepContext]] = []
    reference: tuple[float, torch.Tensor] | None = None
    for precision, channels_last in ways:
        cost = StepCost(precision=precision, channels_last=channels_last)
        if ready and late():
            yield replace(cost, problem="not tried: the time for measuring was over")
            continue
        try:
            state, context = build(precision, channels_last)
            loss, gradient = loss_and_gradient(state.model, context, group)
            reference = reference or (loss, gradient)
            cost = replace(cost, loss_gap=_gap(loss, reference[0]), gradient_gap=_distance(gradient, reference[1]))
            for _ in range(WARM_STEPS):
                timed_step(state, context, group)
            ready.append((cost, state, context))
        except RuntimeError as error:
            yield replace(cost, problem=_reason(error))
    times: list[list[float]] = [[] for _ in ready]
    for number in range(MAX_ROUNDS):
        if (number >= MIN_ROUNDS and time.monotonic() - start > seconds) or (number and late()):
            break
        order = range(len(ready)) if number % 2 else range(len(ready) - 1, -1, -1)
        for k in order:
            times[k].append(timed_step(ready[k][1], ready[k][2], group))
    for (cost, _, _), measured in zip(ready, times, strict=True):
        yield replace(cost, seconds=statistics.median(measured))


def measure_compiling(
    build: Callable[[str, bool, str], tuple[TrainState, StepContext]], group: Sequence[Micro], way: StepCost, mode: str
) -> StepCost:
    """What compiling gains over one eager way, and takes.

    The compiled and the eager step are timed in turn, and the ratio of their medians is applied to the seconds that the
    eager way took among the others, so that all figures of a table compare.

    Args:
        build: Makes the run's state and context at a precision, memory format and compile mode.
        way: The eager way, as it was measured.
        mode: torch.compile's mode.
    """
    cost = replace(way, compile=mode, seconds=0.0)
    try:
        exact, context = build("fp32", False, "off")
        loss, gradient = loss_and_gradient(exact.model, context, group)
        del exact
        eager = build(way.precision, way.channels_last, "off")
        compiled = build(way.precision, way.channels_last, mode)
        begin = time.perf_counter()
        mine = loss_and_gradient(compiled[0].model, compiled[1], group)
        for _ in range(COMPILE_STEPS):
            timed_step(*compiled, group)
        first = time.perf_counter() - begin
        cost = replace(cost, loss_gap=_gap(mine[0], loss), gradient_gap=_distance(mine[1], gradient))
        for _ in range(WARM_STEPS):
            timed_step(*eager, group)
        times: tuple[list[float], list[float]] = ([], [])
        start = time.monotonic()
        while len(times[0]) < COMPARED_STEPS[0] or (
            len(times[0]) < COMPARED_STEPS[1] and time.monotonic() - start < COMPARED_SECONDS
        ):
            for mine_of, state in zip(times, (eager, compiled), strict=True):
                mine_of.append(timed_step(*state, group))
        before, after = (statistics.median(t) for t in times)
    except RuntimeError as error:
        return replace(cost, problem=_reason(error))
    return replace(cost, seconds=way.seconds * after / before,
                   compile_seconds=max(0.0, first - (COMPILE_STEPS + 1) * after))  # fmt: skip


def measure_allocator(state: TrainState, context: StepContext, group: Sequence[Micro]) -> AllocatorCost:
    """Time the step with freed memory kept and handed back, in turn, within this process; it ends with it kept.

    The first step of each block is not counted: it is the one that takes back, or hands back, what the other way left.
    """
    times: dict[bool, list[float]] = {True: [], False: []}
    ratios = []
    start = time.monotonic()
    try:
        for number in range(ALLOCATOR_BLOCKS):
            if number >= 3 and time.monotonic() - start > ALLOCATOR_SECONDS:
                break
            block: dict[bool, float] = {}
            for keep in (True, False) if number % 2 else (False, True):
                if not (keep_freed_memory() if keep else return_freed_memory()):
                    return AllocatorCost(problem="this C library has no such setting")
                steps = [timed_step(state, context, group) for _ in range(1 + BLOCK_STEPS)][1:]
                times[keep] += steps
                block[keep] = statistics.median(steps)
            ratios.append(block[False] / block[True])
    except RuntimeError as error:
        return AllocatorCost(problem=_reason(error))
    finally:
        keep_freed_memory()
    return AllocatorCost(keep=statistics.median(times[True]), system=statistics.median(times[False]),
                         ratio=statistics.median(ratios))  # fmt: skip


def measure_batches(
    state: TrainState, context: StepContext, groups_of: Callable[[int], Sequence[Sequence[Micro]]],
    sizes: Sequence[int], memory: int, seconds: float, held: int = 0, *, careful: bool = False,
) -> Iterator[BatchCost]:  # fmt: skip
    """Time the step at growing batch sizes until memory, time or the gain ends; then those near the best once more, in
    turn, which are yielded again: one after the other, 16 read 9 % faster than 32 here and was 7 % slower.

    Args:
        groups_of: Batches of so many samples: first that which takes the most memory, last the one to be timed; mostly
            the same one, but where inputs have several sizes.
        sizes: Upwards; memory is the most that was held so far, so the order matters.
        memory: Bytes that may be taken; the first size over it is the last one tried.
        held: Bytes that the process held before anything was built.
        seconds: After this many no further size is begun.
        careful: A size that would take more, as its smaller one did, is not begun: where this process would not survive it.
    """
    found: list[BatchCost] = []
    for cost in _upwards(state, context, groups_of, sizes, memory, seconds, held, careful):
        found.append(cost)
        yield cost
    fitting = [cost for cost in found if not cost.problem and cost.memory <= memory]
    best = max((cost.rate for cost in fitting), default=0.0)
    near = [cost for cost in fitting if cost.rate >= NEAR * best]
    if len(near) > 1:
        yield from _in_turn(state, context, groups_of, near)


def _in_turn(
    state: TrainState,
    context: StepContext,
    groups_of: Callable[[int], Sequence[Sequence[Micro]]],
    costs: Sequence[BatchCost],
) -> Iterator[BatchCost]:
    """The same sizes with seconds that compare: medians over rounds of one step of each."""
    groups = [groups_of(cost.batch)[-1] for cost in costs]
    times: list[list[float]] = [[] for _ in costs]
    start = time.monotonic()
    for number in range(NEAR_ROUNDS[1]):
        if number >= NEAR_ROUNDS[0] and time.monotonic() - start > NEAR_SECONDS:
            break
        for k in range(len(costs)) if number % 2 else range(len(costs) - 1, -1, -1):
            times[k].append(timed_step(state, context, groups[k]))
    for cost, measured in zip(costs, times, strict=True):
        yield replace(cost, seconds=statistics.median(measured))


def _upwards(
    state: TrainState, context: StepContext, groups_of: Callable[[int], Sequence[Sequence[Micro]]], sizes: Sequence[int],
    memory: int, seconds: float, held: int, careful: bool,
) -> Iterator[BatchCost]:  # fmt: skip
    """Each size after the smaller ones, with the memory that it took."""
    start, best, below, cost = time.monotonic(), 0.0, 0, BatchCost(batch=1)
    for size in sizes:
        if best and time.monotonic() - start > seconds:
            return
        expected = cost.memory * size / cost.batch
        cost = BatchCost(batch=size)
        if careful and expected > memory:
            yield replace(cost, problem=f"would need up to {expected / 1e9:.1f} GB")
            return
        try:
            groups = groups_of(size)
            for group in groups:
                for _ in range(WARM_STEPS):
                    timed_step(state, context, group)
            began = time.monotonic()
            steps: list[float] = []
            while len(steps) < MIN_STEPS or (len(steps) < MAX_STEPS and time.monotonic() - began < SECONDS_PER_SIZE):
                steps.append(timed_step(state, context, groups[-1]))
            cost = replace(cost, seconds=statistics.median(steps), memory=max(0, context.device.peak_memory() - held))
        except (RuntimeError, MemoryError) as error:
            yield replace(cost, problem=_reason(error))
            return
        yield cost
        best = max(best, cost.rate)
        below = below + 1 if cost.rate < FALLING * best else 0
        if cost.memory > memory or below == 2:
            return


def timed_step(state: TrainState, context: StepContext, group: Sequence[Micro]) -> float:
    """Seconds of one whole update at a learning rate of zero, waited for."""
    start = time.perf_counter()
    record = train_step(state, context, group, 0.0, copy_buffers(state.model))
    float(record.loss)
    return time.perf_counter() - start


def loss_and_gradient(model: nn.Module, context: StepContext, group: Sequence[Micro]) -> tuple[float, torch.Tensor]:
    """The loss of a batch without augmentation, and its gradient as one vector (float32, shape (parameters,))."""
    model.train()
    model.zero_grad(set_to_none=True)
    total = 0.0
    for micro in group:
        context.device.seed(0)  # the same dropout in every way
        batch = context.transform.evaluate(context.device.move(micro.data))
        with context.device.autocast():
            terms = context.task.loss(model, batch)
        loss = torch.stack([value / count for value, count in terms.values()]).sum()
        loss.backward()
        total += float(loss.detach())
    parts = [p.grad.detach().flatten().float() for p in model.parameters() if p.grad is not None]
    return total, torch.cat(parts)


def _gap(value: float, reference: float) -> float:
    return abs(value - reference) / max(1e-12, abs(reference))


def _distance(gradient: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((gradient - reference).norm() / reference.norm().clamp(min=1e-12))


def _reason(error: BaseException) -> str:
    return "out of memory" if is_out_of_memory(error) else str(error).splitlines()[0][:200]
