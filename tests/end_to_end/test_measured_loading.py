"""Loading measured beside real training steps, in real loader processes."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch.utils.data

from goodfit.api.assemble import assemble_step, assemble_task, train_loader, train_samples
from goodfit.api.decide import decide
from goodfit.api.prepare import read_and_audit
from goodfit.api.probe import _still_holds
from goodfit.config.loading import LoadCost, best_loading, load_candidates
from goodfit.config.measured import Measured, StepCost
from goodfit.config.parse import parse_request
from goodfit.core.journal import Journal
from goodfit.data.split import subset
from goodfit.data.store import PictureStore
from goodfit.engine.ranks import Ranks
from goodfit.planning.loading import measure_loading
from plans import plan_of

pytestmark = pytest.mark.alone

PAUSE = 0.004  # seconds that a slow disk takes for a picture


class SlowStore(PictureStore):
    """Pictures from a disk that is slow, and not a processor that is busy: a second process always helps."""

    def get(self, row):
        time.sleep(PAUSE)
        return super().get(row)


class DeadlyStore(PictureStore):
    """Pictures that end any loader process."""

    def get(self, row):
        if torch.utils.data.get_worker_info() is not None:
            os._exit(9)
        return super().get(row)


@pytest.fixture
def prepared(make_images, tmp_path, monkeypatch):
    monkeypatch.setenv("GOODFIT_CACHE_DIR", str(tmp_path / "cache"))

    def make(**asked):
        asked = {"model": "resnet10t", "pretrained": "false", "imgsz": 32, "epochs": 3, "batch": 16, **asked}
        request = parse_request({"data": str(make_images(30)), **asked})
        return request, read_and_audit(request, Journal(None, ()))

    return make


def measured(prepared, store_type, workers):
    """Loading with 0 to `workers` processes from such a store, and from memory."""
    request, audited = prepared(cache="off")
    plan = decide(request, audited, Journal(None, ()), measuring=False)
    rows = subset(audited.index, 1.0, 0)
    task = assemble_task(plan, audited.index.class_names, np.bincount(audited.index.targets[rows]))
    stores = {cache: kind(audited.index, rows, imgsz=32, cache=cache)
              for cache, kind in (("ram", PictureStore), ("off", store_type))}  # fmt: skip
    stores["ram"].warm(1)

    def loader_of(way):
        samples = train_samples(plan, audited.index, task, stores[way.cache])
        plan_of_way = plan.changed(workers=way.workers, prefetch=way.prefetch, threads=1)
        return train_loader(plan_of_way, samples, np.tile(rows, 60), Ranks())

    state, context, _ = assemble_step(plan, task, 10, Ranks())
    before = {name: value.clone() for name, value in state.model.named_parameters()}
    found = measure_loading(state, context, loader_of, load_candidates("off", workers, cache_asked=True), num_micro=1,
                            steps_per_epoch=100, seconds=4.0)  # fmt: skip
    costs = {cost.key: cost for cost in found}
    assert all(torch.equal(value, before[name]) for name, value in state.model.named_parameters())
    return costs


def test_processes_end_the_wait_for_a_slow_disk(prepared):
    costs = measured(prepared, SlowStore, 2)
    alone, kept = costs["off", 0, 2], costs["ram", 0, 2]
    best = best_loading(list(costs.values()), cache="off")  # one process, where it makes batches as fast as they go
    assert alone.wait >= 16 * PAUSE and alone.bare < alone.seconds
    assert best.workers > 0 and best.wait < 0.75 * alone.wait and best.rate > 1.1 * alone.rate and best.start > 0
    assert kept.wait < 0.3 * alone.wait and kept.start == 0


def test_a_process_that_dies_is_a_problem_and_no_error(prepared):
    costs = measured(prepared, DeadlyStore, 2)
    assert "exited unexpectedly" in costs["off", 1, 2].problem and costs["off", 0, 2].rate > 0
    assert ("off", 2, 2) not in costs  # more of the same are not tried
    assert best_loading(list(costs.values()), cache="off").workers == 0


def test_loading_is_measured_anew_for_a_run_that_is_longer():
    way = StepCost(precision="fp32", channels_last=False, seconds=0.1)
    plan = plan_of(batch=32, cache="ram")
    short = Measured(batch=32, steps=(way,), memory=10**9)
    assert _still_holds(short, plan_of(batch=32, epochs=3), 1000, 10**9)
    assert not _still_holds(short, plan, 1000, 10**9)
    assert _still_holds(replace(short, loading=(LoadCost(cache="ram", workers=0, prefetch=2),)), plan, 1000, 10**9)
    slow = replace(short, steps=(replace(way, seconds=5.0),))  # too few of its steps would fit into the time
    assert _still_holds(slow, plan, 1000, 10**9)
