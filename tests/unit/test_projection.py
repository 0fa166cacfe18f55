"""What a run will cost: figures against hand counts, a disk that is too small, projected against achieved."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from goodfit.api.verdict import too_little_time
from goodfit.core.errors import StorageError
from goodfit.core.journal import Journal
from goodfit.engine.budget import TimeBudget
from goodfit.engine.checkpoint import Checkpoints, take_snapshot, tensors_sha256
from goodfit.engine.ema import Ema
from goodfit.engine.optimizer import build_optimizer
from goodfit.engine.schedule import plan_schedule
from goodfit.engine.state import LossScale, Progress, TrainState
from goodfit.models.groups import ParameterGroup
from goodfit.planning import projection
from goodfit.planning.pace import Pace, measure_pace
from goodfit.planning.projection import (
    check_disk,
    describe_bytes,
    describe_outcome,
    describe_seconds,
    measure_outcome,
    num_checkpoints,
    project,
)
from plans import plan_of

PACE = Pace(step=0.5, data=0.02, start=0.1, validation=0.001, snapshot=0.05, save=0.2, memory=0)


def projected(pace=PACE, cache=0, memory=None, **asked):
    plan = plan_of(epochs=10, batch=50, **asked)
    return project(plan, num_val=300, steps_per_epoch=20, num_parameters=10**6, num_buffers=10**4, pace=pace,
                   cache=cache, memory=memory)  # fmt: skip


def test_an_epoch_is_all_that_happens_in_it():
    found = projected()
    assert found.epoch_seconds == pytest.approx(0.1 + 20 * 0.52 + 300 * 0.001 + 0.05 + 0.2)
    assert found.seconds == pytest.approx(10 * found.epoch_seconds)
    assert found.describe(52 * 10**9).startswith("at most 10 epochs of about 11 s, 1 min 50 s in all; 101 MB on disk")
    assert "; 2.0 GB of memory; " in projected(memory=2 * 10**9).describe(0)
    slow_disk = projected(replace(PACE, save=60.0))  # saving that nothing forces takes at most 5 %
    assert slow_disk.epoch_seconds == pytest.approx(1.05 * (found.epoch_seconds - 0.2))


def test_without_a_rehearsal_the_time_is_unknown_and_the_disk_is_not():
    found = projected(None)
    assert found.seconds is None and found.disk == projected().disk
    assert found.describe(52 * 10**9).startswith("time unknown without a rehearsal: at most 10 epochs; 101 MB on disk")


@pytest.mark.parametrize("asked", [{"optimizer": "adamw"}, {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.0},
                                   {"optimizer": "adam", "ema": False}])  # fmt: skip
def test_a_checkpoint_has_the_size_that_is_projected(tmp_path, asked):
    """Against real checkpoints of a small model: the bytes, and how many lie there at most and at the end."""
    plan = plan_of(epochs=10, batch=50, **asked)
    model = torch.nn.Sequential(torch.nn.Linear(300, 400), torch.nn.BatchNorm1d(400))
    groups = [ParameterGroup("all", tuple(dict(model.named_parameters())), 0.1, 0.0)]
    optimizer = build_optimizer(model, groups, kind=plan.optimizer.value, momentum=plan.momentum.value)
    model(torch.randn(4, 300)).sum().backward()
    optimizer.step()
    schedule = plan_schedule("wsd", epochs=10, warmup=0.0, lrf=0.0, steps_per_epoch=10, decay=0.2)
    ema = Ema(model, 0.9) if plan.ema.value else None
    state = TrainState(model, optimizer, ema, LossScale(torch.device("cpu"), active=False), Progress(schedule))
    checkpoints = Checkpoints(tmp_path / "checkpoints", {})
    most = 0
    write = checkpoints._write

    def count():
        return len([p for p in checkpoints.folder.iterdir() if not p.is_symlink()])

    def write_and_count(snapshot):
        nonlocal most
        path = write(snapshot)
        most = max(most, count())
        return path

    checkpoints._write = write_and_count
    for epoch in range(1, 11):
        state.progress.step = 10 * epoch
        if epoch in (2, 7):
            state.progress.best = {"segment": 0, "step": state.progress.step}
            checkpoints.hold(take_snapshot(state))
        if epoch not in (2, 7):  # so that the best is written beside the newest
            checkpoints.save(take_snapshot(state, pinned=epoch == 4))
    found = project(plan, num_val=0, steps_per_epoch=10, num_parameters=300 * 400 + 3 * 400, num_buffers=801)
    one = sum(p.stat().st_size for p in (checkpoints.folder / "step-00000100").iterdir())
    peak, kept = num_checkpoints(plan)
    assert (most, count()) == (peak, kept) == (6, 4)
    assert found.disk - projection.RECORDS == pytest.approx(peak * one, rel=0.02)
    bundle = 2 * 4 * (300 * 400 + 3 * 400 + 801)
    assert found.kept - projection.RECORDS == pytest.approx(kept * one + bundle, rel=0.02)


def test_how_many_checkpoints():
    assert num_checkpoints(plan_of(epochs=1)) == (4, 3)
    assert num_checkpoints(plan_of(epochs=2)) == (5, 4)
    assert num_checkpoints(plan_of(epochs=300)) == (7, 5)  # patience 50: a plateau keeps the state it branched from
    assert num_checkpoints(plan_of(epochs=300, patience=0)) == (6, 4)
    assert num_checkpoints(plan_of(epochs=300, patience=0, schedule="cosine", warmup=0.0)) == (5, 3)


def test_a_disk_that_is_too_small_is_refused(monkeypatch, tmp_path):
    found = projected()
    monkeypatch.setattr(projection, "free_bytes", lambda _folder: found.disk)
    assert check_disk(found, tmp_path) == found.disk
    monkeypatch.setattr(projection, "free_bytes", lambda _folder: found.disk - 1)
    with pytest.raises(StorageError, match="101 MB of disk, and 101 MB are free") as caught:
        check_disk(found, tmp_path)
    assert caught.value.where == str(tmp_path) and "nothing was trained" in caught.value.kept
    assert "project=" in caught.value.next and "cache=off" not in caught.value.next


def test_a_disk_cache_counts_where_it_will_be_written(monkeypatch, tmp_path):
    plan = plan_of(cache="disk")
    found = project(plan, num_val=1, steps_per_epoch=1, num_parameters=1, cache=10**9)
    assert found.cache == 10**9 and "and 1.0 GB of cache" in found.describe(0)
    monkeypatch.setattr(projection, "free_bytes", lambda _folder: 5 * 10**8)
    check_disk(found, tmp_path)
    with pytest.raises(StorageError, match=r"1\.0 GB of disk, and 500 MB") as caught:
        check_disk(found, tmp_path, cache_here=True)
    assert "cache=off" in caught.value.next
    assert project(plan_of(cache="ram"), num_val=1, steps_per_epoch=1, num_parameters=1, cache=10**9).cache == 0


def test_projected_against_achieved():
    epochs = [{"seconds": s, "memory": m} for s, m in ((20.0, 10**9), (12.0, 2 * 10**9), (13.0, 15 * 10**8))]
    found = measure_outcome(epochs, 90 * 10**6)
    assert found == {"epochs": 3, "epoch_seconds": 12.5, "seconds": 45.0, "memory": 2 * 10**9, "kept": 90 * 10**6}
    line = describe_outcome(projected().to_dict(), found)
    assert "an epoch 11 s projected, 12 s taken (1.13 times)" in line and "90 MB taken" in line
    assert "3 of at most 10 epochs, 1 min 50 s projected for all, 45 s taken" in line and "peak memory 2.0 GB" in line
    assert "none was projected" in describe_outcome(projected(None).to_dict(), found)
    assert describe_outcome(None, found) == "nothing was projected"
    assert measure_outcome([], 0)["epoch_seconds"] is None


@pytest.mark.parametrize(("seconds", "text"), [(0.84, "0.8 s"), (9.96, "10 s"), (59.6, "1 min"), (320, "5 min 20 s"),
                                           (3600, "1 h"), (11_100, "3 h 5 min"), (190_000, "2 d 4 h")])  # fmt: skip
def test_lengths_of_time(seconds, text):
    assert describe_seconds(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 MB"), (85_400_000, "85 MB"), (999_600_000, "1.0 GB"),
                                         (1_120_000_000, "1.1 GB"), (9_960_000_000, "10 GB"),
                                         (52 * 10**9, "52 GB")])  # fmt: skip
def test_bytes(count, text):
    assert describe_bytes(count) == text


def test_nothing_is_trained_on_a_full_disk(monkeypatch, make_images, tmp_path):
    """End to end: refused before a picture is drawn or a step is done, with exit code 4 and the run's folder named."""
    import goodfit

    monkeypatch.setattr(projection, "free_bytes", lambda _folder: 10**6)
    with pytest.raises(goodfit.StorageError, match="1 MB are free") as caught:
        goodfit.train(make_images(20), epochs=1, project=str(tmp_path / "runs"), rehearse=False)
    folder = caught.value.where
    assert caught.value.exit_code == 4 and not os.path.exists(os.path.join(folder, "checkpoints"))
    lines = Path(folder, "events.jsonl").read_text("utf-8")
    assert '"event": "failed"' in lines and '"event": "step"' not in lines


def test_measuring_the_pace_leaves_the_run_as_it_was(make_images, tmp_path):
    """Every tensor of the state, the random state and the folder: equal before and after real steps, a validation and a save."""
    from goodfit.api.assemble import assemble, execution
    from goodfit.api.decide import decide
    from goodfit.api.prepare import read_and_audit
    from goodfit.config.parse import parse_request

    asked = {"data": str(make_images(20)), "model": "resnet10t", "pretrained": "false", "imgsz": 32, "epochs": 3}
    request, journal = parse_request(asked), Journal(None, ())
    audited = read_and_audit(request, journal)
    plan = decide(request, audited, journal, measuring=False)
    with execution(plan):
        parts = assemble(plan, audited.index)
        before = tensors_sha256(take_snapshot(parts.state).files), torch.get_rng_state(), parts.state.progress.to_dict()
        found = measure_pace(parts.state, parts.context, parts.train, parts.val, folder=tmp_path, bare_rate=100.0)
        after = tensors_sha256(take_snapshot(parts.state).files), torch.get_rng_state(), parts.state.progress.to_dict()
    assert before[0] == after[0] and torch.equal(before[1], after[1]) and before[2] == after[2]
    assert list(tmp_path.glob(".tmp-pace*")) == [] and parts.val.bytes_to_keep == 0
    assert min(found.step, found.validation, found.snapshot, found.save) > 0 and found.step > found.data


def test_a_time_that_holds_too_little_is_told_before_training():
    """Steps of 4 s and validations of 36 s: two minutes, of which plan and rehearsal took 79 s, leave nothing worth having."""

    def told(seconds, *, spent=79.0, step=0, paces=({"step": 3.9, "data": 0.1},), sample=0.0):
        run = SimpleNamespace(events=[{"event": "stage", "name": "pace", "pace": pace} for pace in paces])
        parts = SimpleNamespace(
            state=SimpleNamespace(progress=SimpleNamespace(step=step)),
            train=SimpleNamespace(steps_per_epoch=11, batch=8),
            plan=SimpleNamespace(sample_seconds=sample),
        )
        budget = TimeBudget(seconds=seconds, used=spent, reserve=20.0, rest_seconds=36.0)
        return too_little_time(run, parts, budget)

    assert "about 0 steps, where one pass over its samples takes 11" in told(
        120.0
    ) and "time=22m would hold 15" in told(120.0)
    assert "about 6 steps" in told(160.9) and told(900.0) == "" == told(120.0, step=5) == told(120.0, paces=())
    assert "about 6 steps" in told(160.9, paces=(), sample=0.5), "by the first step, where no pace was measured"
