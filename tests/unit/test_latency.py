"""The latency limit: the order of candidates, the search, the refusal, and the timing itself."""

import random
import time
from pathlib import Path

import pytest

from goodfit.config.latency import (
    LADDER,
    REPEATS_TO,
    LatencyCost,
    allowance,
    best_fitting,
    candidates,
    explain,
    fits,
    next_candidate,
    refusal,
    verdict,
)
from goodfit.core.errors import ExportError
from goodfit.outcome import bundle
from goodfit.runtime.latency import Latency, serving_latency

pytestmark = pytest.mark.alone


def cost_of(model="a", imgsz=160, p95=5.0, preparing=1.0, problem=""):
    return LatencyCost(model=model, imgsz=imgsz, threads=1, p50=p95, p95=p95, preparing=preparing, problem=problem)


def search(order, truth, most):
    costs = []
    while (c := next_candidate(order, costs, most)) is not None:
        assert (c.model, c.imgsz) not in {(k.model, k.imgsz) for k in costs}, "measured twice"
        costs.append(truth[c.model, c.imgsz])
    return costs


def test_the_search_finds_what_measuring_everything_would_find_and_measures_less():
    rng = random.Random(0)
    order = candidates(160, model=None, fixed_size=False)
    measured = refused = 0
    for _ in range(400):
        slowness = rng.choice([0.3, 1, 3])
        speed = {name: slowness * rng.uniform(0.8, 1.25) for name, *_ in LADDER}
        preparing = {side: rng.uniform(1.1, 2) if side < 160 else 2.0 for side in (160, 128, 96)}
        truth = {(c.model, c.imgsz): cost_of(c.model, c.imgsz, preparing[c.imgsz] + speed[c.model] * c.cost *
                                             rng.uniform(0.9, 1.1), preparing[c.imgsz]) for c in order}  # fmt: skip
        most = rng.uniform(1, 15)
        costs = search(order, truth, most)
        best = next((c for c in order if truth[c.model, c.imgsz].p95 <= most), None)
        found = best_fitting(order, costs, most)
        if best is None:
            refused += 1
            cheapest = min(order, key=lambda c: c.cost)
            assert found is None and truth[cheapest.model, cheapest.imgsz] in costs
        else:
            assert found == truth[best.model, best.imgsz]
        measured += len(costs)
    assert 20 < refused < 300 and measured / 400 < len(order) / 2


def test_a_hopeless_limit_measures_the_best_and_the_cheapest_alone():
    order = candidates(160, model=None, fixed_size=False)
    truth = {(c.model, c.imgsz): cost_of(c.model, c.imgsz, 2 + c.cost, 2) for c in order}
    costs = search(order, truth, 0.1)
    assert [(c.model, c.imgsz) for c in costs] == [(LADDER[0][0], 160), (LADDER[-1][0], 96)]
    hurried = next_candidate(order, costs[:1], 3.5, hurry=True)
    assert (hurried.model, hurried.imgsz) == (LADDER[-1][0], 96)
    assert next_candidate(order, costs[:1], 3.5) != hurried and next_candidate(order, costs, 0.1, hurry=True) is None
    error = refusal(costs, 0.1, 1, model=True, size=True)
    fastest = min(costs, key=lambda c: c.p95)
    assert f"{fastest.p95:.2f} ms" in error.message and fastest.model in error.message and error.exit_code == 2
    proposed = float(error.next.split("latency=")[1].split("ms")[0])
    assert fits(fastest, allowance(proposed, free=True)) and proposed < 1.3 * fastest.p95


def test_what_was_asked_for_is_not_varied():
    only_sizes = candidates(224, model="resnet50", fixed_size=False)
    assert [(c.model, c.imgsz) for c in only_sizes] == [("resnet50", s) for s in (224, 192, 128)]
    only_models = candidates(100, model=None, fixed_size=True)
    assert [c.imgsz for c in only_models] == [100] * len(LADDER) and only_models[0].model == LADDER[0][0]
    assert [(c.model, c.imgsz) for c in candidates(224, model="v", fixed_size=True)] == [("v", 224)]
    assert {c.imgsz % 16 for c in candidates(176, model="vit", fixed_size=False, stride=16)} == {0}
    assert [c.imgsz for c in candidates(24, model="m", fixed_size=False)] == [24]  # never above the rule's
    small = candidates(32, model=None, fixed_size=False, pictures="tiny")
    assert small[0].model == "resnet10t.c3_in1k" and {c.imgsz for c in small} == {32}


def test_a_problem_is_passed_over_and_said():
    order = candidates(160, model=None, fixed_size=True)
    truth = {(c.model, c.imgsz): cost_of(c.model, c.imgsz, problem="cannot be exported") for c in order}
    costs = search(order, truth, 10.0)
    assert len(costs) == len(order) and best_fitting(order, costs, 10.0) is None
    assert "cannot be exported" in refusal(costs, 10.0, 1, model=True, size=False).message


def test_a_tenth_is_left_free_only_where_there_is_a_choice():
    assert allowance(10, free=True) == pytest.approx(9) and allowance(10, free=False) == 10
    chosen, slower = cost_of(p95=8.0), cost_of("b", 224, 9.5)
    assert "b at 224: 9.5 ms" in explain(chosen, [chosen, slower], 10.0)


class SlowPredictor:
    """Sleeps in place of predicting: the first calls are long, then 2 ms with one of ten 8 ms."""

    def __init__(self, busy_calls):
        self.calls, self.busy, self.preprocessing = 0, busy_calls, self

    def predict(self, files):
        self.calls += 1
        long = self.calls <= self.busy
        time.sleep(0.02 if long else 0.008 if self.calls % 10 == 0 else 0.002)

    def pixels(self, data):
        time.sleep(0.001)


def test_the_timing_keeps_slow_calls_of_the_model_and_drops_a_busy_round():
    found = serving_latency(SlowPredictor(busy_calls=24), [b""], rounds=3)
    assert 2 <= found.p50 < 4 and 8 <= found.p95 < 14 and 1 <= found.preparing < 2


def test_a_bundle_over_its_limit_is_timed_again_and_then_refused(monkeypatch, tmp_path):
    figures = iter([12.0, 11.5, 11.0, 12.0, 9.0, 10.4])
    monkeypatch.setattr(bundle, "Predictor", lambda folder, threads: None)
    monkeypatch.setattr(bundle, "serving_latency", lambda *_, **__: Latency(p50=5.0, p95=next(figures), preparing=1.0))
    monkeypatch.setattr(bundle, "PAUSES", (0.0, 0.0))
    served = bundle.Served(files=[Path(__file__)], threads=2, limit=10.0, planned=8.5)
    with pytest.raises(ExportError, match=r"11\.0 ms.*limit of 10 ms.*measured 8\.5") as caught:
        bundle.check_latency(tmp_path, served)
    assert "weights" in caught.value.kept and "goodfit resume RUN" in caught.value.next
    card = bundle.check_latency(tmp_path, served)
    assert (card["p95_ms"], card["limit_ms"], card["planned_p95_ms"]) == (9.0, 10.0, 8.5) and "within" in card[
        "verdict"
    ]
    assert "4 % over" in bundle.check_latency(tmp_path, served)["verdict"]
    assert verdict(10 * (1 + REPEATS_TO) + 0.01, 10.0) == ""
