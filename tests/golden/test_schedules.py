"""Every schedule is torch's own of that name over 200 steps, goes to JSON and back, and can be cooled down from."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from goodfit.config.plan import Plan
from goodfit.config.request import SCHEDULES
from goodfit.config.schedules import USES
from goodfit.core.errors import RequestError
from goodfit.engine.schedule import ONE_CYCLE_START, plan_schedule
from goodfit.engine.state import Progress
from plans import plan_of

STEPS = 200  # 20 epochs of 10
PARTS = {
    "lrf": 0.1, "decay": 0.25, "milestones": [6.5, 12.0, 17.1], "period": 2.5, "gamma": 0.6,
}  # fmt: skip


def schedule_of(kind, warmup=0.0, **parts):
    return plan_schedule(kind, epochs=20, steps_per_epoch=10, warmup=warmup, close=0.1, **{**PARTS, **parts})


def rates_of(make, momentum=False):
    """The learning rates that a scheduler of torch gives to a peak of 1, one for each step; or the momentum."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = make(optimizer)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["momentum" if momentum else "lr"])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


def factors_of(schedule):
    return np.array([schedule.factor(step) for step in range(STEPS)])


def cyclic(mode, **more):
    return lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, step_size_up=25, mode=mode, cycle_momentum=False, **more)


THEIRS = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS, eta_min=0.1),
    "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=STEPS),
    "constant": lambda o: lr_scheduler.ConstantLR(o, factor=1.0),
    "step": lambda o: lr_scheduler.StepLR(o, step_size=25, gamma=0.6),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [65, 120, 171], gamma=0.6),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.6 ** (1 / 10)),
    "triangular": cyclic("triangular"),
    "triangular2": cyclic("triangular2"),
    "exp-range": cyclic("exp_range", gamma=0.6 ** (1 / 10)),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=25, eta_min=0.1),
    "wsd": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, factor=1.0), lr_scheduler.CosineAnnealingLR(o, T_max=50, eta_min=0.1)], [150]),
}  # fmt: skip


def test_every_schedule_has_a_test():
    assert {*THEIRS, "onecycle", "plateau"} == set(SCHEDULES) == set(USES)


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # torch's SequentialLR calls it so itself
@pytest.mark.parametrize("kind", THEIRS)
def test_equals_torch_over_200_steps(kind):
    theirs, ours = rates_of(THEIRS[kind]), factors_of(schedule_of(kind))
    assert np.abs(ours - theirs).max() <= 1e-7
    assert kind == "constant" or theirs.max() - theirs.min() > 0.2


@pytest.mark.parametrize("rise", [1.0, 6.0, 10.0])
def test_one_cycle_equals_torch_in_rate_and_momentum(rise):
    def make(optimizer):
        # Its own last step is the 200th, and one more is allowed after it
        return lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=STEPS + 1, pct_start=10 * rise / (STEPS + 1))

    schedule = plan_schedule("onecycle", epochs=1, steps_per_epoch=STEPS + 1, warmup=10 * rise / (STEPS + 1), decay=0.2,
                             lrf=ONE_CYCLE_START / 1e4)  # fmt: skip
    assert np.abs(factors_of(schedule) - rates_of(make)).max() <= 1e-7
    momenta = np.array([schedule.momentum(step) for step in range(STEPS)])
    assert np.abs(momenta - rates_of(make, momentum=True)).max() <= 1e-7
    assert momenta.min() == pytest.approx(0.85) and schedule.factor(STEPS) == pytest.approx(4e-6)
    assert schedule_of("cosine").momentum(3) is None


@pytest.mark.parametrize("seed", range(5))
def test_plateau_equals_torch(seed):
    """A noisy figure that stops improving now and then; bad validations are counted as the loop counts them."""
    random = np.random.default_rng(seed)
    losses = [float(5 * 0.97 ** min(n, 60 + (n > 120) * (n - 120)) + random.normal(0, 0.3)) for n in range(STEPS)]
    schedule = schedule_of("plateau", lrf=0.01, period=6, gamma=0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=6, threshold=0.001, min_lr=0.01)
    best, bad, seen = float("inf"), 0, set()
    for loss in losses:
        torchs.step(loss)
        better = loss < best * (1 - 0.001)
        best, bad = (loss, 0) if better else (best, bad + 1)
        schedule = schedule.after_validation(bad)
        assert schedule.factor(7) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-7)
        seen.add(schedule.factor(7))
    assert len(seen) > 3, "fell several times"
    assert schedule_of("cosine").after_validation(7) == schedule_of("cosine")


@pytest.mark.parametrize("kind", [k for k in SCHEDULES if k != "onecycle"])
def test_warm_up_is_a_ramp_to_where_the_schedule_goes_on(kind):
    plain, warm = schedule_of(kind), schedule_of(kind, warmup=3.0)
    absolute = kind in ("step", "multistep", "constant", "plateau", "wsd")  # count from the first step
    for step in range(STEPS):
        if step < 30:
            expected = (step + 1) / 30 * warm.factor(30)
        elif absolute:
            expected = plain.factor(step)
        elif kind in ("cosine", "linear"):
            expected = plan_schedule(kind, epochs=17, steps_per_epoch=10, warmup=0, lrf=0.1, decay=0.2).factor(
                step - 30
            )
        else:
            expected = plain.factor(step - 30)
        assert warm.factor(step) == pytest.approx(expected, abs=1e-12), step


@pytest.mark.parametrize("kind", SCHEDULES)
def test_json_and_back(kind):
    schedule = schedule_of(kind, warmup=2.0)
    progress = Progress(schedule, step=7)
    back = Progress.from_dict(json.loads(json.dumps(progress.to_dict())))
    assert back == progress and back.schedule == schedule
    assert [back.schedule.factor(s) for s in range(STEPS)] == [schedule.factor(s) for s in range(STEPS)]


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("step", [5, 45, 90, 199])
def test_cool_down_goes_on_from_the_factor_reached_and_falls_to_the_end(kind, step):
    schedule = schedule_of(kind, warmup=2.0)
    cooled = schedule.cool_down(step, 40)
    factors = [cooled.factor(s) for s in range(step, step + 41)]
    assert factors[0] == schedule.factor(step) and cooled.total_steps == step + 40 and cooled.stable_until == step
    assert all(after <= before for before, after in itertools.pairwise(factors))
    assert factors[-1] == pytest.approx(cooled.lrf) and factors[-1] <= min(0.1, factors[0])
    assert cooled.is_closing(step + 20) and not cooled.is_closing(step + 19) and cooled.momentum(step) is None


def test_where_the_decay_begins():
    begins = {k: schedule_of(k, warmup=2.0).stable_until for k in SCHEDULES}
    assert begins == {"wsd": 150, "step": 25, "multistep": 65, "cosine": 20, "linear": 20, "exponential": 20, "onecycle": 20,
                      "constant": 200, "plateau": 200, "triangular": 200, "triangular2": 200, "exp-range": 200, "restarts": 200}  # fmt: skip
    for kind, begin in begins.items():
        schedule = schedule_of(kind, warmup=2.0)
        if begin < STEPS:
            assert schedule.factor(begin + 1) < 1 or kind == "step"
            assert schedule.factor(begin + 1) < schedule.factor(begin - 1)
    assert schedule_of("wsd").is_stable(149) and not schedule_of("wsd").is_stable(150)
    assert all(schedule_of(k).is_stable(199) for k in SCHEDULES if k != "wsd")


def decided(**asked):
    """The plan of 10 epochs of 20 steps (1,000 samples by 50), and its schedule."""
    plan = plan_of(epochs=10, batch=50, **asked)
    made = plan_schedule(plan.schedule.value, epochs=10, steps_per_epoch=20, warmup=plan.warmup.value, lrf=plan.lrf.value,
                         decay=plan.decay.value, milestones=plan.milestones.value, period=plan.period.value,
                         gamma=plan.gamma.value)  # fmt: skip
    return plan, made


@pytest.mark.parametrize("kind", SCHEDULES)
def test_defaults_of_every_schedule_make_sense(kind):
    plan, schedule = decided(schedule=kind)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    factors = [schedule.factor(s) for s in range(200)]
    assert min(factors) > 0 and max(factors) > (0.45 if kind == "exp-range" else 0.98)  # one cycle, already decaying
    low = {"constant": 1, "plateau": 1, "triangular": 0.3, "triangular2": 0.3, "exp-range": 0.3}.get(kind, 0.011)
    assert factors[-1] <= low
    unused = {"milestones", "period", "gamma", "lrf", "decay"} - set(USES[kind])
    for name in unused:
        assert getattr(plan, name).reason == f"{kind} has none"


@pytest.mark.parametrize(("asked", "steps"), [
    ({"schedule": "step", "period": "3"}, {"period": 60}),
    ({"schedule": "step", "period": "50steps"}, {"period": 50}),
    ({"schedule": "restarts", "period": "25%"}, {"period": 50}),
    ({"schedule": "triangular", "period": "0.5", "warmup": "30steps"}, {"period": 10, "warmup_steps": 30}),
    ({"schedule": "multistep", "milestones": "4,120steps,75%"}, {"milestones": (80, 120, 150)}),
    ({"schedule": "plateau", "period": "4"}, {"period": 4}),
    ({"schedule": "onecycle", "warmup": "25%"}, {"warmup_steps": 50}),
    ({"schedule": "wsd", "decay": "50%", "warmup": "1"}, {"stable_until": 100, "warmup_steps": 20}),
    ({"schedule": "wsd", "decay": "4"}, {"stable_until": 120}),
    ({"schedule": "cosine", "warmup": "90%"}, {"warmup_steps": 100}),
])  # fmt: skip
def test_lengths_of_any_unit(asked, steps):
    _, schedule = decided(**asked)
    assert {name: getattr(schedule, name) for name in steps} == steps


@pytest.mark.parametrize(("asked", "says"), [
    ({"milestones": "3,5"}, "wsd has no milestones"),
    ({"schedule": "constant", "period": "3", "gamma": 0.5}, "constant has no period and no gamma"),
    ({"schedule": "cosine", "decay": "10%"}, "cosine has no decay"),
    ({"schedule": "step", "lrf": 0.1}, "step has no lrf"),
    ({"schedule": "exponential", "gamma": 0.9, "lrf": 0.1}, "both say"),
    ({"schedule": "exponential", "lrf": 0.0}, "never reaches zero"),
    ({"schedule": "multistep", "milestones": "5,3"}, "must rise"),
    ({"schedule": "multistep", "milestones": "5,12"}, "must rise"),
    ({"schedule": "step", "period": "0"}, "no length"),
    ({"schedule": "onecycle", "momentum": 0.8}, "moves momentum itself"),
])  # fmt: skip
def test_what_does_not_fit_together_is_refused(asked, says):
    with pytest.raises(RequestError, match=says) as caught:
        plan_of(epochs=10, batch=50, **asked)
    assert caught.value.where and caught.value.next


def test_what_hangs_together_is_decided_together():
    slow = decided(schedule="exponential", gamma=0.5)[0]
    assert slow.lrf.value == pytest.approx(0.5**9.5) and decided(schedule="exponential", lrf=0.2)[0].gamma.value < 1
    assert plan_of(epochs=400, schedule="restarts").patience.value == 132  # a descent, rather than 50
    assert plan_of(epochs=400, schedule="restarts", patience=7).patience.value == 7
    assert plan_of(schedule="plateau", patience=8).period.value == 4 and plan_of(schedule="plateau").period.value == 10
    assert plan_of(clip_value=0.5).clip.value == 0 and plan_of(clip_value=0.5, clip=1.0).clip.value == 1
    assert plan_of(optimizer="muon").momentum.value == 0.95 and plan_of(optimizer="rmsprop").momentum.value == 0
    assert plan_of(optimizer="sgd", schedule="onecycle").momentum.value == 0.95
    assert "AdamW in all cases" in plan_of().optimizer.reason and plan_of().optimizer.value == "adamw"
