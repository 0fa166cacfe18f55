"""`batch=study`: real short trainings in a process of their own, and what is left when it ends early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch

from goodfit.api import batch_study
from goodfit.api.decide import decide
from goodfit.api.prepare import read_and_audit
from goodfit.config import study
from goodfit.config.parse import parse_request
from goodfit.core.errors import RequestError
from goodfit.core.journal import Journal
from plans import plan_of


def left(temporary):
    """What a study left in the folder of temporary files; libraries keep caches of their own there."""
    return list(temporary.glob("goodfit-*"))


@pytest.fixture
def prepared(make_images, tmp_path, monkeypatch):
    """What decides the plan of 180 pictures, of which batches of 8 and 16 are studied for 192 samples each."""
    monkeypatch.setenv("GOODFIT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(batch_study, "batch_candidates", lambda _: (8, 16))
    monkeypatch.setattr(study, "RULE_PASSES", 1)
    monkeypatch.setattr(study, "LEAST_UPDATES", 10)
    data = make_images(60)

    def make(**asked):
        asked = {
            "model": "test_resnet",
            "pretrained": "false",
            "imgsz": 32,
            "epochs": 20,
            "deterministic": True,
            **asked,
        }
        request = parse_request({"data": str(data), "batch": "study", **asked})
        audited = read_and_audit(request, Journal(None, ()))
        events = []
        return (lambda: decide(request, audited, Journal(None, (events.append,)))), events, audited.index

    return make


def test_it_trains_equal_samples_is_repeatable_remembered_and_leaves_nothing(prepared, tmp_path):
    make, events, _ = prepared(seed=3)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    plan = make()
    assert torch.equal(torch.get_rng_state(), before) and not left(tmp_path / "temporary")
    small, large = plan.measured.study
    assert (small.batch, large.batch) == (8, 16) and small.monitor == plan.monitor.value == "accuracy"
    assert len(small.values) == len(large.values) == 3 and small.samples == large.samples == 3 * 64
    assert all(0 <= v <= 1 for v in (*small.values, *large.values)) and len({*small.losses, *large.losses}) == 6
    kept = [batch for batch, verdict in study.judge(plan.measured.study).items() if verdict.kept]
    assert (plan.batch.value, plan.batch.source) == (min(kept), "measured") and "no timing decides" in plan.batch.reason
    assert plan.lr.value == pytest.approx(1e-3 * (plan.batch.value / 64) ** 0.5, rel=0.01)
    told = [e for e in events if e["event"] in ("stage", "progress") and e["name"] == "study"]
    assert "3 trainings each on 64 samples × 3 epochs, validated on 27" in told[0]["text"]  # before it starts
    assert [e["done"] for e in told if e["event"] == "progress"] == [1, 2, 3, 4, 5, 6]
    assert make().measured == plan.measured  # from the file: the seconds of two studies are never equal
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text("{")
    again = make().measured.study
    assert [(c.values, c.losses) for c in again] == [(c.values, c.losses) for c in (small, large)]
    assert again[0].rate != small.rate


def test_no_sample_of_the_test_split_and_equal_shares_of_every_class(prepared):
    _, _, index = prepared()
    design = study.StudyDesign(sizes=(8, 16), num_seeds=3, num_train=64, num_val=15, epochs=3, seconds=None, budget=1.0)
    plan = plan_of()
    made = batch_study.study_index(index, plan, design)
    for split, most in (("train", 64), ("val", 15)):
        rows = made.rows(split)
        assert set(rows) <= set(index.rows(split)) and len(rows) == most
        counts = np.bincount(made.targets[rows])
        assert len(counts) == 3 and counts.max() - counts.min() <= 1
    assert len(made.rows("test")) == 0 and (made.splits >= 0).sum() == 79 and len(index.rows("test")) == 27
    smaller = batch_study.study_index(index, plan, study.StudyDesign(
        sizes=(8, 16), num_seeds=3, num_train=32, num_val=9, epochs=3, seconds=None, budget=1.0))  # fmt: skip
    assert set(smaller.rows("train")) < set(made.rows("train")) and set(smaller.rows("val")) < set(made.rows("val"))


def test_a_process_that_dies_costs_the_size_at_which_it_died(prepared, monkeypatch):
    make, _, _ = prepared()
    asked = []

    def dies(_folder, ask, _end):
        asked.append([tuple(t) for t in ask["trials"]])
        for batch, seed in ask["trials"]:
            if batch == 32:
                return
            yield {"batch": batch, "seed": seed, "value": 0.5 + 0.01 * seed, "loss": 1.0, "seconds": 1.0, "problem": ""}

    monkeypatch.setattr(batch_study, "batch_candidates", lambda _: (8, 16, 32))
    monkeypatch.setattr(batch_study, "_ask", dies)
    plan = make()
    assert [c.problem for c in plan.measured.study] == ["", "", "the process died, most likely of memory"]
    assert [len(c.values) for c in plan.measured.study] == [3, 3, 0] and plan.batch.value == 8
    assert len(asked) == 2 and (32, 0) in asked[0] and not any(t in asked[1] for t in ((8, 0), (16, 0), (32, 1)))
    assert any("batch 32, studied" in line and "died" in line for line in plan.measured.table())


def test_where_nothing_can_be_said_the_rule_decides_and_says_so(prepared, monkeypatch):
    monkeypatch.setattr(study, "MAX_SECONDS", 0.0)
    monkeypatch.setattr(batch_study, "MAX_SECONDS", 0.0)  # the time is over before the first training
    make, _, _ = prepared()
    plan = make()
    assert (plan.batch.value, plan.batch.source) == (16, "rule") and not plan.measured.study
    assert "batch=study was not done: it was ended after" in plan.batch.reason


def test_contradictions_are_refused(prepared):
    for asked in ({"plan": "some.json"}, {"batch_study": True, "batch": 32}):
        request = parse_request({"data": "x", **({"batch": "study"} | asked)})
        with pytest.raises(RequestError, match="chooses the batch"):
            batch_study.check_request(request)


def test_an_interrupt_ends_it_and_leaves_nothing(make_images, tmp_path):
    data, temporary = make_images(310), tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "GOODFIT_CACHE_DIR": str(tmp_path / "cache")}
    words = ("plan", str(data), "batch=study", "measure=false", "model=test_resnet", "pretrained=false", "epochs=300")
    process = subprocess.Popen([sys.executable, "-m", "goodfit", *words], cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    # (a shell's background job, as these tests may be, hands down that interrupts are ignored)
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if line.startswith("study") and " of " in line:
                break
        assert said[-1].startswith("study     1 of 6"), said
        assert left(temporary)
        os.kill(process.pid, signal.SIGINT)  # to the asking process alone: the one that trains ends with it
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "trainings each on" in "".join(said) and "Stopped" in told
    assert not left(temporary)
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        os.killpg(process.pid, 0)
