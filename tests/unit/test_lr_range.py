"""The learning-rate range test: what follows from its curve, and what the plan makes of that."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from goodfit.config.lr_range import LrCurve, has_diverged, judge, smooth
from goodfit.config.measured import Measured
from goodfit.config.parse import parse_request
from goodfit.config.plan import Plan
from goodfit.config.request import TrainRequest
from goodfit.config.resolve import resolve
from goodfit.core.errors import RequestError
from plans import facts_of, plan_of


def curve(fall_at=1e-3, lost_at=0.1, steps=100, fall=1.5, noise=0.05, seed=0) -> LrCurve:
    """A loss that falls by half around one rate and comes back around another, with the noise of batches."""
    decades = np.linspace(-6, 0, steps)
    down = 1 / (1 + np.exp(-6 * (decades - math.log10(fall_at))))
    up = 1 / (1 + np.exp(-8 * (decades - math.log10(lost_at))))
    losses = 2.3 - fall * down * (1 - up) + np.random.default_rng(seed).normal(0, noise, steps)
    return LrCurve(rates=tuple((10**decades).tolist()), losses=tuple(losses.tolist()))


def test_the_suggestion_follows_the_curve_and_not_its_noise_or_length():
    found = [judge(curve(seed=seed), 1e-3).suggestion for seed in range(10)]
    assert max(found) / min(found) < 1.35 and 8e-4 < np.median(found) < 1.25e-3
    assert judge(curve(fall_at=1e-4), 1e-3).suggestion == pytest.approx(found[0] / 10, rel=0.25)
    assert judge(curve(steps=40), 1e-3).suggestion == pytest.approx(found[0], rel=0.5)
    noisy = [judge(curve(seed=seed, noise=0.2), 1e-3).suggestion for seed in range(10)]
    assert max(noisy) / min(noisy) < 3


def test_the_reason_says_where_the_gain_is_lost_again():
    found = judge(curve(noise=0.0), 7e-4)
    start, _, lost = found.reason.rpartition("half lost again at ")
    assert 0.05 < float(lost) < 0.2 and f"fall is reached at {found.suggestion:.2g};" in start and found.table == 7e-4
    assert judge(curve(lost_at=1e9), 1e-3).reason.endswith("the test ended at 1")
    cut = curve(lost_at=1e9)
    cut = LrCurve(rates=cut.rates[:80], losses=cut.losses[:80], diverged=True)
    assert judge(cut, 1e-3).reason.endswith(f"diverges at {cut.rates[-1]:.2g}")


def test_no_suggestion_where_the_curve_shows_none():
    assert "batches differ by" in judge(curve(fall=0.0), 1e-3).reason
    for poor in (curve(fall=0.0), curve(fall=0.05), curve(steps=12), LrCurve(problem="its process died")):
        assert judge(poor, 1e-3).suggestion == 0
    assert "its process died" in judge(LrCurve(problem="its process died"), 1e-3).reason


def test_the_average_neither_lags_nor_sees_the_divergence_that_follows():
    rates = (10 ** np.linspace(-6, 0, 100)).tolist()
    assert smooth([3.0] * 100, rates) == pytest.approx([3.0] * 100)
    step = smooth([1.0] * 50 + [0.0] * 50, rates)
    assert step[48] > 0.5 > step[51] and step[45] - 0.5 == pytest.approx(0.5 - step[54], abs=0.05)
    alone = smooth([1.0] * 50 + [0.0] * 49 + [1.0], rates)
    assert smooth([1.0] * 50 + [0.0] * 49 + [1e9], rates) == pytest.approx(alone)


def test_the_average_looks_as_far_on_a_curve_of_fewer_steps():
    reached = []
    for steps in (40, 100):
        decades = np.linspace(-6, 0, steps)
        step = smooth((decades < -3).astype(float).tolist(), (10**decades).tolist())
        reached.append(float(np.interp(-3.5, decades, step)))  # half a decade before the edge
    assert reached[0] == pytest.approx(reached[1], abs=0.02)


def test_divergence_is_seen_as_it_happens():
    rates = (10 ** np.linspace(-6, 0, 100)).tolist()
    assert not has_diverged([2.0] * 60 + [1.0] * 20, rates[:80])
    assert not has_diverged([2.0] * 60 + [1.0] * 20 + [3.9] * 20, rates) and not has_diverged([], [])
    assert has_diverged([2.0] * 60 + [1.0] * 20 + [5.0] * 20, rates)
    assert has_diverged([2.0] * 60 + [math.nan], rates[:61])


def found_plan(request: TrainRequest, suggestion: float, base: Plan | None = None, pretrained=False) -> Plan:
    facts = facts_of()
    if pretrained:
        facts = replace(facts, model=replace(facts.model, weights="x", weights_kind="hub"))
    found = replace(judge(curve(), 7e-4), suggestion=suggestion)
    return resolve(request, replace(facts, measured=Measured(batch=64, lr_range=found)), base)


def test_the_plan_takes_the_suggestion():
    plan = found_plan(TrainRequest(lr_find=True), 2e-3)
    assert (plan.lr.value, plan.lr.source, plan.head_lr.value) == (2e-3, "measured", 2e-3)
    assert plan.lr.reason.startswith("range test: ")
    assert found_plan(TrainRequest(lr_find=True), 2e-3, pretrained=True).head_lr.value == 2e-2
    asked = found_plan(TrainRequest(lr_find=True, head_lr=0.5), 2e-3, pretrained=True)
    assert (asked.head_lr.value, asked.head_lr.source) == (0.5, "asked")
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.measured.table() == [f"{'learning rate':<31} {plan.lr.reason}"]


def test_without_a_suggestion_the_table_stays_and_says_why():
    usual = plan_of()
    plan = found_plan(TrainRequest(lr_find=True), 0.0)
    assert (plan.lr.value, plan.lr.source) == (usual.lr.value, "rule") and "range test" in plan.lr.reason


def test_beside_an_earlier_plan_only_the_rates_are_new_in_its_ratio():
    base = replace(plan_of(lr=1e-3, head_lr=4e-3), measured=Measured(batch=64, memory=5))
    plan = found_plan(TrainRequest(lr_find=True), 3e-3, base)
    assert (plan.lr.value, plan.head_lr.value) == (3e-3, 1.2e-2)
    assert plan.measured.memory == 5 and plan.measured.lr_range.suggestion == 3e-3
    changed = {n for n, d in plan.decisions().items() if d.value != getattr(base, n).value}
    assert changed == {"lr", "head_lr"}


def test_a_rate_and_a_search_contradict_each_other():
    for words in ({"lr": 0.01, "lr_find": True}, {"lr": "find", "lr0": "0.01"}):
        with pytest.raises(RequestError, match=r"lr=0.01 contradicts lr=find"):
            parse_request(words)
    assert parse_request({"lr": 0.01, "lr_find": False}).lr == 0.01
