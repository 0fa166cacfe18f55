"""What the plan of a detector decides by rule or as measured: the model, the batch, how many objects are reported."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from goodfit.api import detect_decide
from goodfit.api.demo import write_scenes
from goodfit.api.detect_parts import assemble_detector
from goodfit.api.prepare import read_and_audit
from goodfit.config.detect import detector_batches, resolve_detect
from goodfit.config.detector import COCO_DETECTORS, coco_detector, resolve_detector
from goodfit.config.facts import FirstStep
from goodfit.config.measured import BatchCost, Measured
from goodfit.config.parse import parse_request
from goodfit.config.plan import Plan
from goodfit.config.request import TrainRequest
from goodfit.config.resolve import data_decisions, resolve
from goodfit.config.time_rules import few_passes
from goodfit.core.errors import RequestError
from goodfit.core.journal import Journal
from goodfit.data.loader import row_of
from goodfit.data.objects import repeat_factors
from plans import facts_of, plan_of
from tiny_detr import write_tiny


def facts(*, cuda=False, batches=(), memory=10**9, **data):
    made = facts_of(cuda=cuda)
    measured = Measured(batch=8, batches=tuple(batches), memory=memory) if batches else None
    return replace(made, data=replace(made.data, task="detect", object_side=0.1, **data), measured=measured,
                   model=replace(made.model, name="fcos/resnet18", stride=32, size_step=32))  # fmt: skip


def plan(given, **asked) -> Plan:
    request = TrainRequest(**asked)
    name, pretrained = resolve_detector(request, given.data, given.machine)
    decided = {**data_decisions(request, given.data, None), "model": replace(name, value="fcos/resnet18"), "pretrained": pretrained,
               "weights": replace(name, value="")}  # fmt: skip
    decided["task"] = replace(name, value="detect")
    return resolve_detect(request, given, decided)


def costs(**seconds):
    """Sizes as b4=0.5: seconds a step; their memory is their size in units of 10 MB."""
    return [BatchCost(batch=int(k[1:]), seconds=s, memory=10**7 * int(k[1:])) for k, s in seconds.items()]


def test_the_batch_is_the_usual_one_unless_a_larger_pays():
    flat = costs(b2=0.2, b4=0.4, b8=0.8, b16=1.6)
    found = plan(facts(batches=flat)).batch
    assert (found.value, found.source) == (8, "measured") and "100 % of the best rate" in found.reason
    grows = costs(b2=0.5, b4=0.6, b8=0.8, b16=1.0, b32=1.95)
    assert plan(facts(batches=grows)).batch.value == 16
    asked = plan(facts(batches=costs(b8=1.0, b16=1.2)), batch=8).batch
    assert asked.value == 8 and "16 would be 1.7 times as fast" in asked.reason


def test_a_batch_that_does_not_fit_is_made_in_parts():
    found = plan(facts(batches=costs(b2=0.2, b4=0.4, b8=0.8), memory=5 * 10**7))
    assert (found.batch.value, found.accumulate.value, found.accumulate.source) == (8, 2, "measured")
    tight = [*costs(b2=0.2), BatchCost(batch=4, problem="out of memory")]
    assert plan(facts(batches=tight)).accumulate.value == 4
    assert plan(facts(batches=costs(b2=0.2), memory=10**6)).accumulate.value == 8  # not even two: one by one
    assert plan(facts(batches=[BatchCost(batch=2, problem="no such operation")])).accumulate.value == 1
    assert (
        plan(facts(batches=costs(b2=0.2, b4=0.4, b8=0.8)), batch=16).accumulate.value == 1
    )  # 16 was not tried: no reason to doubt it


def test_batches_to_measure_leave_twenty_updates_an_epoch():
    data = facts().data
    assert detector_batches(replace(data, num_train=204), 8) == (2, 4, 8)
    assert detector_batches(replace(data, num_train=5000), 8) == (2, 4, 8, 16, 32, 64)
    assert detector_batches(replace(data, num_train=3), 3) == (1, 3)


def test_so_many_objects_are_reported():
    assert plan(facts(most_objects=60)).max_det.value == 100
    crowded = plan(facts(most_objects=2000)).max_det
    assert crowded.value == 3000 and "2,000" in crowded.reason
    assert plan(facts(most_objects=2000), max_det=50).max_det.value == 50
    few = facts(most_objects=500)
    transformer = plan(replace(few, model=replace(few.model, most_places=300)))
    assert transformer.max_det.value == 300 and "gives 300 answers" in transformer.max_det.reason


def test_a_time_sets_the_size_of_the_input_and_leaves_out_a_rehearsal_that_would_take_most_of_it():
    """Small objects ask for 640 pixels; at 4 s for a step of 8 pictures 120 s would hold one and a half passes over 94 pictures."""
    made = facts(num_train=94, median_side=640)
    made = replace(made, data=replace(made.data, object_side=0.019))
    slow = replace(made, first_step=FirstStep(640, 0.5))
    assert plan(made).imgsz.value == plan(slow).imgsz.value == 640  # there is no time to keep
    short = plan(slow, time=120.0)
    assert short.imgsz.value == 320 and "1.3 passes" in short.imgsz.reason and "5.1 at 320" in short.imgsz.reason
    assert not short.rehearse.value and "36 of the 120 s" in short.rehearse.reason
    assert short.imgsz.source == short.rehearse.source == "measured" and plan(made).imgsz.source == "rule"
    assert (
        plan(slow, time=120.0, imgsz=640, rehearse=True).imgsz.value == 640
        and plan(slow, time=120.0, rehearse=True).rehearse.value
    )
    assert "about 1.3 passes" in few_passes(plan(slow, time=120.0, imgsz=640), slow) and "time=24m would hold 15" in few_passes(plan(slow, time=120.0, imgsz=640), slow)  # fmt: skip
    assert few_passes(short, slow) == "" == few_passes(plan(made), made)
    between = plan(slow, time=600.0)
    assert 320 < between.imgsz.value < 640 and between.rehearse.value
    assert plan(slow, time=3600.0).imgsz.value == 640 and plan(slow, time=3600.0).rehearse.value


def test_the_input_may_be_larger_than_pictures_whose_objects_are_small():
    """Of 320 pixels, whose smaller objects have 5: at 640 they have 10."""
    small = facts(median_side=320)
    small = replace(small, data=replace(small.data, object_side=0.016))
    made = plan(small).imgsz
    assert made.value == 640 and "10 pixels of the input; pictures of 320 px, enlarged" in made.reason
    tiny = replace(small, data=replace(small.data, median_side=96))
    assert plan(tiny).imgsz.value == 192, "twice their side at most"
    large = replace(small, data=replace(small.data, object_side=0.2))
    assert plan(large).imgsz.value == 320 and "enlarged" not in plan(large).imgsz.reason


def test_grey_pictures_of_one_class_are_mirrored():
    assert plan(facts(grey_share=1.0)).flip.value == 0.0
    found = plan(facts(grey_share=1.0, num_classes=1)).flip
    assert found.value == 0.5 and "one class" in found.reason


def test_what_hangs_on_the_preset_is_decided_anew_with_another_preset():
    made = facts()

    def again(base, **asked):
        request = TrainRequest(**asked)
        name, pretrained = resolve_detector(request, made.data, made.machine)
        decided = {**data_decisions(request, made.data, None), "model": replace(name, value="fcos/resnet18"), "pretrained": pretrained,
                   "weights": replace(name, value=""), "task": replace(name, value="detect")}  # fmt: skip
        return resolve_detect(request, made, decided, base)

    plain, strong, off = plan(made), plan(made, augment="strong"), plan(made, augment="off")
    assert (plain.mosaic.value, strong.mosaic.value, off.flip.value) == (0.0, 0.5, 0.0)
    assert again(plain, augment="strong").mosaic.value == 0.5 and again(strong).mosaic.value == 0.5
    assert again(strong, augment="off").mosaic.value == again(strong, augment="off").flip.value == 0.0
    assert again(off, augment="standard").flip.value == 0.5 and again(off, augment="standard").close_augment.value > 0
    assert (
        plan(made, augment="off").close_augment.value
        == 0
        < plan(made, augment="off", multi_scale=0.3).close_augment.value
    )
    asked = plan(made, augment="off", flip=0.3)
    assert again(asked, augment="strong").flip.value == 0.3, "what was asked for then stays"
    assert plan_of(augment="off").flip.value == 0.0
    kept = resolve(TrainRequest(augment="standard"), facts_of(), plan_of(augment="strong"))
    assert kept.mixup.value == 0.0 and kept.policy.value == "off" and kept.balance == plan_of(augment="strong").balance


def test_pictures_of_rare_classes_are_repeated_if_that_is_asked_for():
    found = plan(facts(smallest_class=10, largest_class=300)).balance
    assert found.value == "off" and "30.0 times" in found.reason
    assert plan(facts(), balance="sample").balance.value == "sample"
    with pytest.raises(RequestError, match="off and sample"):
        plan(facts(), balance="loss")


def test_a_transformer_is_tried_where_gpu_data_and_time_allow():
    def chosen(given, **asked):
        return coco_detector(TrainRequest(**asked), given.data, given.machine)

    gpu = facts(cuda=True)
    assert chosen(gpu)[0] == COCO_DETECTORS[1] and chosen(gpu, time=600.0)[0] == COCO_DETECTORS[0]
    assert chosen(facts()) == ("", "on a GPU, a transformer pretrained on COCO would be tried")
    assert chosen(facts(cuda=True, num_train=500))[0] == "" and chosen(facts(cuda=True, median_side=96)) == ("", "")
    crowded = chosen(facts(cuda=True, most_objects=200))
    assert (
        crowded[0] == ""
        and "too many for the 300 answers" in crowded[1]
        and chosen(facts(cuda=True, most_objects=150))[0]
    )
    assert chosen(gpu, model="fcos") == chosen(gpu, pretrained="false") == ("", "")


def test_a_transformer_that_the_plan_cannot_take_leaves_its_place(tmp_path, monkeypatch):
    """Nobody asked for it: what else was asked for, and what its input is too small for, must not stop the run."""
    pytest.importorskip("transformers", reason="the extra detr is not installed")
    folder = write_tiny(tmp_path / "tiny", "d_fine", labels=["cat", "no"])
    write_scenes(tmp_path / "data", masks=False, num=40)
    monkeypatch.setattr(detect_decide, "coco_detector", lambda *_: (str(folder), "because"))
    journal = Journal(None)

    def planned(**asked):
        request = parse_request({"data": str(tmp_path / "data"), "measure": False, "imgsz": 96, **asked})
        return detect_decide.decide_detector(request, read_and_audit(request, journal), journal, None)

    found = planned(layer_decay=0.8).model
    assert found.value.startswith("fcos/") and "no known order" in found.reason
    with pytest.raises(RequestError, match="does not fit"):
        planned(batch=5000)  # of no detector
    with pytest.raises(RequestError, match="needs the batch to be measured"):
        planned(batch="0.5")


def test_rare_classes_repeat_their_pictures(tmp_path):
    write_scenes(tmp_path / "data", masks=False, num=40)
    request = parse_request(
        {"data": str(tmp_path / "data"), "balance": "sample", "measure": False, "pretrained": "false"}
    )
    audited = read_and_audit(request, Journal(None))
    index, rows = audited.index, audited.index.rows("train")
    objects = index.objects
    shown = [set(objects.classes[(objects.rows == r) & objects.kept].tolist()) for r in rows]
    counts = {c: sum(c in s for s in shown) for c in range(len(index.class_names))}
    wanted = [min(10.0, max([(max(counts.values()) / counts[c]) ** 0.5 for c in s], default=1.0)) for s in shown]
    found = repeat_factors(index, rows)
    assert found == pytest.approx(wanted) and found.max() > 1.2 > found.min()
    parts = assemble_detector(detect_decide.decide_detector(request, audited, Journal(None), None), index)
    samples = np.concatenate([m.samples for group in parts.train.groups(0, 0, 1) for m in group])
    assert len(samples) == parts.train.steps_per_epoch * parts.train.batch and len(np.unique(row_of(samples))) < len(
        samples
    )


@pytest.mark.parametrize("there", [True, False])
def test_the_transformer_is_taken_if_it_can_be_had(there, tmp_path, monkeypatch):
    """Its place is a folder here, as the hub cannot be reached; without it the rule's detector is planned, and the reason says why."""
    pytest.importorskip("transformers", reason="the extra detr is not installed")
    folder = write_tiny(tmp_path / "tiny", "d_fine", labels=["cat", "no"]) if there else tmp_path / "none"
    monkeypatch.setattr(detect_decide, "coco_detector", lambda *_: (str(folder), "because"))
    write_scenes(tmp_path / "data", masks=False, num=40)
    request = parse_request({"data": str(tmp_path / "data"), "measure": False, "imgsz": 96})
    journal = Journal(None)
    found = detect_decide.decide_detector(request, read_and_audit(request, journal), journal, None)
    assert found.model.value.startswith("detr/" if there else "fcos/")
    assert found.model.source == "rule"
    assert (found.model.reason == "because") if there else ("cannot be had" in found.model.reason)


def test_classifiers_refuse_what_is_for_detectors():
    with pytest.raises(RequestError, match="max_det"):
        plan_of(max_det=10)
