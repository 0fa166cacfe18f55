"""The learning-rate range test on real steps, in its own process, and in a run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import goodfit
from goodfit.api import find_lr
from goodfit.api.assemble import assemble, execution
from goodfit.api.decide import decide
from goodfit.api.prepare import read_and_audit
from goodfit.config.parse import parse_request
from goodfit.core.journal import Journal
from goodfit.engine.device import find_machine
from goodfit.models.groups import parameter_groups
from goodfit.planning.lr_range import SETTLING_STEPS, range_test

ASKED = {"model": "resnet10t", "pretrained": "false", "imgsz": 32, "epochs": 1, "batch": 16, "deterministic": True,
         "lr": "find", "head_lr": 4e-3, "rehearse": False, "suspects": False}  # fmt: skip
SILENT = Journal(None, ())


@pytest.fixture
def prepared(make_images, tmp_path, monkeypatch):
    monkeypatch.setenv("GOODFIT_CACHE_DIR", str(tmp_path / "cache"))
    request = parse_request({"data": str(make_images(20)), **ASKED})
    audited = read_and_audit(request, SILENT)
    return request, audited, decide(request, audited, SILENT, measuring=False)


def test_found_in_another_process_repeated_here_remembered_and_taken_by_a_run(prepared, tmp_path):
    request, audited, usual = prepared
    before = torch.get_rng_state()
    plan = decide(request, audited, SILENT)
    assert torch.equal(torch.get_rng_state(), before)
    found = plan.measured.lr_range
    assert (plan.lr.value, plan.lr.source, plan.head_lr.value) == (found.suggestion, "measured", 4e-3)
    assert found.table == usual.lr.value and 0 < found.suggestion != found.table

    assert _taken_here(usual, audited.index).losses == found.losses  # deterministic: of seed and data alone

    stamps = [p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("lr-range*/*.json")]
    run = goodfit.train(request.data, project=str(tmp_path / "runs"), **ASKED)
    assert run.plan.measured.lr_range == found  # from the cache: measured once
    assert len(stamps) == 1 and stamps == [p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("lr-range*/*.json")]
    peak = max(e["lr"] for e in run.events if e["event"] in ("step", "epoch"))
    assert 0 < peak <= found.suggestion * (1 + 1e-6)
    assert (run.path / "plots" / "lr_range.png").stat().st_size > 10_000
    assert "Range test" in (run.path / "report.html").read_text("utf-8")


def _taken_here(plan, index):
    """The range test in this process, looked at from the optimizer."""
    rates = []
    with execution(plan):
        parts = assemble(plan.changed(ema=False), index, workers=0)
        optimizer = parts.state.optimizer
        step = optimizer.step
        optimizer.step = lambda: rates.append([g["lr"] for g in optimizer.param_groups]) or step()
        curve = range_test(parts.state, parts.context, lambda epoch: parts.train.groups(epoch, 0, 1), timed=False)
    grown = np.array(rates[SETTLING_STEPS:])
    assert not np.any(rates[:SETTLING_STEPS]) and 50 < len(curve.losses) == len(curve.rates) <= len(grown)
    head = [g.name for g in parameter_groups(parts.state.model, plan)].index("head")
    assert np.allclose(grown[:, head] / grown[:, 0], plan.head_lr.value / plan.lr.value)
    assert np.allclose(grown[: len(curve.rates), 0], curve.rates)
    factors = grown[1:, 0] / grown[:-1, 0]
    assert np.allclose(factors, factors[0]) and curve.rates[0] == pytest.approx(plan.lr.value / 1000)
    assert (
        parts.state.progress.epoch == (len(rates) - 1) // parts.train.steps_per_epoch
    )  # never the same pictures twice
    return curve


def test_what_is_remembered_is_used_where_it_fits_and_never_trusted(prepared, tmp_path, monkeypatch):
    request, audited, plan = prepared
    machine, asked = find_machine("cpu"), []
    curve = {"rates": [1e-6, 1e-5], "losses": [2.0, 2.0], "diverged": True, "problem": ""}
    monkeypatch.setattr(find_lr.ProbeProcess, "ask", lambda self, ask, seconds: asked.append(ask["what"]) or [curve])
    first = find_lr.find_lr(request, plan, audited.index, machine)
    assert "diverged after 2 steps" in first.reason and not first.suggestion
    for again in (request, replace(request, measure=False)):
        assert find_lr.find_lr(again, plan, audited.index, machine) == first and asked == ["lr"]
    for name, value in (("seed", 1), ("augment", "strong"), ("batch", 8), ("optimizer", "sgd"), ("precision", "fp16")):
        find_lr.find_lr(
            request, replace(plan, **{name: replace(getattr(plan, name), value=value)}), audited.index, machine
        )
    assert len(asked) == 6
    find_lr.find_lr(request, replace(plan, epochs=replace(plan.epochs, value=9)), audited.index, machine)
    other = audited.index.with_splits(np.roll(audited.index.splits, 1))
    assert len(asked) == 6
    find_lr.find_lr(request, plan, other, machine)
    find_lr.find_lr(replace(request, measure=True), plan, audited.index, machine)
    assert len(asked) == 8
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text(json.dumps({"rates": 1}))
    monkeypatch.setattr(find_lr.ProbeProcess, "ask", lambda self, ask, seconds: [])
    assert "its process died" in find_lr.find_lr(request, plan, audited.index, machine).reason


def test_a_loss_that_is_not_finite_ends_it(prepared):
    _, audited, plan = prepared
    with execution(plan):
        parts = assemble(plan, audited.index)
        loss, count = parts.task.loss, iter(range(1000))

        def spoiled(model, batch):
            terms = loss(model, batch)
            return {n: (t * (torch.nan if next(count) >= 30 else 1), c) for n, (t, c) in terms.items()}

        object.__setattr__(parts.task, "loss", spoiled)
        curve = range_test(parts.state, parts.context, lambda epoch: parts.train.groups(epoch, 0, 1), timed=False)
    assert curve.diverged and len(curve.losses) == 30 - SETTLING_STEPS and np.isfinite(curve.losses).all()
