"""Corners of the recipe: figures that are no numbers, estimates that are wrong by far, what is planned over unknown lengths."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from goodfit.config.request import TrainRequest
from goodfit.config.resolve import resolve
from goodfit.core.errors import RequestError, TrainingError
from goodfit.core.journal import Journal
from goodfit.core.safeio import read_json, write_json
from goodfit.engine import budget
from goodfit.engine.budget import TimeBudget, fit_schedule
from goodfit.engine.checkpoint import Checkpoints, restore
from goodfit.engine.device import DevicePolicy
from goodfit.engine.ema import Ema
from goodfit.engine.evaluate import evaluate
from goodfit.engine.loop import _cool_down, fit
from goodfit.engine.optimizer import build_optimizer
from goodfit.engine.policy import FitSettings, is_plateau, keep_to_time, take_note
from goodfit.engine.ranks import Ranks
from goodfit.engine.schedule import Schedule, plan_schedule
from goodfit.engine.state import LossScale, Progress, TrainState, copy_buffers
from goodfit.engine.step import StepContext, train_step
from goodfit.engine.stop import StopFlag
from goodfit.models.detection.build import make_network
from goodfit.models.groups import ParameterGroup, layers_of, parameter_groups
from goodfit.models.weights import load_weights
from micros import Identity, Micro
from plans import facts_of, plan_of

STEPS = 10
SETTINGS = FitSettings(patience=3, min_delta=0.01, monitor="accuracy", maximise=True, most_epochs=80)
FLAT = Schedule(kind="wsd", warmup_steps=0, stable_until=10**6, total_steps=10**6, lrf=0.0)
CPU = DevicePolicy(kind="cpu", precision="fp32", channels_last=False)


def schedule_of(epochs=20, kind="wsd", warmup=1.0):
    return plan_schedule(kind, epochs=epochs, warmup=warmup, lrf=0.0, steps_per_epoch=STEPS, decay=0.2)


def state_of(model, *, ema=None, schedule=FLAT):
    groups = [ParameterGroup("all", tuple(n for n, _ in model.named_parameters()), 0.05, 0.01)]
    optimizer = build_optimizer(model, groups, kind="adamw", momentum=0.9)
    return TrainState(model, optimizer, ema, LossScale(torch.device("cpu"), active=False), Progress(schedule))


# figures that are no numbers


def test_figures_that_are_no_numbers_can_be_kept(tmp_path):
    progress = Progress(schedule_of())
    for loss, extra in ((0.5, math.nan), (math.inf, 1.0), (math.nan, 1.0)):
        progress.step += STEPS
        take_note(progress, {"accuracy": 0.5, "loss": loss, "auc": extra}, SETTINGS)
    assert progress.losses == [0.5, sys.float_info.max, sys.float_info.max]
    assert progress.best["metrics"] == {"accuracy": 0.5, "loss": 0.5}
    text = json.dumps(progress.to_dict(), allow_nan=False)
    assert Progress.from_dict(json.loads(text)) == progress
    write_json(tmp_path / "a.json", {"auc": math.nan, "more": [math.inf, 1.0]})
    assert read_json(tmp_path / "a.json") == {"auc": "nan", "more": ["inf", 1.0]}


class Rising(nn.Module):
    """A mask of minus infinity, as causal attention keeps one, and a batch norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)
        self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))

    def forward(self, x):
        return self.last(self.norm(x))


def test_the_average_keeps_a_mask_of_infinities():
    model = Rising()
    ema = Ema(model, 0.9)
    model(torch.randn(8, 4))
    before = ema.model.norm.running_mean.clone()
    for step in range(40):
        ema.update(model, step, torch.tensor(False), reads_are_free=True)
    assert torch.equal(ema.model.mask, model.mask) and not torch.isnan(ema.model.mask).any()
    assert not torch.equal(ema.model.norm.running_mean, before)


class Endless:
    """Validations that are never finite."""

    batch, steps_per_epoch = 4, 2

    def __len__(self):
        return 1

    def groups(self, epoch, position, num_micro, *, closing):
        del num_micro, closing
        draw = torch.Generator().manual_seed(epoch)
        for start in range(position, 8, 4):
            yield [
                Micro(
                    np.arange(start, start + 4),
                    {"x": torch.randn(4, 4, generator=draw), "y": torch.tensor([0, 1, 0, 1])},
                )
            ]

    def __iter__(self):
        yield Micro(np.arange(4), {"x": torch.full((4, 4), math.nan), "y": torch.tensor([0, 1, 0, 1])})


class Classes:
    """Cross-entropy, with a meter of it."""

    def loss(self, model, batch):
        return {"loss": (nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), len(batch["y"]))}

    def predict(self, model, batch):
        return model(batch["x"])

    def meter(self):
        return Meter()


class Meter:
    def __init__(self):
        self.values = []

    def update(self, outputs, batch):
        self.values.append(float(nn.functional.cross_entropy(outputs, batch["y"])))

    def compute(self):
        return {"loss": self.values[-1], "accuracy": 0.5}


def test_a_run_that_never_validates_to_a_number_ends_early(tmp_path):
    state = state_of(Rising(), schedule=schedule_of(epochs=50))
    context = StepContext(Classes(), Identity(), CPU, Ranks(), 0, 1.0)
    with pytest.raises(TrainingError, match="None of 10 validations"):
        fit(
            state,
            context,
            Endless(),
            Endless(),
            settings=SETTINGS,
            checkpoints=Checkpoints(tmp_path, {}),
            journal=Journal(None),
            stop=StopFlag(),
        )
    assert state.progress.epoch == 10


# what does not train


def test_an_evaluation_leaves_frozen_batch_norms_as_they_are():
    model = Rising().train()
    model.norm.training = False
    evaluate(model, [Micro(np.arange(4), {"x": torch.randn(4, 4), "y": torch.tensor([0, 1, 0, 1])})], task=Classes(), transform=Identity(),
             device=CPU, ranks=Ranks())  # fmt: skip
    assert model.training and model.last.training and not model.norm.training


def test_patience_waits_for_all_that_will_train():
    settings = replace(SETTINGS, thawed=5 * STEPS)
    progress = Progress(schedule_of())
    for number, value in enumerate([0.5, 0.6, 0.6, 0.6, 0.6, 0.55, 0.56, 0.57, 0.58]):
        progress.step += STEPS
        take_note(progress, {"accuracy": value, "loss": 1 - value}, settings)
        progress.epoch += 1
        assert not is_plateau(progress, settings)
        if number == 4:
            assert progress.bad_epochs == 0 and progress.reference["value"] == 0.6
    assert (
        progress.reference["value"] == 0.58 and progress.best["value"] == 0.6
    )  # a cool-down would not go back to the frozen network
    for _ in range(3):
        progress.step += STEPS
        take_note(progress, {"accuracy": 0.5, "loss": 0.5}, settings)
    assert is_plateau(progress, settings)
    progress.without_patience = True  # extended by a person
    assert not is_plateau(progress, settings)
    told = progress.to_dict()
    del told["without_patience"]  # a checkpoint of an earlier version
    assert Progress.from_dict(told).without_patience is False
    with pytest.raises(KeyError):
        Progress.from_dict({k: v for k, v in told.items() if k != "losses"})


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.used(x)


class TwoTerms(Classes):
    def loss(self, model, batch):
        made = super().loss(model, batch)
        return {**made, "size": ((model(batch["x"]) ** 2).sum(), 1)}


@pytest.mark.parametrize("num", [1, 2])
def test_what_no_term_uses_is_left_alone_also_with_accumulation(num):
    model = Parts()
    state, before = state_of(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    context = StepContext(TwoTerms(), Identity(), CPU, Ranks(), 0, 1.0)
    data = {"x": torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), "y": torch.tensor([0, 1, 0, 1])}
    group = [Micro(np.arange(4)[k::num], {name: v[k::num] for name, v in data.items()}) for k in range(num)]
    train_step(state, context, group, 1.0, copy_buffers(model))
    assert torch.equal(model.unused.weight, before["unused.weight"])  # weight decay would have moved it
    assert not torch.equal(model.used.weight, before["used.weight"])


# time


def test_the_first_step_of_an_epoch_says_nothing_about_the_pace(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    spent = TimeBudget(seconds=3600, began=100.0)
    progress = Progress(plan_schedule("wsd", epochs=300, warmup=5.0, lrf=0.0, steps_per_epoch=1000, decay=0.2))
    settings = FitSettings(
        patience=0, min_delta=0.0, monitor="loss", maximise=False, most_epochs=1200, decay=0.2, warmup=5.0, time=spent
    )
    spent.begin_epoch(0)
    for step in range(1, 7000):
        now[0] += 1.2 if step == 1 else 0.01  # loaders start, kernels are compiled
        progress.step = step
        keep_to_time(progress, settings, 1000, Ranks())
    assert progress.schedule.total_steps == pytest.approx(360_000, rel=0.02), (
        "an hour of steps of 10 ms, of 300 epochs planned"
    )


def test_an_end_that_an_estimate_gave_is_looked_at_again(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    spent = TimeBudget(seconds=3600, began=100.0)
    progress = Progress(replace(schedule_of(epochs=300), total_steps=50, stable_until=40), step=0)
    settings = FitSettings(
        patience=0, min_delta=0.0, monitor="loss", maximise=False, most_epochs=300, decay=0.2, warmup=1.0, time=spent
    )
    spent.begin_epoch(0)
    for step in range(1, 51):
        now[0] += 0.01
        progress.step = step
        keep_to_time(progress, settings, STEPS, Ranks())
    assert progress.schedule.total_steps > 2000 and progress.schedule.stable_until > 1500
    assert progress.schedule.factor(50) == 1.0  # as if it had never begun to end
    ending = Progress(replace(schedule_of(), total_steps=200), step=200)
    now[0] = 100.0 + 3600 - 0.3  # time for thirty more steps: that is an end
    spent._mark, spent._step_seconds = (now[0] - 0.01, 199), 0.01
    keep_to_time(ending, settings, STEPS, Ranks())
    assert ending.schedule.total_steps == 200


def test_a_schedule_that_cannot_be_stretched_is_cooled_down_at_the_end_only():
    early = Progress(schedule_of(epochs=300, kind="onecycle", warmup=90.0), step=20)
    assert fit_schedule(early, 500, most_steps=3000, decay=0.2) == early.schedule
    late = Progress(early.schedule, step=1000)
    cooled = fit_schedule(late, 100, most_steps=3000, decay=0.2)
    assert (
        cooled.kind == "wsd"
        and cooled.total_steps == 1100
        and cooled.factor(1000) == pytest.approx(early.schedule.factor(1000))
    )


def test_warm_up_grows_back_with_the_run():
    progress = Progress(schedule_of(epochs=300, warmup=5.0), step=2)
    progress.schedule = fit_schedule(progress, 40, most_steps=3000, decay=0.2, warmup=50)
    assert progress.schedule.warmup_steps < 10
    again = fit_schedule(progress, 2900, most_steps=3000, decay=0.2, warmup=50)
    assert again.warmup_steps == 50


@pytest.mark.parametrize(
    "asked",
    [{"schedule": "onecycle"}, {"schedule": "multistep"}, {"progressive": 0.5}, {"unfreeze": "50%"}, {"decay": "10"}],
)
def test_what_is_planned_over_epochs_needs_their_number_beside_a_time(asked):
    with pytest.raises(RequestError, match="planned over the run's epochs"):
        plan_of(time=1800.0, imgsz=128, **asked)
    assert plan_of(time=1800.0, epochs=20, imgsz=128, **asked).time.value == 1800.0
    assert plan_of(time=1800.0, schedule="cosine").time.value == 1800.0
    assert plan_of(time=1800.0, decay="10%").decay.value == pytest.approx(0.1)


def test_a_time_of_an_earlier_plan_forbids_weight_averaging_too():
    base = plan_of(time=1800.0)
    with pytest.raises(RequestError, match="time budget"):
        resolve(TrainRequest(swa=0.25), facts_of(), base=base)


def test_lengths_of_an_earlier_plan_are_those_of_its_epochs():
    base = plan_of(schedule="multistep", epochs=300)
    assert base.milestones.value == [150, 225]
    assert resolve(TrainRequest(epochs=30), facts_of(), base=base).milestones.value == [15, 22.5]
    assert resolve(TrainRequest(seed=1), facts_of(), base=base).milestones.value == [150, 225]
    asked = plan_of(schedule="multistep", epochs=300, milestones="100,200")
    with pytest.raises(RequestError, match="Milestones must rise"):
        resolve(TrainRequest(epochs=30), facts_of(), base=asked)
    falling = plan_of(schedule="exponential", epochs=300)
    again = resolve(TrainRequest(epochs=30), facts_of(), base=falling)
    assert again.gamma.value ** (30 - again.warmup.value) == pytest.approx(again.lrf.value, rel=0.01)


# networks


def test_a_detector_has_the_layers_of_its_backbone():
    network = make_network("fcos", "resnet18", num_classes=3, channels=32, convs=1, levels=3)
    network.pyramid.prune()
    layers = layers_of(network)
    body, head = [x for x in layers if not x.head], [x for x in layers if x.head]
    assert len(body) > 5 and all("pyramid.body" in x.title for x in body)
    assert {n.split(".")[0] for x in head for n in x.names} == {"pyramid", "head"} and all(
        x.distance == 0 for x in head
    )
    plan = plan_of(layer_decay=0.5, lr=0.1)
    rates = {g.name: g.lr for g in parameter_groups(network, plan) if not g.head}
    assert len(set(rates.values())) == len(body)
    plan = plan.changed(layer_decay=1.0)
    assert {g.lr for g in parameter_groups(network, plan) if not g.head} == {0.1}


def test_positions_of_another_image_size_are_resized_whatever_their_name(tmp_path):
    import timm
    from safetensors.torch import save_file

    def made(size):
        return timm.create_model(
            "beit_base_patch16_224", img_size=size, depth=1, embed_dim=24, num_heads=2, num_classes=3
        )

    small, large = made(64), made(96)
    save_file({k: v for k, v in small.state_dict().items() if "index" not in k}, str(tmp_path / "w.safetensors"))
    report = load_weights(large, tmp_path / "w.safetensors")
    assert report.loaded > 5
    assert torch.equal(large.blocks[0].mlp.fc1.weight, small.blocks[0].mlp.fc1.weight)
    table = "blocks.0.attn.relative_position_bias_table"
    assert large.state_dict()[table].shape != small.state_dict()[table].shape


# extensions


class Learnable(Endless):
    """Eight samples that a linear network learns, epoch for epoch; the same for validation."""

    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()

    def groups(self, epoch, position, num_micro, *, closing):
        del num_micro, closing
        rows = np.roll(np.arange(8), epoch)
        for start in range(position, 8, 4):
            chosen = rows[start : start + 4]
            yield [Micro(chosen, {"x": self.x[chosen], "y": self.y[chosen]})]

    def __iter__(self):
        yield Micro(np.arange(8), {"x": self.x, "y": self.y})


def run_to_the_end(folder, *, restored=False):
    torch.manual_seed(0)
    model = Rising()
    schedule = plan_schedule("wsd", epochs=20, warmup=1.0, lrf=0.0, steps_per_epoch=2, decay=0.2)
    state = state_of(model, schedule=schedule)
    checkpoints = Checkpoints(folder, {})
    if restored:
        restore(state, checkpoints.latest())
    settings = FitSettings(patience=0, min_delta=0.0, monitor="loss", maximise=False, most_epochs=40, decay=0.2)
    fit(state, StepContext(Classes(), Identity(), CPU, Ranks(), 0, 1.0), Learnable(), Learnable(), settings=settings,
        checkpoints=checkpoints, journal=Journal(None), stop=StopFlag())  # fmt: skip
    return state


def test_a_kill_between_the_checkpoints_of_an_extension_does_not_undo_it(tmp_path, monkeypatch):
    whole = run_to_the_end(tmp_path / "whole")
    assert whole.progress.epoch == 40 and whole.progress.segment == 1
    with monkeypatch.context() as patched:

        def killed(*args, **more):
            raise KeyboardInterrupt

        patched.setattr("goodfit.engine.loop._branch", killed)
        with pytest.raises(KeyboardInterrupt):
            run_to_the_end(tmp_path / "cut")
    again = run_to_the_end(tmp_path / "cut", restored=True)
    assert again.progress.to_dict() == whole.progress.to_dict()
    assert all(map(torch.equal, again.model.state_dict().values(), whole.model.state_dict().values()))


def test_a_cool_down_remembers_that_memory_ran_out(tmp_path):
    state = run_to_the_end(tmp_path)
    progress, checkpoints = state.progress, Checkpoints(tmp_path, {})
    progress.num_micro, progress.finished = 4, False
    assert progress.reference is not None
    _cool_down(state, checkpoints, Journal(None), Learnable())
    assert state.progress.num_micro == 4 and state.progress.branch == "cool-down"
