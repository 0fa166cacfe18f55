"""What a time for the whole run holds: what is left out to keep it, what is kept for what comes after training, what is said."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from goodfit.api.assemble import PROBE_SAMPLES, Parts
from goodfit.api.decide import decide
from goodfit.api.inspect import suspect_stage
from goodfit.api.prepare import read_and_audit
from goodfit.api.verdict import over_time, time_budget
from goodfit.config.facts import FirstStep
from goodfit.config.parse import parse_request
from goodfit.config.plan import Plan
from goodfit.config.request import TrainRequest
from goodfit.config.resolve import resolve
from goodfit.config.time_rules import few_passes, is_worth
from goodfit.core.journal import Journal
from goodfit.engine.budget import TimeBudget
from plans import facts_of


def plan(seconds: float, **asked) -> Plan:
    """Of 1,000 photos, a sample of whose step takes so many seconds."""
    return resolve(TrainRequest(**asked), replace(facts_of(), first_step=FirstStep(160, seconds)))


def test_a_classifier_leaves_out_what_takes_a_large_part_of_its_time():
    """At 20 ms a sample a rehearsal of 36 batches of 50 takes 36 s; two minutes hold three passes."""
    slow = plan(0.02, time=120.0, batch=50)
    assert not slow.rehearse.value and slow.rehearse.source == "measured" and "36 of the 120 s" in slow.rehearse.reason
    assert slow.cache.value != "off" and slow.sample_seconds == pytest.approx(0.02)
    short = plan(0.02, time=60.0, batch=50)
    assert short.cache.value == "off" and "1.5 passes" in short.cache.reason
    facts = replace(facts_of(), first_step=FirstStep(160, 0.02))
    assert few_passes(slow, facts) == few_passes(plan(0.02, time=3600.0), facts) == "", "fine-tuning may do with three"
    said = few_passes(plan(0.02, time=30.0), facts)
    assert "about 0.75 passes" in said and "time=10m would hold 15" in said and "little is learned" not in said
    assert plan(0.02, time=3600.0, batch=50).rehearse.value and plan(0.02).rehearse.value
    assert plan(0.02, time=120.0, batch=50, rehearse=True).rehearse.value


def test_a_plan_keeps_what_its_first_step_took():
    made = plan(0.02, time=120.0)
    again = Plan.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made and again.sample_seconds == made.sample_seconds > 0
    assert "sample_seconds" not in made.decisions() and Plan.from_dict(plan_without(made)).sample_seconds == 0.0


def test_a_plan_that_is_followed_hands_on_what_its_first_step_took():
    made = plan(0.02, time=120.0, batch=50)
    again = resolve(TrainRequest(time=120.0), facts_of(), made)
    assert again.sample_seconds == made.sample_seconds and not again.rehearse.value


def plan_without(made: Plan) -> dict:
    return {name: value for name, value in made.to_dict().items() if name != "sample_seconds"}


def test_time_for_what_follows_grows_with_what_a_validation_takes(monkeypatch):
    budget = TimeBudget(seconds=100.0, reserve=10.0, served=3.0, validation=4.0, began=0.0)
    monkeypatch.setattr("goodfit.engine.budget.time.monotonic", lambda: 20.0)
    assert budget.afterwards == 22.0 and budget.left() == 58.0
    budget.end_epoch(12.0, 9.0)  # the first, which read its files
    budget.end_epoch(5.0, 2.0)
    assert budget.validation == 9.0 and budget.left() == 43.0
    budget.end_epoch(5.0, 90.0)
    assert budget.left() == 30.0, "half of the time stays with training and what comes before it"


@pytest.mark.parametrize(
    ("pace", "sample", "validation"), [({}, 0.3, 4.0), ({"validation": 0.05, "save": 1.0}, 0.3, 2.0), ({}, 0.0, 0.0)]
)
def test_a_budget_without_a_pace_goes_by_the_first_step(tmp_path, pace, sample, validation):
    run = SimpleNamespace(path=tmp_path, events=[{"event": "stage", "name": "pace", "pace": pace}] if pace else [])
    (tmp_path / "events.jsonl").write_text(
        '{"event": "step", "spent": 31.5}\n{"event": "run"}\n{"event": "step", "spent": 12.0}\n'
    )
    parts = SimpleNamespace(plan=SimpleNamespace(time=SimpleNamespace(value=120.0), sample_seconds=sample), val=SimpleNamespace(rows=np.arange(40)),
                            num_served=100, finish_seconds=28.0, state=SimpleNamespace(progress=SimpleNamespace(seconds=20.0)))  # fmt: skip
    made = time_budget(run, parts, began=0.0)
    assert made is not None and made.validation == made.rest_seconds == pytest.approx(validation)
    assert made.afterwards == pytest.approx(28 + 2 * pace.get("save", 0.0) + 2.5 * validation)
    assert made.used == 31.5, "a process that was killed before a checkpoint told how far it had come"


def test_the_linear_probe_and_the_search_for_wrong_labels_are_left_out_where_they_take_much_of_a_time(
    make_images, monkeypatch
):
    assert is_worth(1e9, 0.0) and is_worth(11.9, 120.0) and not is_worth(12.1, 120.0)

    def parts(time, sample):
        plan = SimpleNamespace(time=SimpleNamespace(value=time), sample_seconds=sample)
        return SimpleNamespace(plan=plan, num_probed=3000, train=SimpleNamespace(rows=np.arange(2000)), probes=lambda image: Parts.probes(parts(time, sample), image),
                               index=SimpleNamespace(rows=lambda split: np.arange(500)))  # fmt: skip

    assert Parts.probes(parts(0.0, 1.0), 1.0) and Parts.probes(parts(3600.0, 0.01), 0.01)
    assert not Parts.probes(parts(120.0, 0.03), 0.0) and not Parts.probes(parts(120.0, 0.0), 0.01)
    num_served = Parts.num_served.fget
    assert num_served(parts(3600.0, 0.01)) == 500 + 1000 + 3000 and num_served(parts(120.0, 0.03)) == 1500
    assert Parts.num_probed.fget(SimpleNamespace(train=SimpleNamespace(rows=np.arange(50_000)), index=SimpleNamespace(
        rows=lambda split: np.arange(500)))) == PROBE_SAMPLES + 1000  # fmt: skip
    request = parse_request({"data": str(make_images()), "time": "60s"})
    journal = Journal(None)
    audited = read_and_audit(request, journal)
    made = decide(request, audited, journal)
    assert made.sample_seconds > 0, "a step was timed, as there is a time to keep"
    said = []
    journal.listen(lambda event: said.append(event["text"]) if event["event"] == "stage" else None)
    suspect_stage(request, audited, journal, replace(made, sample_seconds=3.0))
    suspect_stage(request, audited, journal, replace(made, sample_seconds=1e-6))
    assert (
        "not searched for wrong ones, which would take a large part of the time" in said[0]
        and "likely wrong" in said[1]
    )


def test_a_run_that_took_too_long_says_so(monkeypatch):
    monkeypatch.setattr("goodfit.engine.budget.time.monotonic", lambda: 155.0)
    assert over_time(TimeBudget(seconds=120.0, began=0.0)) == "The run took 2 min 35 s of the 2 min that it was given"
    assert over_time(TimeBudget(seconds=150.0, began=0.0)) == "" == over_time(None)
