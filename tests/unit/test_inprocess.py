"""Out of memory above a limit: the size that the rule allows is found, and nothing of the caller changes."""

import hashlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from goodfit.config.measured import BATCH_MARGIN, best_batch
from goodfit.data.loader import MicroBatch
from goodfit.engine.device import DevicePolicy
from goodfit.engine.ema import Ema
from goodfit.engine.optimizer import build_optimizer
from goodfit.engine.ranks import Ranks
from goodfit.engine.step import StepContext
from goodfit.models.groups import ParameterGroup
from goodfit.planning import measure
from goodfit.planning.inprocess import copied_state, measure_batches_here

pytestmark = pytest.mark.alone

SIZES, LIMIT = (16, 32, 64, 128, 256, 512), 100
ERRORS = (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"))


class Pictures(nn.Module):
    """A network with batch-norm statistics, dropout, and NumPy's and Python's random numbers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(800, 3)
        )

    def forward(self, x):
        return self.body(x * (1 + 1e-6 * np.random.rand() + 1e-6 * random.random()))


class Task:
    def loss(self, model, batch):
        return {
            "loss": (
                nn.functional.cross_entropy(model(batch["image"]), batch["target"], reduction="sum"),
                len(batch["target"]),
            )
        }


class Limited:
    """A transform that runs out of memory above so many samples."""

    def __init__(self, error):
        self.error = error

    def train(self, batch, **_):
        if len(batch["target"]) > LIMIT:
            raise self.error
        return batch

    evaluate = train


def group_of(size):
    values = torch.Generator().manual_seed(size)
    return [
        MicroBatch(
            np.arange(size), {"image": torch.randn(size, 3, 12, 12, generator=values), "target": torch.arange(size) % 3}
        )
    ]


def build(model):
    groups = [ParameterGroup("all", tuple(n for n, _ in model.named_parameters()), 0.05, 0.01)]
    return build_optimizer(model, groups, kind="adamw", momentum=0.9)


def digest(model, optimizer, ema):
    parts = [*model.state_dict().values(), *ema.model.state_dict().values(), *(p.grad for p in model.parameters()),
             *(v for state in optimizer.state.values() for v in state.values())]  # fmt: skip
    made = hashlib.sha256(b"".join(np.ascontiguousarray(t.detach().numpy()).tobytes() for t in parts))
    made.update(repr((model.training, torch.get_rng_state().tolist(), random.getstate())).encode())
    made.update(
        repr([np.random.get_state()[k] if k != 1 else np.random.get_state()[1].tolist() for k in range(5)]).encode()
    )
    return made.hexdigest()


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "cpu"])
def test_above_a_limit_the_largest_useful_size_is_found_and_the_callers_state_is_the_same(error):
    model = Pictures().eval()
    optimizer, ema = torch.optim.AdamW(model.parameters()), Ema(model, 0.9)
    Task().loss(model, group_of(8)[0].data)["loss"][0].backward()
    optimizer.step()
    context = StepContext(
        Task(), Limited(error), DevicePolicy(kind="cpu", precision="fp32", channels_last=False), Ranks(), 0, 1.0
    )
    before = digest(model, optimizer, ema)
    found = measure_batches_here(model, context, build, group_of, SIZES,
                                 memory=10**12, seconds=60, ema=True)  # fmt: skip
    assert digest(model, optimizer, ema) == before
    fitting = [b for b in found if not b.problem]
    print(f"limit {LIMIT} samples; " + ", ".join(f"{b.batch}: {b.problem or f'{b.rate:,.0f}/s'}" for b in found)
          + f"; chosen {best_batch(found, 10**12).batch}; state {before[:12]} before and after")  # fmt: skip
    # Sizes fall in speed only by chance here: those that fit were tried up to the limit, unless two of them lost a tenth.
    assert [b.batch for b in found] == list(SIZES[: len(found)]) and max(b.batch for b in fitting) <= LIMIT
    assert found[-1].problem == "out of memory" and found[-1].batch == 128
    rate = max(b.rate for b in fitting)
    allowed = min(b.batch for b in fitting if b.rate >= (1 - BATCH_MARGIN) * rate)
    assert best_batch(found, 10**12).batch == allowed


def test_a_size_that_would_not_fit_by_the_one_before_is_not_begun(monkeypatch):
    """In the run's own process on a processor: the system would end it."""
    model, seen = Pictures(), []
    context = StepContext(
        Task(), Limited(ERRORS[0]), DevicePolicy(kind="cpu", precision="fp32", channels_last=False), Ranks(), 0, 1.0
    )

    def step(_state, _context, group):
        seen.append(len(group[0].samples))
        return 0.01 * seen[-1]

    monkeypatch.setattr(measure, "timed_step", step)
    monkeypatch.setattr(DevicePolicy, "peak_memory", lambda _: 100 * max(seen, default=0))
    found = measure_batches_here(model, context, build, group_of, (16, 32, 64, 128), memory=5000, seconds=60, ema=False)
    assert [b.batch for b in found] == [16, 32, 64] and max(seen) == 32
    assert found[-1].problem.startswith("would need up to") and [b.memory for b in found[:2]] == [1600, 3200]


def test_the_copy_learns_and_the_module_does_not():
    model = Pictures()
    context = StepContext(
        Task(), Limited(ERRORS[0]), DevicePolicy(kind="cpu", precision="fp32", channels_last=False), Ranks(), 0, 1.0
    )
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with copied_state(model, context, build, ema=False) as state:
        nn.functional.cross_entropy(state.model(torch.randn(4, 3, 12, 12)), torch.arange(4) % 3).backward()
        state.optimizer.step()
        assert any(not torch.equal(v, weights[k]) for k, v in state.model.state_dict().items())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_sizes_near_the_best_are_compared_in_turn(monkeypatch):
    """One size after the other, 32 meets a slow moment of the machine; in turn, all sizes share it."""
    calls = []

    def step(_state, _context, group):
        size = len(group[0].samples)
        calls.append(size)
        slow = 1.1 if size == 32 and calls.count(32) <= measure.WARM_STEPS + measure.MAX_STEPS else 1.0
        return slow * (0.01 + 0.001 * size)

    monkeypatch.setattr(measure, "timed_step", step)
    context = StepContext(
        Task(), Limited(ERRORS[0]), DevicePolicy(kind="cpu", precision="fp32", channels_last=False), Ranks(), 0, 1.0
    )
    found = measure_batches_here(Pictures(), context, build, group_of, (16, 32), memory=10**12, seconds=60, ema=False)
    assert {b.batch: round(b.rate) for b in found} == {16: 615, 32: 762}
    assert calls[-4:] == [32, 16, 16, 32] or calls[-4:] == [16, 32, 32, 16]
