"""Extension, time budgets and `goodfit extend`, on real runs."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from test_training import events_of, parts_of

import goodfit
from goodfit.api import extend
from goodfit.api.assemble import execution
from goodfit.api.batch_study import _Unsaved
from goodfit.core.errors import RequestError, StorageError
from goodfit.core.journal import Journal
from goodfit.engine.budget import TimeBudget
from goodfit.engine.checkpoint import Checkpoints, restore, tensors_sha256
from goodfit.engine.loop import fit
from goodfit.engine.stop import StopFlag
from outcomes import only_training


def fit_on(parts, folder, journal, settings):
    checkpoints = Checkpoints(folder, {})
    with execution(parts.plan), StopFlag() as stop:
        fit(parts.state, parts.context, parts.train, parts.val, settings=settings, checkpoints=checkpoints,
            journal=journal, stop=stop)  # fmt: skip
    return checkpoints


def improving(parts, most):
    """Settings under which every epoch is an improvement, as far as patience and extension see it."""
    return replace(parts.settings, most_epochs=most, monitor="loss", maximise=False)


def test_a_run_that_improves_is_extended_with_its_optimizer_state_and_resumes_exactly(bars, tmp_path, monkeypatch):
    asked = {"epochs": 10, "warmup": 1, "lr": 1e-4, "head_lr": 1e-4}
    whole = parts_of(bars, **asked)
    fit_on(whole, tmp_path / "whole", Journal(tmp_path / "events.jsonl"), improving(whole, 20))
    progress = whole.state.progress
    assert (progress.segment, progress.branch, progress.ended) == (1, "extension", "schedule")
    steps = whole.train.steps_per_epoch
    assert progress.step == 20 * steps and progress.branches == [{"segment": 0, "step": 8 * steps}]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (branch,) = [e for e in events if e["event"] == "segment"]
    assert branch["epochs"] == 20 and "still improving" in branch["reason"]
    epochs = [e for e in events if e["event"] == "epoch"]
    assert [e["epoch"] for e in epochs] == list(range(20)) and {e["segment"] for e in epochs[8:]} == {1}
    assert epochs[8]["lr"] == epochs[14]["lr"] == pytest.approx(epochs[4]["lr"]), "the rate goes on where it was"
    assert epochs[8]["train_loss"] < 1.3 * epochs[7]["train_loss"], "no jump"
    names = {p.name for p in (tmp_path / "whole").glob("step-*")}
    assert f"step-{8 * steps:08d}" in names and f"step-{16 * steps:08d}-segment-1" in names, "both are pinned"

    again = parts_of(bars, **asked)  # from the checkpoint of the branch, as after a kill
    start = Checkpoints(tmp_path / "whole", {}).load(f"step-{16 * steps:08d}-segment-1")
    restore(again.state, start)
    fit_on(again, tmp_path / "again", Journal(None), improving(again, 20))
    assert tensors_sha256({"": again.state.model.state_dict()}) == tensors_sha256({"": whole.state.model.state_dict()})


def killed(*_):
    raise KeyboardInterrupt


def test_a_finished_run_is_extended_from_before_its_decay(bars, tmp_path, monkeypatch):
    run = goodfit.train(bars, project=str(tmp_path), epochs=5, batch=16, rehearse=False, suspects=False)
    first, best = run.result, run.events
    with pytest.raises(RequestError, match="has 5 already") as caught:
        goodfit.extend(run.path, epochs=5)
    assert "epochs=10" in caught.value.next and run.result == first
    with monkeypatch.context() as patch:  # killed before the outcome was set aside
        patch.setattr(extend, "_set_aside", killed)
        with pytest.raises(KeyboardInterrupt):
            goodfit.extend(run.path, epochs=10)
    assert run.result == first, "still the finished run"
    with pytest.raises(RequestError, match="an extension to 10 was begun"):
        goodfit.extend(run.path, epochs=20)
    longer = goodfit.extend(run.path, epochs=10)
    events = [e for e in events_of(run.path) if e["event"] in ("epoch", "segment")]
    branch = [e for e in events if e["event"] == "segment"][-1]
    steps = branch["parent"]["step"] // 4
    assert branch["parent"] == {"segment": 0, "step": 4 * steps} and branch["segment"] == 1
    after = [e for e in events if e["event"] == "epoch" and e["segment"] == 1]
    assert [e["epoch"] for e in after] == list(range(4, 10))
    before = next(e for e in events if e["event"] == "epoch" and e["epoch"] == 3)
    assert after[0]["lr"] == pytest.approx(before["lr"]) and after[0]["train_loss"] < 1.5 * before["train_loss"]
    assert longer.metrics["val"]["accuracy"] >= first["metrics"]["val"]["accuracy"], "never worse than its parent"
    assert longer.plan.epochs.value == 10 and longer.result["metrics"]["test"]["look"] == 2
    kept = run.path / "segments" / "0"
    assert json.loads((kept / "plan.json").read_text())["decisions"]["epochs"]["value"] == 5
    assert json.loads((kept / "result.json").read_text()) == first
    assert {p.name for p in kept.iterdir()} == {"plan.json", "result.json", "test.json", "report.html", "bundle"}
    assert (longer.bundle / "bundle.json").is_file() and best
    with pytest.raises(RequestError, match="no such run"):
        goodfit.extend(tmp_path / "nowhere", epochs=10)
    (run.path / "result.json").unlink()
    with pytest.raises(StorageError, match="not finished"):
        goodfit.extend(run.path, epochs=20)


def test_extending_a_schedule_without_a_stable_rate_warms_up_again(bars, tmp_path, monkeypatch):
    only_training(monkeypatch)
    run = goodfit.train(
        bars, project=str(tmp_path), epochs=2, batch=16, rehearse=False, suspects=False, schedule="cosine"
    )
    goodfit.extend(run.path, epochs=4)
    (branch,) = [e for e in events_of(run.path) if e["event"] == "segment"]
    assert "warm-up" in branch["reason"] and branch["parent"]["step"] == branch["step"]
    rates = [e["lr"] for e in events_of(run.path) if e["event"] == "epoch"]
    assert len(rates) == 4 and rates[1] < 0.1 * rates[0] and rates[2] > 5 * rates[1] and rates[3] < rates[2]


@pytest.mark.alone
def test_training_ends_in_time_with_its_decay(bars, tmp_path):
    parts = parts_of(bars)  # 300 epochs
    journal = Journal(tmp_path / "events.jsonl")
    budget = TimeBudget(seconds=6)
    checkpoints = _Unsaved(tmp_path)  # three seconds of six would go to them
    with execution(parts.plan), StopFlag() as stop:
        fit(parts.state, parts.context, parts.train, parts.val, settings=replace(parts.settings, time=budget),
            checkpoints=checkpoints, journal=journal, stop=stop)  # fmt: skip
    assert budget.spent() == pytest.approx(6, abs=1) and parts.state.progress.ended == "time budget"
    rates = [e["lr"] for e in events_of(tmp_path) if e["event"] == "epoch"]
    assert rates[-1] < 0.1 * max(rates)


@pytest.mark.alone
@pytest.mark.soak
def test_a_time_budget_is_kept_by_the_whole_command(bars, tmp_path):
    start = time.monotonic()
    # Without patience, which ends a run that has nothing more to learn: here after half of the time.
    run = goodfit.train(bars, project=str(tmp_path), time="60s", batch=16, suspects=False, patience=0)
    took = time.monotonic() - start
    assert took == pytest.approx(60, rel=0.15), "far less than an epoch budget of 300 would take, and not cut short"
    epochs = [e for e in events_of(run.path) if e["event"] == "epoch"]
    assert epochs[-1]["lr"] < 0.05 * max(e["lr"] for e in epochs), "the rate has fallen by the end"
    (ended,) = [e["text"] for e in events_of(run.path) if e["event"] == "stage" and e["name"] == "train"]
    assert "time budget" in ended
