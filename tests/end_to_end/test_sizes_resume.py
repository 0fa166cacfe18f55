"""Stopped in the middle of an epoch of many input sizes, and gone on with: the same state to the last bit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from goodfit.api.assemble import assemble, execution
from goodfit.api.decide import decide
from goodfit.api.prepare import read_and_audit
from goodfit.api.rehearse import rehearsal_material
from goodfit.api.verdict import _pace
from goodfit.config.parse import parse_request
from goodfit.core.errors import Stopped
from goodfit.core.journal import Journal
from goodfit.engine.checkpoint import Checkpoints, restore, take_snapshot, tensors_sha256
from goodfit.engine.loop import fit
from goodfit.engine.stop import StopFlag

pytestmark = pytest.mark.alone

ASKED = {"model": "test_resnet", "imgsz": 64, "epochs": 4, "batch": 18, "accumulate": 4, "multi_scale": 0.5,
         "progressive": 0.5, "scale": 0.3, "close_augment": 0.25, "dropout": 0.3, "mixup": 0.2, "cutmix": 0.5,
         "pretrained": "false", "precision": "fp32", "measure": False, "augment": "standard", "cache": "ram"}  # fmt: skip


class StopAt(StopFlag):
    """Asks for a stop after so many questions, one of which the loop asks at every step and more in validation."""

    def __init__(self, state, step):
        super().__init__()
        self.state, self.step = state, step

    def __call__(self):
        return self.step is not None and self.state.progress.step >= self.step


@pytest.fixture(scope="module")
def prepared(bars):
    request = parse_request({"data": str(bars), **ASKED})
    audited = read_and_audit(request, Journal(None))
    return decide(request, audited, Journal(None)), audited.index


def seen_sides(parts):
    """Note the side of every batch that is trained on."""
    sides = []
    transform = parts.context.transform

    class Noting:
        def train(self, batch, **keys):
            sides.append((keys["step"], batch["image"].shape[-1]))
            return transform.train(batch, **keys)

        evaluate = staticmethod(transform.evaluate)

    return sides, replace(parts.context, transform=Noting())


def go(plan, index, folder, *, stop_at=None, workers=0):
    """Train from the newest checkpoint on. Returns the state's hash and the sides of the batches."""
    with execution(plan):
        parts = assemble(plan, index, workers=workers)
        parts.store.warm(1)
        checkpoints = Checkpoints(folder, {})
        if (snapshot := checkpoints.latest()) is not None:
            restore(parts.state, snapshot)
        sides, context = seen_sides(parts)
        fit(parts.state, context, parts.train, parts.val, settings=parts.settings, checkpoints=checkpoints,
            journal=Journal(None), stop=StopAt(parts.state, stop_at))  # fmt: skip
    return tensors_sha256(take_snapshot(parts.state).files), sides


def test_a_run_of_many_sizes_resumes_exactly(prepared, tmp_path):
    plan, index = prepared
    whole, sides = go(plan, index, tmp_path / "whole")
    steps = dict(sides)
    assert len(sides) == 4 * len(steps) and all(steps[step] == side for step, side in sides), "one size for each update"
    per_epoch = len(steps) // 4
    assert {s for step, s in steps.items() if step < per_epoch} == {32}
    assert {s for step, s in steps.items() if 2 * per_epoch <= step < 3 * per_epoch} >= {32, 96}
    assert {s for step, s in steps.items() if step >= 3 * per_epoch} == {64}, "the closing part"
    later = []
    for number, (stop_at, workers) in enumerate(((per_epoch + 2, 0), (2 * per_epoch + 3, 2), (None, 0))):
        if stop_at is not None:
            with pytest.raises(Stopped):
                go(plan, index, tmp_path / "cut", stop_at=stop_at, workers=workers)
        else:
            cut, later = go(plan, index, tmp_path / "cut", workers=number)
    assert cut == whole
    assert later == sides[4 * (2 * per_epoch + 3) :]
    other, _ = go(plan.changed(multi_scale=0.0), index, tmp_path / "other")
    assert other != whole, "the control: sizes make a difference"


def test_what_is_measured_before_the_run_sees_its_largest_input(prepared, tmp_path):
    plan, index = prepared
    with execution(plan):
        parts = assemble(plan, index)
        parts.store.warm(1)
        material = rehearsal_material(parts)
        assert [m.data["image"].shape[-1] for group in material.extremes for m in group] == [32] * 4 + [96] * 4
        assert {m.data["image"].shape[-1] for group in material.batches for m in group} == {64}
        sides, context = seen_sides(parts)

        class Run:
            path = tmp_path

        pace = _pace(Run, replace(parts, context=context), 1000.0)
    assert pace is not None and pace.step > 0
    assert sides[0][1] == 96 and {32, 64} <= {side for _, side in sides}
