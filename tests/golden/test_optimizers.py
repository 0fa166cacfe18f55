"""Every optimizer is torch's own, to the last digits; masked steps change nothing; states survive their files."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from test_step import FLAT, Identity, Images, OneTerm, batch, chop, network
from torch import nn

from goodfit.config.request import OPTIMIZERS
from goodfit.engine.checkpoint import Checkpoints, restore, take_snapshot, tensors_sha256
from goodfit.engine.device import DevicePolicy
from goodfit.engine.muon import matrix_names, orthogonalise
from goodfit.engine.optimizer import FUSED, build_optimizer, optimizer_tensors, set_learning_rate
from goodfit.engine.ranks import Ranks
from goodfit.engine.schedule import Schedule, plan_schedule
from goodfit.engine.state import LossScale, Progress, TrainState, copy_buffers
from goodfit.engine.step import StepContext, train_step
from goodfit.models.groups import ParameterGroup

STEPS = 200
MOMENTUM = {"rmsprop": 0.0, "muon": 0.95}


class Distant(DevicePolicy):
    """The CPU treated as a GPU: nothing is read on the host."""

    @property
    def reads_are_free(self) -> bool:
        return False


def make_state(model, kind, *, momentum=None, lr=0.01, decay=0.01, scale=False, schedule=FLAT):
    """A network whose last layer is the head, and whose vectors are not decayed."""
    named = dict(model.named_parameters())
    last = [n for n in named if named[n].ndim > 1][-1]
    groups = [
        ParameterGroup("backbone", tuple(n for n in named if named[n].ndim > 1 and n != last), lr, decay),
        ParameterGroup("head", (last,), 2 * lr, decay, head=True),
        ParameterGroup("vectors", tuple(n for n in named if named[n].ndim == 1), lr, 0.0),
    ]
    momentum = MOMENTUM.get(kind, 0.9) if momentum is None else momentum
    optimizer = build_optimizer(model, groups, kind=kind, momentum=momentum)
    return TrainState(model, optimizer, None, LossScale(torch.device("cpu"), active=scale), Progress(schedule))


def context(*, device=DevicePolicy, precision="fp32", clip=0.0, clip_value=0.0):
    made = device(kind="cpu", precision=precision, channels_last=False)
    return StepContext(OneTerm(), Identity(), made, Ranks(), 0, clip, clip_value)


def step(state, data, ctx, sizes=(12,)):
    return train_step(state, ctx, chop(data, sizes), 1.0, copy_buffers(state.model))


def tensors_of(state):
    return tensors_sha256({"m": state.model.state_dict(), "o": optimizer_tensors(state.optimizer)})


def rows_of(model):
    """torch's groups of the same network, by hand."""
    named = dict(model.named_parameters())
    *matrices, last = [p for p in named.values() if p.ndim > 1]
    vectors = [p for p in named.values() if p.ndim == 1]
    return matrices, last, vectors


def theirs(kind, model):
    """torch's optimizer, or two of them for muon, at the rates and decays of `make_state`."""
    matrices, last, vectors = rows_of(model)
    rows = [{"params": matrices, "lr": 0.01, "weight_decay": 0.01}, {"params": [last], "lr": 0.02, "weight_decay": 0.01},
            {"params": vectors, "lr": 0.01, "weight_decay": 0.0}]  # fmt: skip
    single = vectors[0].dtype == torch.float32  # where the last digits depend on the kernels
    fused, lists = ({"fused": True}, {"foreach": True}) if single else ({}, {})
    if kind == "muon":
        return [
            torch.optim.Muon(rows[:1], momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rows[1:], **lists),
        ]
    made = {
        "sgd": lambda: torch.optim.SGD(rows, momentum=0.9, nesterov=True, **fused),
        "adam": lambda: torch.optim.Adam(rows, **fused),
        "adamw": lambda: torch.optim.AdamW(rows, **fused),
        "nadam": lambda: torch.optim.NAdam(rows, decoupled_weight_decay=True, **lists),
        "radam": lambda: torch.optim.RAdam(rows, decoupled_weight_decay=True, **lists),
        "rmsprop": lambda: torch.optim.RMSprop(rows, **lists),
    }
    return [made[kind]()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_equals_torch_over_200_steps(kind, dtype):
    ours, other = network().to(dtype), network().to(dtype)
    state, references = make_state(ours, kind), theirs(kind, other)
    start = copy.deepcopy(ours.state_dict())
    for number in range(STEPS):
        data = batch(seed=number, dtype=dtype)
        step(state, data, context())
        for reference in references:
            reference.zero_grad()
        (nn.functional.cross_entropy(other(data["x"]), data["y"], reduction="sum") / 12).backward()
        for reference in references:
            reference.step()
    gap = max(float((p - q).detach().abs().max()) for p, q in zip(ours.parameters(), other.parameters(), strict=True))
    moved = max(float((p - start[n]).detach().abs().max()) for n, p in ours.named_parameters())
    assert gap <= 1e-7 < 0.05 < moved


class Kernels(nn.Module):
    """Ordinary and depthwise convolutions in channels-last memory."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 8, (1, 3), padding=(0, 1), bias=False)
        self.depthwise = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, (1, 3), bias=False)
        self.head = nn.Linear(16, 3, bias=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = x.view(-1, 2, 1, 3).contiguous(memory_format=torch.channels_last)
        return self.head(torch.tanh(self.second(self.norm(self.depthwise(torch.tanh(self.first(x)))))).flatten(1))


class FlatKernels(Kernels):
    """The same network, whose ordinary kernels are matrices, so that torch's Muon takes them."""

    def __init__(self):
        super().__init__()
        self.flat = nn.ParameterList(
            nn.Parameter(layer.weight.detach().flatten(1)) for layer in (self.first, self.second)
        )
        self.shapes = [layer.weight.shape for layer in (self.first, self.second)]

    def forward(self, x):
        first, second = (flat.view(shape) for flat, shape in zip(self.flat, self.shapes, strict=True))
        x = x.view(-1, 2, 1, 3)
        x = self.norm(self.depthwise(torch.tanh(nn.functional.conv2d(x, first, padding=(0, 1)))))
        return self.head(torch.tanh(nn.functional.conv2d(x, second)).flatten(1))


def test_muon_on_kernels_equals_torch_on_matrices():
    ours, other = Kernels().double(), FlatKernels().double()
    state = make_state(ours, "muon")
    references = [
        torch.optim.Muon(other.flat.parameters(), lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([
            {"params": [other.depthwise.weight], "lr": 0.01, "weight_decay": 0.01},
            {"params": [other.head.weight], "lr": 0.02, "weight_decay": 0.01},
            {"params": [other.norm.weight, other.norm.bias], "lr": 0.01, "weight_decay": 0.0},
        ]),
    ]  # fmt: skip
    for number in range(STEPS):
        data = batch(seed=number, dtype=torch.float64)
        step(state, data, context())
        other.zero_grad()
        (nn.functional.cross_entropy(other(data["x"]), data["y"], reduction="sum") / 12).backward()
        for reference in references:
            reference.step()
    pairs = [(ours.first.weight.flatten(1), other.flat[0]), (ours.second.weight.flatten(1), other.flat[1])]
    pairs += [(ours.depthwise.weight, other.depthwise.weight), (ours.head.weight, other.head.weight)]
    for p, q in [*pairs, (ours.norm.weight, other.norm.weight), (ours.norm.bias, other.norm.bias)]:
        assert float((p - q).detach().abs().max()) <= 1e-7
    assert float((ours.first.weight.flatten(1) - FlatKernels().flat[0]).detach().abs().max()) > 0.05
    assert optimizer_tensors(state.optimizer).keys() >= {"first.weight/momentum_buffer", "depthwise.weight/exp_avg_sq"}


def newton_schulz(matrix):
    """Jordan's iteration as he wrote it, in double precision."""
    found = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    found = found / found.norm()
    for _ in range(5):
        gram = found @ found.T
        found = 3.4445 * found + (-4.7750 * gram + 2.0315 * gram @ gram) @ found
    return found.T if matrix.shape[0] > matrix.shape[1] else found


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16), (1, 9)])
def test_orthogonalise_keeps_directions_and_evens_out_sizes(shape):
    matrix = torch.tensor(np.random.default_rng(0).normal(size=shape), dtype=torch.float32)
    found = orthogonalise(matrix).float()
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    assert float(torch.linalg.svdvals(found).min()) > 0.6 and float(torch.linalg.svdvals(found).max()) < 1.3
    cosine = float((found * (left @ right)).sum() / found.norm() / (left @ right).norm())
    gap = found - newton_schulz(matrix.double())
    assert float(gap.norm()) < 0.03 * float(found.norm()), "as far as bfloat16 goes"
    assert cosine > 0.95 and (min(shape) == 1 or float(sizes.max() / sizes.min()) > 1.5)


def test_which_parameters_are_matrices():
    import timm

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.recurrent = nn.Embedding(9, 4), nn.LSTM(4, 5)
            self.attention, self.position = nn.MultiheadAttention(4, 2), nn.Parameter(torch.zeros(7, 4))

    assert matrix_names(Text()) == {"recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "attention.in_proj_weight",
                                    "attention.out_proj.weight"}  # fmt: skip
    with torch.device("meta"):
        vit, mobile = timm.create_model("vit_tiny_patch16_224"), timm.create_model("mobilenetv2_100")
    assert not {"pos_embed", "cls_token", "norm.weight"} & matrix_names(vit)
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= matrix_names(vit)
    assert "blocks.0.0.conv_dw.weight" not in matrix_names(mobile) and "blocks.0.0.conv_pw.weight" in matrix_names(
        mobile
    )


@pytest.mark.parametrize("device", [DevicePolicy, Distant])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [*OPTIMIZERS, "rmsprop with momentum"])
def test_a_masked_step_changes_nothing(kind, dtype, device):
    """Neither as the first nor as the third step, and what follows is as if it had never been."""
    kind, _, more = kind.partition(" ")
    state, twin = (make_state(network(True).to(dtype), kind, momentum=0.9 if more else None) for _ in range(2))
    ctx = context(device=device, clip=1.0)
    for number in range(3):
        for value in (math.nan, math.inf):
            before = tensors_of(state)
            bad = batch(seed=50 + number, dtype=dtype)
            bad["x"][3, 2] = value
            record = step(state, bad, ctx)
            assert bool(record.bad) and tensors_of(state) == before
        for one in (state, twin):
            step(one, batch(seed=number, dtype=dtype), ctx)
    assert tensors_of(state) == tensors_of(twin)


@pytest.mark.parametrize("make", [network, Images, Kernels])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_checkpoint_continues_as_if_nothing_had_happened(kind, make, tmp_path):
    schedule = plan_schedule("onecycle", epochs=10, steps_per_epoch=1, warmup=3, lrf=0.0, decay=0.2)
    state = make_state(make(), kind, schedule=schedule)
    for number in range(3):
        step(state, batch(seed=number), context())
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(take_snapshot(state))
    other = make_state(make(), kind, schedule=FLAT)
    snapshot = checkpoints.latest()
    assert snapshot is not None
    restore(other, snapshot)
    assert tensors_of(other) == tensors_of(state) and other.progress.schedule == schedule
    for number in range(3, 6):
        for one in (state, other):
            step(one, batch(seed=number), context())
    assert tensors_of(other) == tensors_of(state)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_one_cycle_moves_momentum_and_a_cool_down_puts_it_back(kind):
    state = make_state(network(), kind)
    planned = copy.deepcopy([(g.get("momentum"), g.get("betas")) for g in state.optimizer.param_groups])
    set_learning_rate(state.optimizer, 1.0, 0.87)
    for group, (momentum, betas) in zip(state.optimizer.param_groups, planned, strict=True):
        assert group.get("momentum") == (0.87 if momentum else momentum)  # rmsprop has none, and keeps none
        assert group.get("betas") == (betas and (0.87, betas[1]))
    set_learning_rate(state.optimizer, 1.0)
    assert [(g.get("momentum"), g.get("betas")) for g in state.optimizer.param_groups] == planned


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_one_cycle_trains_as_torchs_does(kind):
    """Rate and momentum of each step, to the weights after 100."""
    schedule = plan_schedule("onecycle", epochs=1, steps_per_epoch=100, warmup=0.3, lrf=4e-6, decay=0.2)
    ours, other = network().double(), network().double()
    state = make_state(ours, kind, momentum=0.95, schedule=schedule)
    (reference,) = theirs(kind, other)
    cycle = torch.optim.lr_scheduler.OneCycleLR(reference, [0.01, 0.02, 0.01], total_steps=100, pct_start=0.3)
    for number in range(100):
        data = batch(seed=number, dtype=torch.float64)
        train_step(state, context(), chop(data, (12,)), schedule.factor(number), [])
        reference.zero_grad()
        (nn.functional.cross_entropy(other(data["x"]), data["y"], reduction="sum") / 12).backward()
        reference.step()
        if number < 99:
            cycle.step()
    for p, q in zip(ours.parameters(), other.parameters(), strict=True):
        assert float((p - q).detach().abs().max()) <= 1e-7


@pytest.mark.parametrize("kind", FUSED)
def test_moments_lie_in_memory_as_their_weights(kind):
    """The fused CPU kernels pair weights and moments by their place in memory: otherwise files would name other ones."""
    first, second = Kernels(), Kernels()
    for layer in (second.first, second.depthwise, second.second):
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.contiguous_format)
    assert first.second.weight.stride() != second.second.weight.stride()
    states = make_state(first, kind), make_state(second, kind)
    for number in range(3):
        for state in states:
            step(state, batch(seed=number), context())
    pairs = [(optimizer_tensors(a.optimizer) | a.model.state_dict()) for a in states]
    for name, value in pairs[0].items():
        assert float((value - pairs[1][name]).double().norm()) <= 0.01 * float(value.double().norm()), name


@pytest.mark.parametrize("sizes", [(12,), (5, 4, 3)])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_elements_are_clamped_at_their_true_size(sizes, clip):
    """Whatever the loss scale and the micro-batches; before the norm is limited."""
    model, reference = network().double(), network().double()
    state = make_state(model, "sgd", momentum=0.0, lr=0.1, decay=0.0, scale=True)
    record = step(state, batch(dtype=torch.float64), context(clip=clip, clip_value=0.02), sizes)
    data = batch(dtype=torch.float64)
    nn.functional.cross_entropy(reference(data["x"]), data["y"]).backward()
    gradients = [p.grad for p in reference.parameters()]
    norm = torch.nn.utils.get_total_norm(gradients)
    assert float(record.grad_norm) == pytest.approx(float(norm), rel=1e-12)
    assert max(float(g.abs().max()) for g in gradients) > 0.02
    torch.nn.utils.clip_grad_value_(reference.parameters(), 0.02)
    if clip:
        assert float(torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)) > clip
    *_, last = [p for p in reference.parameters() if p.ndim > 1]
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        rate = 0.2 if q is last else 0.1
        assert torch.allclose(p, q - rate * q.grad, rtol=0, atol=1e-12)


def test_clamping_does_not_hide_an_infinite_gradient():
    state = make_state(network(), "adamw")
    before = tensors_of(state)
    bad = batch()
    bad["x"][0, 0] = math.inf
    assert bool(step(state, bad, context(clip_value=0.1)).bad) and tensors_of(state) == before


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_is_as_large_as_is_projected(kind):
    from goodfit.planning.projection import MOMENTS

    model = network()
    state = make_state(model, kind, momentum=0.9)
    size = sum(v.numel() for v in optimizer_tensors(state.optimizer).values() if v.ndim)
    weights = sum(p.numel() for p in model.parameters())
    assert size == MOMENTS[kind] * weights if kind != "muon" else weights < size < MOMENTS[kind] * weights


def test_a_schedule_reaches_the_rates_of_all_groups():
    schedule = Schedule(kind="step", warmup_steps=0, stable_until=2, total_steps=9, lrf=0.0, period=2, gamma=0.5)
    state = make_state(network(), "muon", schedule=schedule)
    set_learning_rate(state.optimizer, schedule.factor(5))
    assert {(g["name"], g["lr"]) for g in state.optimizer.param_groups} == {
        ("backbone", 0.0025), ("head", 0.005), ("vectors", 0.0025)}  # fmt: skip
