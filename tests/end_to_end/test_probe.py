"""Measuring before the plan, in real processes."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from goodfit.api.decide import decide
from goodfit.api.prepare import read_and_audit
from goodfit.api.probe import ProbeProcess, measure, wants_measuring
from goodfit.config.parse import parse_request
from goodfit.core.journal import Journal
from goodfit.data.split import subset
from goodfit.engine.device import find_machine

pytestmark = pytest.mark.alone


@pytest.fixture
def prepared(make_images, tmp_path, monkeypatch):
    monkeypatch.setenv("GOODFIT_CACHE_DIR", str(tmp_path / "cache"))

    def make(per_class=30, **asked):
        asked = {"model": "resnet10t", "pretrained": "false", "imgsz": 32, "epochs": 3, **asked}
        request = parse_request({"data": str(make_images(per_class)), **asked})
        audited = read_and_audit(request, Journal(None, ()))
        plan = decide(request, audited, Journal(None, ()), measuring=False)
        return request, audited, plan, subset(audited.index, 1.0, 0)

    return make


def test_it_finds_ways_and_sizes_touches_nothing_and_is_remembered(prepared, tmp_path, monkeypatch):
    request, audited, plan, rows = prepared()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    machine = find_machine("cpu")
    found = measure(request, plan, audited.index, rows, machine)
    assert torch.equal(torch.get_rng_state(), before)
    names = [(s.precision, s.channels_last) for s in found.steps]
    assert names[:2] == [("fp32", False), ("fp32", True)] and all(s.seconds > 0 for s in found.steps)
    assert found.steps[0].gradient_gap == 0 and found.steps[1].gradient_gap < 1e-4
    assert all(0 < s.gradient_gap < 0.5 for s in found.steps if s.precision != "fp32")
    assert [b.batch for b in found.batches] == [16] and found.batches[0].memory > 10**7
    # From the file: the seconds of two measurements are never equal. What is free now decides, not what was free then.
    poorer = replace(machine, free_memory=machine.free_memory // 2)
    again = measure(request, plan, audited.index, rows, poorer)
    assert again == replace(found, memory=again.memory) and again.memory < found.memory
    asked = []
    steps = [asdict(s) for s in found.steps]
    monkeypatch.setattr(
        ProbeProcess, "ask", lambda self, ask, *_: asked.append(ask["what"]) or steps * (len(asked) == 1)
    )
    assert measure(request, plan, audited.index, rows, machine).steps == found.steps and asked == []
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text("{")  # damaged: measured again, not an error
    assert measure(request, plan, audited.index, rows, machine).steps == found.steps and asked[:2] == ["ways", "sizes"]
    asked.clear()
    measure(request, replace(plan, imgsz=replace(plan.imgsz, value=64)), audited.index, rows, machine)
    assert asked[:2] == ["ways", "sizes"]  # another step is measured for itself


def test_the_plan_takes_what_was_measured_and_never_overrules_what_was_asked(prepared, tmp_path):
    request, audited, _, _ = prepared(measure=True, precision="fp32", batch=24, cache="off")
    plan = decide(request, audited, Journal(None, ()))
    assert (plan.precision.value, plan.precision.source, plan.batch.value) == ("fp32", "asked", 24)
    assert plan.channels_last.source == "measured"
    loading = plan.measured.loading
    assert {c.cache for c in loading} == {"ram", "off"} and len({c.key for c in loading}) == len(loading)
    assert all(c.batch == 24 and c.rate > 0 and c.bare > 0 for c in loading if not c.problem)
    assert plan.workers.source == "measured" and plan.workers.reason.startswith("loading waits")
    assert not list((tmp_path / "cache").glob("pictures-*"))  # measuring writes no cache of pictures


def test_memory_ends_the_search_and_not_the_run(prepared):
    request, audited, plan, rows = prepared(200, memory=0.9)
    poor = measure(request, plan, audited.index, rows, replace(find_machine("cpu"), free_memory=60_000_000))
    assert not any(s.admitted for s in poor.steps) or any(b.problem for b in poor.batches)


def test_a_real_limit_of_memory_ends_the_search_below_it(prepared, tmp_path):
    """The child may take less than the step at 512 needs and more than that at 64: the system itself refuses the rest."""
    import hashlib
    import random

    from goodfit.api.probe import _write_batch
    from goodfit.config.measured import BATCH_MARGIN, BatchCost, best_batch, latest

    _, audited, plan, rows = prepared(30, imgsz=64)

    def state():
        numbers = np.random.get_state()
        text = repr((torch.get_rng_state().tolist(), random.getstate(), numbers[1].tolist(), numbers[2:]))
        return hashlib.sha256(text.encode()).hexdigest()

    before = state()
    _write_batch(tmp_path, plan, audited.index, rows)
    ask = {"what": "sizes", "sizes": [16, 64, 512], "plan": plan.to_dict(), "class_names": list(audited.index.class_names),
           "counts": [20, 20, 20], "num_train": 20 * 512, "memory": 8 * 10**9}  # fmt: skip
    with ProbeProcess(tmp_path) as probe:
        assert [f["batch"] for f in probe.ask(ask, 0.3) if not f["problem"]] == []  # too slow: ended, and started anew
        free = latest(BatchCost(**f) for f in probe.ask(ask))
    assert [b.batch for b in free] == [16, 64, 512] and not any(b.problem for b in free), free
    limit = (free[1].memory + free[2].memory) // 2
    with ProbeProcess(tmp_path) as probe:
        poor = latest(BatchCost(**f) for f in probe.ask({**ask, "memory": limit}))
    chosen = best_batch(poor, limit)
    shown = ", ".join(f"{b.batch}: {b.problem or f'{b.rate:,.0f} img/s, {b.memory / 1e6:.0f} MB'}" for b in poor)
    print(f"limit {limit / 1e6:.0f} MB; {shown}; chosen {chosen}; state {before[:12]} before, {state()[:12]} after")
    assert state() == before
    last = poor[-1]
    assert last.batch == 512 and (last.problem or last.memory > limit), [asdict(b) for b in poor]
    rate = max(b.rate for b in poor[:-1])
    assert chosen is not None and chosen.batch == min(b.batch for b in poor[:-1] if b.rate >= (1 - BATCH_MARGIN) * rate)


def test_a_process_that_dies_leaves_what_it_found(tmp_path):
    (tmp_path / "batch.npz").write_bytes(b"")
    with ProbeProcess(tmp_path) as probe:
        for _ in range(2):  # the death of one answer leaves the process that forks the next
            assert probe.ask({"what": "ways", "ways": [], "plan": {}}) == []
            assert probe._process is not None and probe._process.poll() is None


def test_short_runs_are_not_measured(prepared):
    request, _, plan, rows = prepared()
    assert not wants_measuring(request, plan, len(rows), None)
    long = replace(plan, epochs=replace(plan.epochs, value=100_000))
    assert wants_measuring(request, long, len(rows), None)
    assert not wants_measuring(request, long, len(rows), plan)
    assert not wants_measuring(
        request, replace(long, deterministic=replace(plan.deterministic, value=True)), len(rows), None
    )


def test_plan_json_carries_the_figures(run_cli, make_images):
    data = make_images(20)
    done = run_cli("plan", str(data), "model=resnet10t", "pretrained=false", "imgsz=32", "measure=true", "json=true")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["decisions"]["precision"]["source"] == made["decisions"]["batch"]["source"] == "measured"
    assert made["measured"]["steps"]
    assert np.isfinite(made["measured"]["seconds"])
