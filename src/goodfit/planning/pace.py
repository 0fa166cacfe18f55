"""How fast the run will really go: its own loop on a copy of its state, for some seconds, before the first epoch."""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from goodfit.engine.checkpoint import SAVE_SHARE, Checkpoints, take_snapshot
from goodfit.engine.contracts import EvaluationData, TrainingData
from goodfit.engine.device import compile_in_place
from goodfit.engine.evaluate import evaluate
from goodfit.engine.state import TrainState, copy_buffers
from goodfit.engine.step import StepContext, train_step

WARM_STEPS = 1  # not counted: loader processes start; the rehearsal has warmed up the rest
MIN_STEPS, MAX_STEPS = 4, 200
RUN_SHARE = 0.02  # of the run that timing may take ...
LEAST_SECONDS, MOST_SECONDS = 1.0, 8.0  # ... within these; the least number of steps comes first
VAL_BATCHES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Measured seconds of everything that an epoch consists of, and peak memory.

    Attributes:
        step: Of one update, waited for; the mean, since epochs are sums.
        data: Waiting for one update's samples.
        start: Of an epoch's first wait beyond that: loader processes start.
        validation: Of one validation sample, loading included, where it is kept after the first pass.
        snapshot: Copying the state out of the model, as each improvement does.
        save: Writing one checkpoint, with its copy.
        memory: Peak memory of the device with all this done, bytes; on the CPU of the process.
    """

    step: float
    data: float
    start: float
    validation: float
    snapshot: float
    save: float
    memory: int

    def epoch(self, steps: int, num_val: int) -> float:
        """Seconds of an epoch after the first: steps, validation, an improvement, and saving, which takes at most 5 %."""
        work = self.start + steps * (self.step + self.data) + num_val * self.validation + self.snapshot
        return work + min(self.save, SAVE_SHARE * work)

    def describe(self) -> str:
        """One line for the terminal."""
        return (f"{1e3 * self.step:.0f} ms a step and {1e3 * self.data:.1f} ms waiting for its data, "
                f"{1e3 * self.validation:.1f} ms a validation sample, {self.save:.1f} s a checkpoint")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the event."""
        return asdict(self)


def measure_pace(
    state: TrainState, context: StepContext, train: TrainingData, val: EvaluationData, *, folder: Path, bare_rate: float,
    compiled: str = "off", cost: Callable[[Any], float] = lambda _: 1.0,
) -> Pace:  # fmt: skip
    """Take the run's own steps from its own loader on a copy of its state; validate, and save once.

    The state, the random state and the loaders are left as they were (the validation loader may keep pictures that it
    decoded, which the run then need not decode again).

    Args:
        folder: The run's; a checkpoint is written there and removed.
        bare_rate: Samples per second of the bare step, for how long to measure.
        compiled: As the run's network is: copies are eager.
        cost: Of a group of micro-batches, over the mean of the run: where inputs have several sizes, some steps are not a
            fair sample of all.

    Raises:
        RuntimeError: memory ran out.
        StorageError: the checkpoint could not be written.
    """
    run = state.progress.schedule.total_steps * train.batch / bare_rate
    seconds = min(MOST_SECONDS, max(LEAST_SECONDS, RUN_SHARE * run))
    with torch.random.fork_rng():
        copied, context = copy.deepcopy(state), replace(context, freezing=context.freezing.thawed())
        copied.stage = -1
        compile_in_place(copied.model, compiled)
        step, data, start = _steps(copied, context, train, seconds, cost)
        validation = _validation(copied, context, val)
        began = time.perf_counter()
        held = take_snapshot(copied)  # as the best state is held while another is written
        snapshot = time.perf_counter() - began
        with tempfile.TemporaryDirectory(prefix=".tmp-pace-", dir=folder) as made:
            checkpoints = Checkpoints(Path(made), {})
            began = time.perf_counter()
            checkpoints.save(take_snapshot(copied))
            save = time.perf_counter() - began
        del held
    return Pace(step=step, data=data, start=start, validation=validation, snapshot=snapshot, save=save,
                memory=context.device.peak_memory())  # fmt: skip


def _steps(
    state: TrainState, context: StepContext, train: TrainingData, seconds: float, cost: Callable[[Any], float]
) -> tuple[float, float, float]:
    """Mean seconds of a step, mean wait for its data, both at the mean cost of the run, and the first wait beyond it."""
    waits: list[float] = []
    steps: list[float] = []
    costs: list[float] = []
    first = 0.0
    began = time.perf_counter()
    with closing(_endless(train, state.progress.num_micro)) as groups:
        while len(steps) < WARM_STEPS + MIN_STEPS or (len(steps) < MAX_STEPS and time.perf_counter() - began < seconds):
            start = time.perf_counter()
            group = next(groups)
            ready = time.perf_counter()
            record = train_step(state, context, group, 0.0, copy_buffers(state.model))
            float(record.loss)
            waits.append(ready - start)
            steps.append(time.perf_counter() - ready)
            costs.append(cost(group))
            first = first or waits[0]
            if len(steps) == WARM_STEPS:
                began = time.perf_counter()
    counted = sum(costs[WARM_STEPS:])
    wait = sum(waits[WARM_STEPS:]) / counted
    return sum(steps[WARM_STEPS:]) / counted, wait, max(0.0, first - wait)


def _endless(train: TrainingData, num_micro: int) -> Generator[Any]:
    for epoch in itertools.count():
        with closing(train.groups(epoch, 0, num_micro, closing=False)) as groups:
            yield from groups


def _validation(state: TrainState, context: StepContext, val: EvaluationData) -> float:
    """Seconds per validation sample, the second time: most are kept by then."""
    for _ in range(2):
        start = time.perf_counter()
        some = _Some(val)
        evaluate(state.evaluated, some, task=context.task, transform=context.transform, device=context.device,
                 ranks=context.ranks)  # fmt: skip
        seconds = time.perf_counter() - start
    return seconds / max(1, some.count)


class _Some:
    """The first batches of a split, counted."""

    def __init__(self, val: EvaluationData) -> None:
        self._val = val
        self.count = 0

    def __iter__(self) -> Iterator[Any]:
        self.count = 0
        for micro in itertools.islice(self._val, VAL_BATCHES):
            self.count += len(micro.samples)
            yield micro

    def halve(self) -> bool:
        """Never: beside the run's state there is a copy of it here, so that less fits than in the run."""
        return False
