"""How long to train, as pure functions: what counts as better, when to extend, how a schedule keeps to a time."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from goodfit.engine import budget
from goodfit.engine.budget import TimeBudget, fit_schedule
from goodfit.engine.policy import FitSettings, is_plateau, lengthened, reason_to_extend, take_note
from goodfit.engine.schedule import plan_schedule
from goodfit.engine.state import Progress

STEPS = 10  # an epoch
SETTINGS = FitSettings(patience=3, min_delta=0.01, monitor="accuracy", maximise=True, most_epochs=80)


def schedule_of(epochs=20, kind="wsd", warmup=1.0):
    return plan_schedule(kind, epochs=epochs, warmup=warmup, lrf=0.0, steps_per_epoch=STEPS, decay=0.2)


def run_through(values, losses=None, *, settings=SETTINGS, schedule=None):
    """The progress of a run that validated so."""
    progress = Progress(schedule or schedule_of())
    for number, value in enumerate(values):
        progress.step += STEPS
        take_note(progress, {"accuracy": value, "loss": losses[number] if losses else 1 - value}, settings)
        progress.epoch += 1
    return progress


def test_patience_counts_small_gains_together_and_not_during_warm_up():
    creeping = run_through([0.5 + 0.004 * k for k in range(10)])
    assert creeping.bad_epochs < 3, "gains of 0.8 % each pass 1 % at every second epoch"
    still = run_through([0.5, 0.501, 0.502, 0.5, 0.5])
    assert still.bad_epochs == 4 and is_plateau(still, SETTINGS)
    assert still.best["value"] == still.reference["value"] == 0.502, "the best is the best, whether it counts or not"
    long = run_through([0.5, 0.4, 0.4, 0.4, 0.4], schedule=schedule_of(warmup=4.0))
    assert long.bad_epochs == 1 and not is_plateau(long, SETTINGS)
    cooling = run_through([0.5, 0.5, 0.5, 0.5, 0.5])
    cooling.branch = "cool-down"
    assert not is_plateau(cooling, SETTINGS)


def test_the_best_of_the_run_is_not_the_reference_of_a_branch():
    progress = run_through([0.5, 0.6])
    progress.best = {"segment": 0, "step": 99, "epoch": 9, "value": 0.9, "loss": 0.1, "metrics": {}}
    progress.step += STEPS
    assert take_note(progress, {"accuracy": 0.7, "loss": 0.3}, SETTINGS), "kept, to be gone back to"
    assert (progress.best["value"], progress.reference["value"]) == (0.9, 0.7)
    assert not take_note(progress, {"accuracy": math.nan, "loss": 0.1}, SETTINGS)


@pytest.mark.parametrize(
    ("values", "losses", "extends"),
    [
        ([0.5 + 0.02 * k for k in range(16)], None, True),
        ([0.5 + 0.02 * k for k in range(10)] + [0.6] * 6, [1.0] * 16, False),  # the best is not in the last quarter
        ([0.5 + 0.02 * k for k in range(16)], [1 - 0.05 * k for k in range(8)] + [0.6 + 0.05 * k for k in range(8)], False),
    ],
    ids=["improving", "stale", "loss rises"],
)  # fmt: skip
def test_a_run_is_extended_if_it_improves_and_does_not_overfit(values, losses, extends):
    progress = run_through(values, losses)
    assert progress.step == progress.schedule.stable_until
    assert bool(reason_to_extend(progress, SETTINGS, STEPS)) is extends
    for never in (replace(SETTINGS, most_epochs=20), replace(SETTINGS, time=TimeBudget(seconds=9))):
        assert reason_to_extend(progress, never, STEPS) == ""
    earlier = run_through(values[:-1], losses)
    assert reason_to_extend(earlier, SETTINGS, STEPS) == "", "judged just before the rate would fall"


def test_a_longer_schedule_has_the_same_start_and_shares():
    short = plan_schedule("wsd", epochs=20, warmup=1.0, lrf=0.0, steps_per_epoch=STEPS, decay=0.2, close=0.1)
    long = lengthened(short, 400)
    assert (long.stable_until, long.total_steps, long.closing_from) == (320, 400, 360)
    assert all(short.factor(k) == long.factor(k) for k in range(short.stable_until))


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
@pytest.mark.parametrize("step", [2, 50, 155, 170, 195])
@pytest.mark.parametrize("left", [3, 20, 400])
def test_a_schedule_fitted_to_another_time_does_not_jump_and_ends_there(kind, step, left):
    progress = Progress(schedule_of(kind=kind), step=step)
    fitted = fit_schedule(progress, left, most_steps=1000, decay=0.2)
    assert fitted.total_steps == step + left
    if step >= 10 and not (kind == "wsd" and step < 160):  # before: warm-up may shorten, and the decay begin at once
        assert fitted.factor(step) == pytest.approx(progress.schedule.factor(step), abs=0.5 / left if left > 3 else 0.2)
    factors = [fitted.factor(k) for k in range(max(step, fitted.warmup_steps), fitted.total_steps + 1)]
    assert factors == sorted(factors, reverse=True) and factors[-1] == pytest.approx(0.0, abs=1e-9)


def test_a_fitted_schedule_keeps_within_the_most_steps_and_a_cool_down_never_grows():
    progress = Progress(schedule_of(), step=50)
    assert fit_schedule(progress, 10_000, most_steps=300, decay=0.2).total_steps == 300
    cooling = Progress(schedule_of().cool_down(50, 20), step=55, branch="cool-down")
    assert fit_schedule(cooling, 10_000, most_steps=300, decay=0.2).total_steps == 70
    assert fit_schedule(cooling, 5, most_steps=300, decay=0.2).total_steps == 60


def test_a_time_budget_follows_a_machine_that_slows_down(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    spent = TimeBudget(seconds=120, reserve=20, rest_seconds=1.0, began=100.0)
    progress = Progress(schedule_of(epochs=300))
    spent.begin_epoch(0)
    seconds, position = 0.1, 0
    factors = []
    while progress.step < progress.schedule.total_steps:
        factors.append(progress.schedule.factor(progress.step))
        now[0] += seconds
        progress.step, position = progress.step + 1, position + 1
        if progress.step == 300:
            seconds = 0.25  # the machine is shared from here on
        if spent.is_due(progress.step, STEPS) and (left := spent.steps_left(progress.step, STEPS)) is not None:
            progress.schedule = fit_schedule(progress, left, most_steps=10_000, decay=0.2)
        if position == STEPS:
            now[0] += 1.0  # validation
            spent.end_epoch(1.0)
            spent.begin_epoch(progress.step)
            position = 0
    now[0] += 1.0
    assert spent.spent() == pytest.approx(100, abs=3)
    assert factors[-1] < 0.02 and max(b - a for a, b in itertools.pairwise(factors)) < 0.2, "it has fallen"
    assert all(b <= a + 0.02 for a, b in itertools.pairwise(factors[300:])), "and never jumped up"
