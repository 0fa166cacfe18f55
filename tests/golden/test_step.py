"""The step is exact: accumulation, masking of bad updates, clipping, precision. Two computations made now are compared."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from goodfit.engine.checkpoint import tensors_sha256
from goodfit.engine.device import DevicePolicy
from goodfit.engine.ema import Ema
from goodfit.engine.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from goodfit.engine.ranks import Ranks
from goodfit.engine.schedule import Schedule, plan_schedule
from goodfit.engine.state import LossScale, Progress, TrainState, copy_buffers
from goodfit.engine.step import StepContext, train_step
from goodfit.models.groups import ParameterGroup
from micros import Identity, Micro

FLAT = Schedule(kind="wsd", warmup_steps=0, stable_until=10**6, total_steps=10**6, lrf=0.0)


class OneTerm:
    """Cross-entropy, counted by samples."""

    def loss(self, model, batch):
        logits = model(batch["x"])
        return {"loss": (nn.functional.cross_entropy(logits, batch["y"], reduction="sum"), len(logits))}


class TwoTerms:
    """A second term that only some samples carry, counted by those, as boxes are in detection."""

    def loss(self, model, batch):
        logits = model(batch["x"])
        positive = batch["y"] == 1
        extra = (logits[positive] ** 2).sum()
        return {
            "class": (nn.functional.cross_entropy(logits, batch["y"], reduction="sum"), len(logits)),
            "box": (extra, positive.sum()),
        }


def network(batch_norm=False):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(16)] if batch_norm else []
    return nn.Sequential(nn.Linear(6, 16), *middle, nn.Tanh(), nn.Dropout(0.0), nn.Linear(16, 3))


def make_state(model, kind="adamw", precision="fp32", ema=False, lr=0.05):
    groups = [ParameterGroup("all", tuple(n for n, _ in model.named_parameters()), lr, 0.01)]
    optimizer = build_optimizer(model, groups, kind=kind, momentum=0.9)
    scale = LossScale(torch.device("cpu"), active=precision == "fp16")
    return TrainState(model, optimizer, Ema(model, 0.9) if ema else None, scale, Progress(FLAT))


def context(task, precision="fp32", clip=0.0):
    device = DevicePolicy(kind="cpu", precision=precision, channels_last=False)
    return StepContext(task, Identity(), device, Ranks(), 0, clip)


def batch(num=12, seed=0, dtype=torch.float32):
    random = np.random.default_rng(seed)
    x = torch.tensor(random.normal(size=(num, 6)), dtype=dtype)
    return {"x": x, "y": torch.tensor(random.integers(0, 3, num))}


def chop(data, sizes):
    micros, start = [], 0
    for size in sizes:
        part = {k: v[start : start + size] for k, v in data.items()}
        micros.append(Micro(np.arange(start, start + size), part))
        start += size
    return micros


def run_steps(state, ctx, groups, count=3):
    records = []
    for number in range(count):
        records.append(train_step(state, ctx, groups[number % len(groups)], 1.0, copy_buffers(state.model)))
    return records


@pytest.mark.parametrize("task", [OneTerm(), TwoTerms()])
@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("sizes", [(12,), (6, 6), (5, 4, 3), (7, 1, 1, 3), (2, 1, 3, 1, 2, 1, 2)])
def test_uneven_micro_batches_equal_one_batch(task, kind, sizes):
    data = [batch(seed=s, dtype=torch.float64) for s in range(3)]
    one, many = make_state(network().double(), kind), make_state(network().double(), kind)
    first = run_steps(one, context(task, clip=0.5), [chop(d, (12,)) for d in data])
    second = run_steps(many, context(task, clip=0.5), [chop(d, sizes) for d in data])
    for a, b in zip(first, second, strict=True):
        assert float(a.loss) == pytest.approx(float(b.loss), rel=1e-12)
        assert float(a.grad_norm) == pytest.approx(float(b.grad_norm), rel=1e-12)
    for p, q in zip(one.model.parameters(), many.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-12)


def test_the_mean_of_means_would_not_pass():
    """The control: with a plain mean over uneven micro-batches the gradient is another one."""
    data = batch(dtype=torch.float64)

    class MeanOfMeans(OneTerm):
        def loss(self, model, part):
            ((total, count),) = super().loss(model, part).values()
            return {"loss": (total / count, 1)}

    one, many = make_state(network().double(), "sgd"), make_state(network().double(), "sgd")
    run_steps(one, context(MeanOfMeans()), [chop(data, (12,))], 1)
    run_steps(many, context(MeanOfMeans()), [chop(data, (9, 3))], 1)
    gap = max(
        float((p - q).detach().abs().max())
        for p, q in zip(one.model.parameters(), many.model.parameters(), strict=True)
    )
    assert gap > 1e-4


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("good_steps", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_planted_nan_changes_nothing(kind, value, good_steps):
    state = make_state(network(batch_norm=True), kind, ema=True)
    ctx = context(OneTerm(), clip=1.0)
    run_steps(state, ctx, [chop(batch(), (12,))], good_steps)
    before = tensors_sha256({"m": state.model.state_dict(), "o": optimizer_tensors(state.optimizer),
                             "e": state.ema.model.state_dict()})  # fmt: skip
    bad = batch(seed=5)
    bad["x"][3, 2] = value
    record = train_step(state, ctx, chop(bad, (12,)), 1.0, copy_buffers(state.model))
    after = tensors_sha256({"m": state.model.state_dict(), "o": optimizer_tensors(state.optimizer),
                            "e": state.ema.model.state_dict()})  # fmt: skip
    assert bool(record.bad) and list(record.samples) == list(range(12)) and before == after
    good = train_step(state, ctx, chop(batch(), (12,)), 1.0, copy_buffers(state.model))
    assert not bool(good.bad) and torch.isfinite(good.loss)


def test_without_the_mask_the_weights_would_be_lost():
    """The control: torch's own step on the same gradient leaves NaN in the weights."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    bad = batch()
    bad["x"][0, 0] = float("nan")
    nn.functional.cross_entropy(model(bad["x"]), bad["y"]).backward()
    optimizer.step()
    assert any(torch.isnan(p).any() for p in model.parameters())


def test_clipping_bounds_the_update():
    """The gradient norm is that of the true gradient, and the update is that of the clipped one."""
    model, reference = network(), network()
    state = make_state(model, "sgd")
    state.optimizer.param_groups[0]["weight_decay"] = 0.0
    record = train_step(state, context(OneTerm(), clip=0.01), chop(batch(), (12,)), 1.0, copy_buffers(model))
    nn.functional.cross_entropy(reference(batch()["x"]), batch()["y"]).backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    assert float(record.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        step = 0.05 * 1.9 * q.grad  # Nesterov's first step is (1 + momentum) times the gradient
        assert torch.allclose(p, q - step, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_the_loss_falls_in_fifty_steps(precision, kind):
    state = make_state(network(batch_norm=True), kind, precision, lr=0.2 if kind == "sgd" else 0.05)
    records = run_steps(state, context(OneTerm(), precision, clip=1.0), [chop(batch(32), (32,))], 50)
    assert float(records[-1].loss) < 0.5 * float(records[0].loss)
    assert not any(bool(r.bad) for r in records)


def test_the_loss_does_not_fall_without_updates():
    """The control of the test above: with a factor of zero it would not fall."""
    state = make_state(network(), "adamw")
    losses = [float(train_step(state, context(OneTerm()), chop(batch(32), (32,)), 0.0, []).loss) for _ in range(50)]
    assert losses[-1] == losses[0]


def test_fp16_scale_halves_on_overflow_and_grows_again():
    scale = LossScale(torch.device("cpu"), active=True)
    start = float(scale.value)
    scale.update(torch.tensor(True))
    assert float(scale.value) == start / 2
    for _ in range(2000):
        scale.update(torch.tensor(False))
    assert float(scale.value) == start


def test_optimizers_equal_torch_over_many_steps():
    for kind, make in (
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.9, 0.999), weight_decay=0.01)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.9, 0.999), weight_decay=0.01)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)),
    ):
        ours, theirs = network().double(), network().double()
        state, reference = make_state(ours, kind), make(theirs.parameters())
        for number in range(200):
            data = batch(seed=number, dtype=torch.float64)
            train_step(state, context(OneTerm()), chop(data, (12,)), 1.0, [])
            reference.zero_grad()
            nn.functional.cross_entropy(theirs(data["x"]), data["y"]).backward()
            reference.step()
        gap = max(
            float((p - q).detach().abs().max()) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
        )
        assert gap < 1e-7, kind


def test_ema_equals_the_formula():
    model = network(batch_norm=True)
    ema = Ema(model, 0.95)
    expected = copy.deepcopy(model.state_dict())
    for step in range(32):
        with torch.no_grad():
            for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
                tensor += torch.randn_like(tensor) * 0.1
        if (
            step < 2 or step % 2 == 1
        ):  # a tenth of the horizon of 20 steps: every second step, by the decay of two; the first two singly
            decay = min(0.95, (1 + step) / (10 + step)) ** (1 if step < 2 else 2)
            for name, value in model.state_dict().items():
                expected[name] = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
        ema.update(model, step, torch.tensor(False), reads_are_free=step % 4 == 3)  # both paths
    for name, value in ema.model.state_dict().items():
        assert torch.allclose(value, expected[name].to(value.dtype), atol=1e-6), name


@pytest.mark.parametrize(("decay", "every"), [(0.9, 1), (0.95, 2), (0.99, 10), (0.999, 16), (0.5, 1)])
def test_the_average_moves_ten_times_in_its_horizon_and_at_least_every_sixteen_steps(decay, every):
    model = network()
    ema = Ema(model, decay)
    moved = []
    for step in range(32):
        before = copy.deepcopy(ema.model.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1
        ema.update(model, step, torch.tensor(False), reads_are_free=True)
        if any(not torch.equal(before[name], value) for name, value in ema.model.state_dict().items()):
            moved.append(step + 1)
    assert moved == [*range(1, every + 1), *range(2 * every, 33, every)]  # the first one by one


class Images(nn.Module):
    """A convolution in channels-last memory, as training uses it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(2, 8, (1, 3)), nn.Tanh(), nn.Conv2d(8, 3, 1), nn.Flatten())
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.layers(x.view(-1, 2, 1, 3).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("make", [network, Images])
@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_optimizer_state_survives_its_file_form(make, kind):
    state = make_state(make(), kind)
    run_steps(state, context(OneTerm()), [chop(batch(), (12,))], 3)
    other = make_state(copy.deepcopy(state.model), kind)
    written = {k: v.clone(memory_format=torch.contiguous_format) for k, v in optimizer_tensors(state.optimizer).items()}
    load_optimizer_tensors(other.optimizer, written)
    other.progress.step = state.progress.step
    for s in (state, other):
        run_steps(s, context(OneTerm()), [chop(batch(seed=9), (12,))], 2)
    assert tensors_sha256({"": state.model.state_dict()}) == tensors_sha256({"": other.model.state_dict()})


def test_schedules():
    wsd = plan_schedule("wsd", epochs=10, warmup=1, lrf=0.0, decay=0.2, steps_per_epoch=10)
    assert wsd.factor(0) == pytest.approx(0.1) and wsd.factor(9) == 1 == wsd.factor(50) == wsd.factor(80)
    assert (
        wsd.stable_until == 80
        and wsd.factor(90) == pytest.approx(0.5)
        and wsd.factor(100) == pytest.approx(0, abs=1e-9)
    )
    cosine = plan_schedule("cosine", epochs=10, warmup=0, lrf=0.1, decay=0.2, steps_per_epoch=10)
    assert (
        cosine.factor(0) == 1 and cosine.factor(50) == pytest.approx(0.55) and cosine.factor(100) == pytest.approx(0.1)
    )
    cooled = wsd.cool_down(40, 20)
    assert cooled.factor(40) == 1 and cooled.factor(50) == pytest.approx(0.5) and cooled.total_steps == 60
    factors = [wsd.factor(s) for s in range(101)]
    assert all(b <= a for a, b in itertools.pairwise(factors[10:])), "falls only, once warmed up"
