"""Averages of the weights against hand formulas: the moving one, the equal one (SWA), and its batch-norm statistics."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from goodfit.core.errors import Stopped
from goodfit.core.journal import Journal
from goodfit.engine.batch_norm import renew_statistics
from goodfit.engine.checkpoint import Checkpoints, restore, take_snapshot, tensors_sha256
from goodfit.engine.device import DevicePolicy
from goodfit.engine.ema import Ema
from goodfit.engine.loop import FitSettings, fit
from goodfit.engine.optimizer import build_optimizer
from goodfit.engine.ranks import Ranks
from goodfit.engine.schedule import Schedule, plan_schedule
from goodfit.engine.state import LossScale, Progress, TrainState, copy_buffers
from goodfit.engine.step import StepContext, train_step
from goodfit.engine.stop import StopFlag
from goodfit.engine.swa import build_average
from goodfit.models.groups import ParameterGroup
from goodfit.tasks.classify import ClassifyTask
from micros import Identity, Micro

FLAT = Schedule(kind="wsd", warmup_steps=0, stable_until=10**6, total_steps=10**6, lrf=0.0)
BATCH, STEPS = 8, 4  # samples per update, updates per epoch


def micro(seed: int, num: int = BATCH, dtype: torch.dtype = torch.float32, closing: bool = False) -> Micro:
    """Three separable classes; without noise while closing."""
    random = np.random.default_rng(seed)
    target = random.integers(0, 3, num)
    values = random.normal(size=(num, 6)) * (0.1 if closing else 1.0) + 2.0 * np.eye(3, 6)[target]
    return Micro(np.arange(num), {"image": torch.tensor(values, dtype=dtype), "target": torch.tensor(target)})


@dataclass
class Train:
    """Batches that are a function of the epoch; a rank takes every other sample."""

    dtype: torch.dtype = torch.float32
    rank: int = 0
    size: int = 1
    stop_at: tuple[int, int] | None = None
    flag: StopFlag | None = None
    batch: int = BATCH
    steps_per_epoch: int = STEPS

    def groups(self, epoch, position, num_micro, *, closing):
        for number in range(position // BATCH, STEPS):
            if self.stop_at == (epoch, number) and self.flag is not None:
                self.flag.signal = 2
            whole = micro(100 * epoch + number, dtype=self.dtype, closing=closing)
            mine = {k: v[self.rank :: self.size] for k, v in whole.data.items()}
            parts = [{k: v.tensor_split(num_micro)[i] for k, v in mine.items()} for i in range(num_micro)]
            yield [Micro(np.arange(len(part["target"])), part) for part in parts]


@dataclass
class Val:
    """Two batches; notes the weights of the trained network at every pass, and stops in the middle of one."""

    state: TrainState
    weights: list[list[torch.Tensor]] = field(default_factory=list)
    stop_at: int | None = None
    flag: StopFlag | None = None

    def __iter__(self):
        self.weights.append([p.detach().clone() for p in self.state.model.parameters()])
        for number in range(2):
            if self.stop_at == self.state.progress.epoch and self.flag is not None:
                self.flag.signal = 2
            yield micro(9000 + number, 32, dtype=self.weights[-1][0].dtype)


def network(dtype=torch.float32, norm=True):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(16)] if norm else []
    return nn.Sequential(nn.Linear(6, 16), *middle, nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3)).to(dtype)


def make_state(schedule=FLAT, *, ema=0.0, swa=False, dtype=torch.float32, precision="fp32", norm=True, lr=0.05):
    model = network(dtype, norm)
    groups = [ParameterGroup("all", tuple(n for n, _ in model.named_parameters()), lr, 0.01)]
    optimizer = build_optimizer(model, groups, kind="adamw", momentum=0.9)
    moving = Ema(model, ema) if ema else None
    scale = LossScale(torch.device("cpu"), active=precision == "fp16")
    return TrainState(
        model, optimizer, moving, scale, Progress(schedule), build_average(model, moving) if swa else None
    )


def context(precision="fp32", ranks=None):
    device = DevicePolicy(kind="cpu", precision=precision, channels_last=False)
    return StepContext(ClassifyTask(("a", "b", "c")), Identity(), device, ranks or Ranks(), 0, 1.0)


def one_step(state, number, *, bad=False):
    group = micro(number, dtype=next(state.model.parameters()).dtype)
    if bad:
        group.data["image"][2, 1] = float("nan")
    return train_step(state, context(), [group], 1.0, copy_buffers(state.model))


def run_fit(state, folder, *, patience=0, train=None, stop_in_val=None, checkpoints=None):
    """Run the engine's loop. Returns the validation data, which holds the weights at the end of each epoch."""
    flag = StopFlag()
    train = train or Train()
    train.flag = flag
    val = Val(state, stop_at=stop_in_val, flag=flag)
    settings = FitSettings(patience=patience, min_delta=0.0, monitor="accuracy", maximise=True)
    fit(state, context(), train, val, settings=settings, checkpoints=checkpoints or Checkpoints(folder, {}),
        journal=Journal(None), stop=flag)  # fmt: skip
    return val


def tensors(state):
    return take_snapshot(state).files


# The moving average


@pytest.mark.parametrize("decay", [0.8, 0.95, 0.98])  # moves at every step, every second, every fifth
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_moving_average_is_the_closed_sum_over_its_moves_also_masked_and_resumed(tmp_path, decay, dtype, limit):
    state = make_state(ema=decay, dtype=dtype)
    every = state.ema.every
    values = [state.model.state_dict()]
    start = {name: value.clone() for name, value in values[0].items()}
    moves, seen = [], []
    masked = {5, 9, 14, 20}
    for step in range(30):
        if step == 17:  # as a resume does: into a fresh state, through the files
            checkpoints = Checkpoints(tmp_path, {})
            checkpoints.save(take_snapshot(state))
            state = make_state(ema=decay, dtype=dtype)
            restore(state, checkpoints.latest())
        one_step(state, step, bad=step in masked)
        now = every if step >= every else 1
        if (step + 1) % now == 0 and step not in masked:
            moves.append(min(decay, (1 + step) / (10 + step)) ** now)
            seen.append({name: value.clone() for name, value in state.model.state_dict().items()})
    assert moves and (every == 1 or len(moves) < 30)
    for name, average in state.ema.model.state_dict().items():
        if not average.is_floating_point():
            continue
        closed = float(np.prod(moves)) * start[name]
        for number, (kept, weights) in enumerate(zip(moves, seen, strict=True)):
            closed = closed + (1 - kept) * float(np.prod(moves[number + 1 :])) * weights[name]
        assert float((average - closed).abs().max()) <= limit, name


# The equal average


def averaging(epochs, share, kind="wsd"):
    schedule = plan_schedule(kind, epochs=epochs, warmup=1, lrf=0.0, steps_per_epoch=STEPS, decay=0.2)
    return schedule.averaging(round(share * epochs) * STEPS)


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
def test_while_averaging_the_rate_stays_as_it_was_when_that_began(kind):
    schedule = averaging(20, 0.25, kind)
    plain = plan_schedule(kind, epochs=20, warmup=1, lrf=0.0, steps_per_epoch=STEPS, decay=0.2)
    start = 15 * STEPS
    reached = 1.0 if kind == "wsd" else plain.factor(start)
    assert {schedule.factor(step) for step in range(start, 20 * STEPS)} == {reached}
    assert [schedule.factor(s) for s in range(start)] == [plain.factor(s) for s in range(start)]
    assert not schedule.is_averaging(start - 1) and schedule.is_averaging(start)
    assert kind == "cosine" or schedule.stable_until == start  # pinned there; no plateau is looked for after it


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("norm", [True, False])
def test_the_equal_average_is_the_mean_over_the_ends_of_the_last_epochs(tmp_path, ema, norm):
    state = make_state(averaging(8, 0.5), ema=ema, swa=True, norm=norm)
    val = run_fit(state, tmp_path)
    assert len(val.weights) == 8 and state.progress.num_averaged == 4 and state.evaluated is state.swa
    for number, average in enumerate(state.swa.parameters()):
        mean = torch.stack([weights[number].double() for weights in val.weights[4:]]).mean(0)
        assert float((average.double() - mean).abs().max()) <= 1e-6
        assert float((val.weights[-1][number].double() - mean).abs().max()) > 1e-3, "the last weights alone would do"
    best = Checkpoints(tmp_path, {}).load_best(state.progress)
    averaged = ema > 0 or best.progress["num_averaged"] > 0
    assert ("ema" in best.files) == averaged and best.evaluated is best.files["ema" if averaged else "model"]
    last = Checkpoints(tmp_path, {}).latest()
    assert tensors_sha256({"": last.evaluated}) == tensors_sha256({"": state.swa.state_dict()})


def test_statistics_are_those_of_the_averaged_weights_on_undistorted_samples(tmp_path):
    state = make_state(averaging(6, 0.5), swa=True, dtype=torch.float64)
    mode = [module.training for module in state.swa.modules()]
    run_fit(state, tmp_path, train=Train(torch.float64))
    first, norm = state.swa[0], state.swa[1]
    with torch.no_grad():
        batches = [
            first(micro(500 + number, dtype=torch.float64, closing=True).data["image"]) for number in range(STEPS)
        ]
    mean = torch.stack([b.mean(0) for b in batches]).mean(0)
    variance = torch.stack([b.var(0) for b in batches]).mean(0)
    assert float((norm.running_mean - mean).abs().max()) <= 1e-12
    assert float((norm.running_var - variance).abs().max()) <= 1e-12
    assert float((state.model[1].running_var - variance).abs().max()) > 1e-3, "the trained network's own are others"
    assert norm.momentum == 0.1 and [module.training for module in state.swa.modules()] == mode


def test_frozen_batch_norm_and_statistics_that_are_not_finite_stay_as_they_were():
    state = make_state(swa=True)
    one_step(state, 0)
    before = tensors_sha256({"": state.swa.state_dict()})
    keys = {"epoch": 0, "num_micro": 1}
    state.model[1].requires_grad_(False)
    renew_statistics(state.swa, state.model, Train(), context(), **keys)
    assert tensors_sha256({"": state.swa.state_dict()}) == before
    state.model[1].requires_grad_(True)

    class Bad(Train):
        def groups(self, *args, **keywords):
            for group in super().groups(*args, **keywords):
                group[0].data["image"][0, 0] = float("inf")
                yield group

    renew_statistics(state.swa, state.model, Bad(), context(), **keys)
    assert tensors_sha256({"": state.swa.state_dict()}) == before
    renew_statistics(state.swa, state.model, Train(), context(), **keys)
    assert tensors_sha256({"": state.swa.state_dict()}) != before


def test_dropout_inside_a_batch_norm_stays_off():
    class Norm(nn.BatchNorm1d):
        """As timm's: what follows it is inside it."""

        def __init__(self, width):
            super().__init__(width)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(super().forward(x))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Norm(8), nn.Linear(8, 3), nn.BatchNorm1d(3))
    averages = [copy.deepcopy(model).eval() for _ in range(2)]
    for average in averages:  # from other random numbers
        renew_statistics(average, model, Train(), context(), epoch=0, num_micro=1)
    assert torch.equal(averages[0][3].running_var, averages[1][3].running_var)
    assert not torch.equal(averages[0][3].running_var, torch.ones(3))


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Two processes as two threads: the sum waits for both."""

    barrier: Any = None
    board: Any = None

    def sum_(self, tensor):
        self.board[self.rank] = tensor.clone()
        self.barrier.wait()
        total = sum(self.board)
        self.barrier.wait()
        return tensor.copy_(total)


def test_with_two_processes_the_statistics_are_the_mean_over_both():
    barrier, board, made = threading.Barrier(2, timeout=60), [None, None], [None, None]

    models = [network(torch.float64) for _ in range(2)]  # before the threads: they share one random state

    def work(rank):
        model = models[rank]
        average = copy.deepcopy(model).eval()
        ranks = ThreadRanks(rank, 2, barrier, board)
        renew_statistics(average, model, Train(torch.float64, rank, 2), context(ranks=ranks), epoch=3, num_micro=2)
        made[rank] = average.state_dict()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tensors_sha256({"": made[0]}) == tensors_sha256({"": made[1]})
    with torch.no_grad():
        first = network(torch.float64)[0]
        parts = [first(part) for number in range(STEPS) for rank in range(2)
                 for part in micro(300 + number, dtype=torch.float64, closing=True).data["image"][rank::2].tensor_split(2)]  # fmt: skip
    assert float((made[0]["1.running_mean"] - torch.stack([p.mean(0) for p in parts]).mean(0)).abs().max()) <= 1e-12
    assert float((made[0]["1.running_var"] - torch.stack([p.var(0) for p in parts]).mean(0)).abs().max()) <= 1e-12


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("where", ["before", "in mid-epoch", "in validation"])
def test_averaging_is_exact_when_it_is_stopped_and_resumed(tmp_path, ema, where):
    whole = make_state(averaging(8, 0.5), ema=ema, swa=True)
    run_fit(whole, tmp_path / "whole")
    state = make_state(averaging(8, 0.5), ema=ema, swa=True)
    stops = {"before": (3, 2), "in mid-epoch": (6, 1), "in validation": None}
    with pytest.raises(Stopped):
        run_fit(state, tmp_path / "cut", train=Train(stop_at=stops[where]),
                stop_in_val=6 if where == "in validation" else None)  # fmt: skip
    again = make_state(averaging(8, 0.5), ema=ema, swa=True)
    checkpoints = Checkpoints(tmp_path / "cut", {})
    restore(again, checkpoints.latest())
    assert again.progress.num_averaged == {"before": 0, "in mid-epoch": 2, "in validation": 3}[where]
    run_fit(again, tmp_path / "cut", checkpoints=checkpoints)
    assert tensors_sha256(tensors(again)) == tensors_sha256(tensors(whole))
    assert again.progress.best == whole.progress.best


def test_the_moving_average_ends_where_the_equal_one_begins(tmp_path):
    alone, both = make_state(averaging(8, 0.25), ema=0.9), make_state(averaging(8, 0.25), ema=0.9, swa=True)
    for state in (alone, both):
        state.progress.schedule = averaging(8, 0.25)
        for step in range(6 * STEPS):
            one_step(state, step)
    assert tensors_sha256({"": alone.ema.model.state_dict()}) == tensors_sha256({"": both.ema.model.state_dict()})
    before = tensors_sha256({"": both.ema.model.state_dict()})
    assert both.evaluated is both.ema.model is both.swa, "one copy of the weights serves both"
    one_step(both, 99)
    assert tensors_sha256({"": both.ema.model.state_dict()}) == before


def test_a_cool_down_is_an_average_at_a_constant_rate(tmp_path):
    """Patience is spent before the part that averages: the segment that follows averages in place of its decay."""
    state = make_state(averaging(40, 0.25), swa=True)
    val = run_fit(state, tmp_path, patience=3)
    progress = state.progress
    assert progress.segment == 1 and progress.ended == "cool-down" and progress.step < 30 * STEPS
    steps = range(progress.parent["step"], progress.step)
    assert {progress.schedule.factor(step) for step in steps} == {1.0}
    assert progress.num_averaged == len(steps) // STEPS >= 2
    for number, average in enumerate(state.swa.parameters()):
        mean = torch.stack([weights[number] for weights in val.weights[-progress.num_averaged :]]).mean(0)
        assert float((average - mean).abs().max()) <= 1e-6


# Precision


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_moments_averages_and_the_loss_are_float32(precision):
    state, ctx = make_state(ema=0.9, precision=precision), context(precision)
    kinds = []

    class Watched(ClassifyTask):
        def loss(self, model, batch):
            seen = []
            handle = model[-1].register_forward_hook(lambda _m, _i, made: seen.append(made.dtype))
            terms = super().loss(model, batch)
            handle.remove()
            kinds.append((seen[0], terms["loss"][0].dtype))
            return terms

    ctx = StepContext(Watched(("a", "b", "c")), Identity(), ctx.device, Ranks(), 0, 1.0)
    for number in range(3):
        record = train_step(state, ctx, [micro(number)], 1.0, copy_buffers(state.model))
    low = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert kinds == [(low, torch.float32)] * 3 and record.loss.dtype == torch.float32
    files = tensors(state)
    floats = [t for name in ("model", "ema", "optimizer") for t in files[name].values() if t.is_floating_point()]
    assert len(floats) > 20 and {t.dtype for t in floats} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 for p in state.model.parameters())


def test_the_fp16_loss_scale_is_kept_exactly(tmp_path):
    """Two overflows and some good steps: both numbers of the scale decide later steps."""
    states = [make_state(precision="fp16") for _ in range(2)]
    ctx = context("fp16")

    def steps(state, numbers):
        for number in numbers:
            group = micro(number)
            if number in (1, 2):
                group.data["image"][0] = 1e30  # overflows in half precision
            train_step(state, ctx, [group], 1.0, copy_buffers(state.model))

    for state in states:
        steps(state, range(7))
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(take_snapshot(states[0]))
    other = make_state(precision="fp16")
    restore(other, checkpoints.latest())
    assert float(other.loss_scale.value) == 2.0**12 and float(other.loss_scale.good_steps) == 4
    for state in (states[1], other):
        state.loss_scale.good_steps += 1994  # grows at the second step from here
        steps(state, range(7, 10))
    assert float(other.loss_scale.value) == 2.0**13
    assert tensors_sha256(tensors(other)) == tensors_sha256(tensors(states[1]))
