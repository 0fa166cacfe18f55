"""Bugs planted in a detector's loss, targets and evaluation are named before training; sound detectors pass."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from goodfit.api.decide import decide
from goodfit.api.demo import write_scenes
from goodfit.api.detect_parts import assemble_detector
from goodfit.api.detect_rehearse import rehearse_detector
from goodfit.api.prepare import read_and_audit
from goodfit.config.parse import parse_request
from goodfit.core.journal import Journal
from goodfit.models.detection.fcos import Fcos
from goodfit.planning.detection_checks import check_found
from goodfit.planning.module_rehearsal import definite_checks
from goodfit.tasks.detect import DetectTask
from plants import Wrapped


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, masks=False, num=40)
    return folder


def parts_of(folder, **asked):
    given = {
        "data": str(folder),
        "batch": 8,
        "model": "fcos/resnet10t",
        "imgsz": 128,
        "pretrained": "false",
        "epochs": 5,
        "measure": False,
    }
    request = parse_request({**given, **asked})
    audited = read_and_audit(request, Journal(None))
    return assemble_detector(decide(request, audited, Journal(None)), audited.index)


def alarms(parts):
    """The checks that fail, without the short trainings and the tracing."""
    few, context = parts.few_samples(), dataclasses.replace(parts.context, task=parts.task.dense())
    num, model = len(few.samples), parts.state.model
    checks = definite_checks(model, context, parts.state.progress.schedule, parts.optimizer_for, few)
    data = parts.context.transform.evaluate(parts.context.device.move(few.data))
    checks.append(check_found(copy.deepcopy(model), parts.context, data, num))
    return {check.name for check in checks if not check.passed}


def with_task(parts, task):
    return dataclasses.replace(parts, task=task, context=dataclasses.replace(parts.context, task=task))


def with_model(parts, wrap):
    parts.state.model = wrap(parts.state.model)
    return parts


class Around(Wrapped):
    """A network with something wrong around it, whose own parts are still seen."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)


class Detached(Around):
    """The backbone gets no gradient."""

    def forward(self, images):
        levels = [level.detach() for level in self.net.pyramid(images)]
        made = self.net.head(levels)
        return {
            "classes": made["cls_logits"],
            "sides": made["bbox_regression"],
            "centre": made["bbox_ctrness"].squeeze(2),
        }


class LooksRound(Around):
    """Every image sees the mean of its batch."""

    def forward(self, images):
        return self.net(images - images.mean(dim=0, keepdim=True))


class NeverEvaluates(Around):
    def eval(self):
        return self


class ShiftedClasses(Fcos):
    def terms(self, model, outputs, boxes, classes, shape):
        moved = torch.where(classes >= 0, (classes + 1) % outputs["classes"].shape[2], classes)
        return super().terms(model, outputs, boxes, moved, shape)


class SwappedSides(Fcos):
    def terms(self, model, outputs, boxes, classes, shape):
        return super().terms(model, outputs, boxes[..., [1, 0, 3, 2]], classes, shape)


class CornersAsSizes(Fcos):
    def terms(self, model, outputs, boxes, classes, shape):
        return super().terms(
            model, outputs, torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1), classes, shape
        )


class Means(Fcos):
    def terms(self, model, outputs, boxes, classes, shape):
        made = super().terms(model, outputs, boxes, classes, shape)
        return {name: (total / count.clamp(min=1), 1) for name, (total, count) in made.items()}


def of_family(kind):
    def plant(parts):
        made = kind(strides=parts.task.family.strides)
        return with_task(parts, DetectTask(parts.task.class_names, made))

    return plant


BUGS = {
    "classes counted from another number": (of_family(ShiftedClasses), "loss and evaluation agree"),
    "x and y changed": (of_family(SwappedSides), "loss and evaluation agree"),
    "corners taken for sizes": (of_family(CornersAsSizes), "loss and evaluation agree"),
    "means for sums": (of_family(Means), "loss sums"),
    "backbone detached": (lambda p: with_model(p, Detached), "gradients"),
    "never in evaluation mode": (lambda p: with_model(p, NeverEvaluates), "evaluation mode"),
    "images seen together": (lambda p: with_model(p, LooksRound), "samples apart"),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_named(name, scenes):
    plant, meant = BUGS[name]
    assert meant in alarms(plant(parts_of(scenes)))


@pytest.mark.parametrize("model", ["fcos", "retinanet", "ssdlite"])
def test_sound_families_pass(model, scenes):
    assert alarms(parts_of(scenes, model=f"{model}/resnet10t")) == set()


@pytest.mark.data
@pytest.mark.parametrize("folder", ["detect/bccd_voc", "detect/facemask_coco", "segment/coco128/object_detection"])
def test_real_data_passes(real_data, folder):
    assert alarms(parts_of(real_data / folder, imgsz=256)) == set()


def test_a_sound_detector_passes_the_whole_rehearsal(scenes, tmp_path):
    parts = parts_of(scenes, mosaic=0.5, scale=0.5, multi_scale=0.5)
    rehearse_detector(parts, Journal(None), tmp_path)
    text = (tmp_path / "rehearsal.txt").read_text()
    assert "loss and evaluation agree" in text and "AP50" in text


def test_tiny_objects_are_no_alarm(tmp_path):
    """Of 4 pixels: most lie between the places of the finest level, and no loss can find them."""
    folder = tmp_path / "scenes"
    write_scenes(folder, masks=False, num=30)
    notes = json.loads((folder / "annotations.json").read_text())
    for entry in notes["annotations"]:
        entry["bbox"] = [*entry["bbox"][:2], 4, 4]
    (folder / "annotations.json").write_text(json.dumps(notes))
    parts = parts_of(folder)
    few = parts.few_samples()
    data = parts.context.transform.evaluate(parts.context.device.move(few.data))
    check = check_found(copy.deepcopy(parts.state.model), parts.context, data, len(few.samples))
    assert check.passed and "not asked" in check.evidence


def test_long_thin_objects_are_no_alarm(scenes, tmp_path):
    """Of 13 to 1: the places of the level that they belong to lie 16 pixels apart, and each object between two rows of them."""
    folder = tmp_path / "thin"
    folder.mkdir()
    (folder / "images").symlink_to(scenes / "images")
    notes = json.loads((scenes / "annotations.json").read_text())
    notes["annotations"] = [
        a | {"bbox": [0, 16 * (a["id"] % 8) + 3, 128, 10], "area": 1280} for a in notes["annotations"]
    ]
    (folder / "annotations.json").write_text(json.dumps(notes))
    assert alarms(parts_of(folder)) == set()
    parts = parts_of(folder)
    library = DetectTask(parts.task.class_names, Fcos(strides=parts.task.family.strides, thin=False))
    assert alarms(with_task(parts, library)) == {"loss and evaluation agree"}
