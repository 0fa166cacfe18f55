"""A latency limit through the whole run, in real processes."""

import pytest

import goodfit
from goodfit.outcome import bundle
from goodfit.runtime.latency import Latency, serving_latency

FAST = {"pretrained": "false", "epochs": 1, "batch": 16, "rehearse": "false", "suspects": "false", "latency_threads": 1}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(kept, monkeypatch):
    """One for both tests: what the first measured, of the same pictures, the second finds."""
    monkeypatch.setenv("GOODFIT_CACHE_DIR", str(kept))
    return kept


def test_the_plan_chooses_by_measurement_remembers_it_and_refuses_what_nothing_can(make_images, cache):
    images = make_images(20)
    plan = goodfit.plan(images, **FAST, latency="200ms").plan
    assert plan.model.source == plan.imgsz.source == "measured" and plan.latency.source == "asked"
    assert plan.model.value == "resnet10t.c3_in1k" and plan.imgsz.value == 32  # pictures of 24 pixels
    (cost,) = plan.measured.latencies
    assert 0 < cost.preparing < cost.p50 <= cost.p95 < 200 and f"p95 {cost.p95:.1f} ms" in plan.model.reason
    assert any("p95" in line and "resnet10t" in line for line in plan.measured.table())
    assert type(plan).from_dict(plan.to_dict()) == plan
    assert goodfit.plan(images, **FAST, latency="150ms").plan.measured.latencies == (cost,)  # times never repeat: kept
    two = goodfit.plan(images, **{**FAST, "latency_threads": 2}, latency="2000ms").plan  # on one core here
    assert two.measured.latencies[0].threads == 2
    with pytest.raises(goodfit.RequestError, match=r"the fastest measured, .* takes .* ms"):
        goodfit.plan(images, **FAST, latency="0.001ms")
    with pytest.raises(goodfit.RequestError, match=r"model= and imgsz= is missing"):
        goodfit.plan(images, **FAST, latency="200ms", deterministic=True)
    both = {**FAST, "model": "resnet10t.c3_in1k", "imgsz": 32}
    asked = goodfit.plan(images, **both, latency="150ms", deterministic=True).plan
    assert asked.model.source == asked.imgsz.source == "asked" and "p95" in asked.latency.reason
    with pytest.raises(goodfit.RequestError, match="resnet10t"):
        goodfit.plan(images, **both, latency=f"{0.5 * cost.p95:.4f}ms")


def test_a_bundle_over_the_limit_costs_no_training(make_images, cache, tmp_path, monkeypatch):
    slow = Latency(p50=300.0, p95=400.0, preparing=1.0)
    monkeypatch.setattr(bundle, "serving_latency", lambda *_, **__: slow)
    monkeypatch.setattr(bundle, "PAUSES", ())
    with pytest.raises(goodfit.ExportError, match=r"400\.0 ms.*over the limit of 200 ms") as caught:
        goodfit.train(make_images(20), **FAST, latency="200ms", project=str(tmp_path / "runs"), name="a")
    folder = tmp_path / "runs" / "a"
    assert (folder / "test.json").is_file() and not (folder / "bundle").exists() and str(folder) in caught.value.next
    assert goodfit.resume(folder, latency="500ms").result["latency"]["limit_ms"] == 500
    (folder / "result.json").unlink()
    for file in (folder / "bundle").iterdir():
        file.unlink()
    monkeypatch.setattr(bundle, "serving_latency", serving_latency)
    run = goodfit.resume(folder)
    found = run.result["latency"]
    assert found["limit_ms"] == 200 and 0 < found["p50_ms"] <= found["p95_ms"] < 200 and found["threads"] == 1
    assert found["planned_p95_ms"] == run.plan.measured.latencies[0].p95 and run.metrics["test"]["look"] == 1
    report = (folder / "report.html").read_text("utf-8")
    assert "within the limit of 200 ms" in report and f"{found['planned_p95_ms']:.1f} ms p95)" in report
