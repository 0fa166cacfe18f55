"""Detection and segmentation from a folder to a bundle: started by the path alone, stopped and resumed to the same hashes, served."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import goodfit
from browser import check_page
from goodfit.api.assemble import execution
from goodfit.api.decide import decide
from goodfit.api.demo import write_scenes
from goodfit.api.detect_parts import assemble_detector
from goodfit.api.detect_rehearse import _check_latency
from goodfit.api.prepare import read_and_audit
from goodfit.config.parse import parse_request
from goodfit.core.errors import ExportError, RequestError, Stopped
from goodfit.core.journal import Journal
from goodfit.engine.checkpoint import Checkpoints, restore, take_snapshot, tensors_sha256
from goodfit.engine.evaluate import evaluate
from goodfit.engine.loop import fit
from goodfit.engine.state import copy_buffers
from goodfit.engine.step import train_step
from goodfit.outcome.export import NotExportable
from goodfit.outcome.torch_predictor import TorchPredictor, check_torch_bundle
from goodfit.planning.rehearsal import Rehearsal, RehearsalError
from goodfit.runtime import Predictor
from outcomes import only_hashes
from tiny_detr import write_tiny

SMALL = {"model": "fcos/resnet10t", "pretrained": "false", "batch": 8, "measure": False, "imgsz": 96}
WORDS = ("model=fcos/resnet10t", "pretrained=false", "epochs=2", "batch=6", "accumulate=4", "mosaic=0.5", "scale=0.4", "multi_scale=0.4", "imgsz=96",
         "deterministic=true", "rehearse=false", "json=true")  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Sixty scenes of digits with boxes, of which one has no object and one picture is cut off."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, masks=False, num=60)
    notes = json.loads((folder / "annotations.json").read_text())
    notes["annotations"] = [a for a in notes["annotations"] if a["image_id"] != 5]
    (folder / "annotations.json").write_text(json.dumps(notes))
    cut = folder / "images" / "0009.png"
    cut.write_bytes(cut.read_bytes()[:400])
    return folder


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "masked"
    write_scenes(folder, masks=True, num=40)
    return folder


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory) -> goodfit.Run:
    return goodfit.train(scenes, project=str(tmp_path_factory.mktemp("runs")), epochs=2, max_bad=0.1, **SMALL)


def test_a_detector_is_trained_tested_and_bundled(finished):
    result, plan = finished.result, finished.plan
    assert result["task"] == plan.task.value == "detect" and plan.monitor.value == "ap"
    test = result["metrics"]["test"]
    assert set(test) >= {"n", "low", "high", "look", "ap", "ap50", "ap50_low", "ap50_high"}
    assert 0 <= test["ap50_low"] <= test["ap50"] <= test["ap50_high"] <= 1
    rows = json.loads((finished.path / "test.json").read_text())["per_class"]
    assert not any(row["precision"] == 1 and row["recall"] == 0 for row in rows)  # of nothing there is no precision
    assert 0 <= result["baselines"]["constant"] < 0.3 and plan.max_det.value == 100
    assert result["steps"] > 0 and result["epochs"] == 2
    card = json.loads((finished.bundle / "bundle.json").read_text())
    assert card["parity"]["num_files"] > 5 and 0 < card["threshold"] < 1
    report = (finished.path / "report.html").read_text()
    assert "There and found" in report and "False alarms" in report and "label_smoothing" not in report
    for name in ("train_batch", "val_batch", "found", "confusion_matrix", "confidence", "results", "lr"):
        with Image.open(finished.path / "plots" / f"{name}.png") as picture:
            assert picture.size[0] > 200, name
    assert (finished.path / "rehearsal.txt").read_text().count("ok ") >= 8
    assert {f["kind"] for f in finished.findings} >= {"truncated"}


def test_the_report_is_read_in_a_browser(finished, tmp_path):
    assert check_page(finished.path / "report.html", tmp_path / "profile") >= 4
    check_page(finished.path / "audit.html", tmp_path / "profile")


def test_a_network_that_does_not_become_onnx_after_training_is_served_by_torch(finished, tmp_path, monkeypatch):
    """As where its rehearsal, which would have said so before, was left out."""
    run = tmp_path / "run"
    shutil.copytree(finished.path, run, symlinks=True)
    shutil.rmtree(run / "bundle")
    for name in ("result.json", "report.html"):
        (run / name).unlink()

    def refuse(*_, **__):
        raise NotExportable("The network cannot be exported to ONNX: it is not in the mood.")

    monkeypatch.setattr("goodfit.outcome.detector_export.write_onnx", refuse)
    again = goodfit.resume(run)
    assert (
        json.loads((again.bundle / "bundle.json").read_text())["needs"] == "torch" and again.result["status"] == "done"
    )
    (told,) = [
        e["text"] for e in again.events if e["event"] == "stage" and e["name"] == "bundle" and "by torch" in e["text"]
    ]
    assert "not in the mood" in told and again.result["metrics"]["test"] == finished.result["metrics"]["test"]


def test_the_bundle_finds_in_pixels_of_the_picture(finished, scenes, tmp_path):
    predictor = Predictor(finished.bundle)
    files = [scenes / "images" / f"{n:04d}.png" for n in range(4)]
    rows = predictor.predict(files, threshold=0.02)
    assert [r["width"] for r in rows] == [128] * 4 and sum(len(r["objects"]) for r in rows) > 0
    for found in (f for r in rows for f in r["objects"]):
        left, top, right, bottom = found["box"]
        assert 0 <= left < right <= 128 and 0 <= top < bottom <= 128 and found["score"] >= 0.02
    large = tmp_path / "large.png"
    Image.open(files[0]).resize((512, 512), Image.Resampling.BICUBIC).save(large)
    again = predictor.predict([large], threshold=0.02)[0]
    mine, theirs = rows[0]["objects"][0], again["objects"][0]
    assert np.abs(np.array(theirs["box"]) / 4 - mine["box"]).max() < 6
    sure = predictor.predict(files, threshold=0.5)
    assert all(f["score"] >= 0.5 for r in sure for f in r["objects"])
    wanted = [[f for f in r["objects"] if f["score"] >= 0.5] for r in rows]
    assert [r["objects"] for r in sure] == wanted  # what is less sure removes nothing that is surer


def test_predictions_are_drawn_and_written_as_coco_and_yolo(finished, scenes, tmp_path):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "goodfit", "predict", str(finished.path), str(scenes / "images" / "0000.png"), str(scenes / "images" / "0009.png"),
             f"out={out}", "threshold=0.02", "json=true"]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["num_failed"] == 1
    objects = told["predictions"][0]["objects"]
    coco = json.loads((out / "coco.json").read_text())
    assert len(coco) == len(objects) > 0 and coco[0]["image_id"] == 0
    x, y, w, h = coco[0]["bbox"]
    assert np.abs(np.array([x, y, x + w, y + h]) - objects[0]["box"]).max() < 0.02
    lines = (out / "labels" / "0000.txt").read_text().splitlines()
    number, *shares = lines[0].split()
    assert told["predictions"][0]["objects"][0]["label"] == Predictor(finished.bundle).labels[int(number)]
    assert abs(float(shares[0]) * 128 - (x + w / 2)) < 0.02
    written = json.loads((out / "predictions.json").read_text())
    assert written == told["predictions"]
    with Image.open(out / "pictures" / "0000.jpg") as picture:
        assert picture.size == (128, 128)
    assert not (out / "pictures" / "0009.jpg").exists()


def run(words, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "goodfit", *words], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.alone  # both cores: torch once had a gradient that two threads do not repeat
@pytest.mark.parametrize(
    "task", ["detect", *(pytest.param(task, marks=pytest.mark.soak) for task in ("transformer", "segment"))]
)
def test_killed_and_resumed_to_the_same_hashes(task, scenes, masked, tmp_path, monkeypatch):
    """A run that is killed on the way and resumed agrees with one that was not; the noise of D-FINE's queries too."""
    data = masked if task == "segment" else scenes
    more = ("max_bad=0.1",)
    words = [*WORDS, *more]
    if task == "transformer":
        pytest.importorskip("transformers", reason="the extra detr is not installed")
        folder = write_tiny(tmp_path / "tiny", "d_fine", labels=["7", "cat", "3"])
        words = [w for w in words if w.split("=")[0] not in ("model", "pretrained")] + [f"model=detr/{folder}"]
    if task == "segment":
        words = [w for w in words if w.split("=")[0] not in ("model", "batch", "epochs", "accumulate")]
        words += ["model=maskrcnn/resnet10t", "batch=4", "epochs=2", "accumulate=2"]
    with monkeypatch.context() as patch:  # in this process, without what comes after training
        only_hashes(patch)
        asked = dict(w.split("=", 1) for w in words if w != "json=true")
        whole = goodfit.train(data, project=str(tmp_path / "runs"), name="whole", **asked)
    process = subprocess.Popen([sys.executable, "-m", "goodfit", "train", str(data), *words, "name=cut", "workers=1"], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    events = tmp_path / "runs" / "cut" / "events.jsonl"
    while process.poll() is None and not (events.is_file() and '"event": "checkpoint"' in events.read_text()):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    again = run(["resume", "runs/cut", "workers=0", "json=true"], tmp_path)
    (went_on,) = [e["resumed_from"] for e in map(json.loads, events.read_text().splitlines()) if e.get("resumed_from")]
    assert went_on["step"] > 0  # not from the beginning
    assert again["state_sha256"] == whole["state_sha256"] and again["weights_sha256"] == whole["weights_sha256"]


def test_a_picture_with_two_thousand_boxes_and_one_with_none_are_learned_and_judged(scenes, tmp_path):
    """From the file to the step and the figures: so many objects may be reported as well."""
    folder = tmp_path / "crowded"
    folder.mkdir()
    (folder / "images").symlink_to(scenes / "images")
    notes = json.loads((scenes / "annotations.json").read_text())
    low = np.random.default_rng(0).integers(0, 120, (2000, 2))
    for number in (2, 3, 4):  # wherever the split puts them, training has one
        notes["annotations"] += [{"id": 10_000 * number + k, "image_id": number, "category_id": notes["categories"][0]["id"], "iscrowd": 0,
                                  "bbox": [int(x), int(y), 6, 6], "area": 36} for k, (x, y) in enumerate(low)]  # fmt: skip
    (folder / "annotations.json").write_text(json.dumps(notes))
    request = parse_request({"data": str(folder), "epochs": 1, "max_bad": 0.1, **SMALL})
    audited = read_and_audit(request, Journal(None))
    plan, index = decide(request, audited, Journal(None)), audited.index
    most = plan.max_det.value
    assert most > 2700 and "1,8" in plan.max_det.reason  # boxes that are there twice were left out
    parts = assemble_detector(plan, index)
    counts = np.bincount(index.objects.rows[index.objects.kept], minlength=len(index))
    crowded, empty = (
        int(parts.train.rows[k]) for k in (counts[parts.train.rows].argmax(), counts[parts.train.rows].argmin())
    )
    assert counts[crowded] > 1800 and counts[empty] <= 1
    with execution(plan):
        micro = parts.train.samples.micro_batch(0, np.array([crowded, empty]))
        record = train_step(parts.state, parts.context, [micro], 1.0, copy_buffers(parts.state.model))
        assert np.isfinite(float(record.loss)) and not bool(record.bad)
        meter = evaluate(parts.state.model, parts.eval_loader(np.array([crowded, empty])), task=parts.task, transform=parts.context.transform,
                         device=parts.context.device, ranks=parts.context.ranks)  # fmt: skip
    assert meter.most == most and 0 <= meter.compute()["ap50"] <= 1 and parts.task.selection.candidates == 3 * most


def test_a_network_too_slow_for_its_limit_is_refused_before_it_is_trained(scenes, tmp_path, monkeypatch):
    """Without the short trainings of the rehearsal, which `finished` passes."""
    monkeypatch.setattr("goodfit.api.detect_rehearse.rehearse_module", lambda *_, **__: Rehearsal((), 1.0))
    asked = {**SMALL, "max_bad": 0.1, "epochs": 1, "project": str(tmp_path)}
    with pytest.raises(RehearsalError) as caught:
        goodfit.train(scenes, **asked, latency="0.001ms")
    failed = [c for c in caught.value.checks if not c.passed]
    assert [c.name for c in failed] == ["latency"] and "the limit is 0.001 ms" in failed[0].evidence
    assert "resume RUN latency" in failed[0].meaning
    (folder,) = tmp_path.iterdir()
    assert (folder / "plan.json").is_file() and not (folder / "checkpoints").exists()


@pytest.mark.alone
def test_a_segmenter_stopped_in_mid_epoch_and_resumed_has_the_same_state(masked, tmp_path):
    """Masks through mosaic, copies and several input sizes, in micro-batches; with it two whole runs from one seed are equal."""
    asked = {"model": "maskrcnn/resnet10t", "pretrained": "false", "batch": 4, "accumulate": 2, "epochs": 2, "imgsz": 96, "mosaic": 0.5,
             "multi_scale": 0.4, "copy_paste": 0.5, "measure": False}  # fmt: skip
    request = parse_request({"data": str(masked), **asked})
    audited = read_and_audit(request, Journal(None))
    plan = decide(request, audited, Journal(None))

    class After:
        exit_code = 130

        def __init__(self, num=10**9):
            self.left = num

        def __call__(self):
            self.left -= 1
            return self.left < 0

    def run(name, stop):
        parts, checkpoints = assemble_detector(plan, audited.index), Checkpoints(tmp_path / name, {})
        if (snapshot := checkpoints.latest()) is not None:
            restore(parts.state, snapshot)
        with execution(plan):
            fit(parts.state, parts.context, parts.train, parts.val, settings=parts.settings, checkpoints=checkpoints, journal=Journal(None),
                stop=stop)  # fmt: skip
        return tensors_sha256(take_snapshot(parts.state).files)

    with pytest.raises(Stopped, match="Stopped at step 4"):
        run("cut", After(3))
    assert run("cut", After()) == run("whole", After())


def test_the_latency_of_what_torch_serves_is_checked_too(masked, monkeypatch):
    monkeypatch.setattr("goodfit.outcome.bundle.ROUNDS", 1)  # more guard against other work at that time
    asked = {
        "model": "maskrcnn/resnet10t",
        "pretrained": "false",
        "batch": 4,
        "imgsz": 96,
        "measure": False,
        "epochs": 1,
    }
    request = parse_request({"data": str(masked), **asked})
    audited = read_and_audit(request, Journal(None))
    plan = decide(request, audited, Journal(None))
    slow = assemble_detector(plan.changed(latency=0.001), audited.index)
    assert not _check_latency(slow).passed and _check_latency(replace(slow, plan=plan.changed(latency=1e5))).passed


def test_masks_are_learned_and_served_by_torch(masked, tmp_path):
    made = goodfit.train(
        masked,
        project=str(tmp_path),
        epochs=1,
        rehearse=False,
        model="maskrcnn/resnet10t",
        pretrained="false",
        batch=4,
        measure=False,
        imgsz=96,
    )
    test = made.result["metrics"]["test"]
    assert set(test) >= {"mask_ap", "mask_ap50", "ap", "ap50"} and made.plan.monitor.value == "mask_ap"
    assert 0 <= test["mask_ap50_low"] <= test["mask_ap50_high"] <= 1
    told = json.loads((made.path / "test.json").read_text())
    assert {"mask_ap", "mask_ap50", "ap"} <= set(told["per_class"][0]) and len(told["mask_coco"]) == 12
    report = (made.path / "report.html").read_text()
    assert told["judged_by"] == "masks" and "AP small" in report
    assert "is served by torch" in report and "ONNX Runtime reproduces" not in report and "mask AP50" in report
    assert (made.path / "plots" / "found.png").is_file()
    card = json.loads((made.bundle / "bundle.json").read_text())
    assert card["latency"]["threads"] == 1 and card["selection"]["iou"] == 0.5 and "torchvision" in card["versions"]
    rows = goodfit.predict(made.bundle, [masked / "images" / "0000.png"], threshold=0.01, out=tmp_path / "out")
    assert rows[0]["width"] == 128 and rows[0]["objects"]
    coco = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert [c["segmentation"] for c in coco] == [f["mask"] for f in rows[0]["objects"]]
    ids = json.loads((tmp_path / "out" / "coco_ids.json").read_text())
    assert [i["file_name"] for i in ids["images"]] == [str(masked / "images" / "0000.png")]
    assert {c["id"]: c["name"] for c in ids["categories"]}[coco[0]["category_id"]] == rows[0]["objects"][0]["label"]
    assert (tmp_path / "out" / "pictures" / "0000.jpg").is_file()
    lines = (tmp_path / "out" / "labels" / "0000.txt").read_text().splitlines()
    assert lines and all(
        len(line.split()) % 2 == 0 and len(line.split()) > 6 for line in lines
    )  # class, points, confidence
    from goodfit.core.errors import DataError

    with pytest.raises(DataError, match="needs torch"):
        Predictor(made.bundle)
    served, files = TorchPredictor(made.bundle), [f.read_bytes() for f in sorted((masked / "images").glob("*.png"))[:5]]
    assert check_torch_bundle(served, served._session, files, ["a"] * 5)["num_objects"] > 0
    other = copy.deepcopy(served._session)
    with torch.no_grad():
        other.roi_heads.mask_predictor.mask_fcn_logits.bias.add_(0.01)  # boxes stay, masks do not
    with pytest.raises(ExportError, match="something else"):
        check_torch_bundle(served, other, files, ["a"] * 5)


@pytest.mark.parametrize(
    ("folder", "words", "task"),
    [
        ("detect/bccd_voc", {}, "detect"),
        ("detect/facemask_coco", {}, "detect"),
        ("segment/coco128/object_detection", {}, "detect"),
        ("segment/coco128/instance_segmentation", {}, "segment"),
        ("segment/nuclei_dsb2018", {}, "segment"),
    ],
)
@pytest.mark.data
def test_real_datasets_are_planned_by_their_path_alone(real_data, folder, words, task):
    planned = goodfit.plan(real_data / folder, measure=False, **words)
    assert planned.plan.task.value == task
    box = planned.plan.preprocessing.value
    assert box["fit"] == "letterbox" and box["width"] % 32 == box["height"] % 32 == 0


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"mixup": 0.2}, "one class each"),
        ({"model": "yolo/resnet18"}, "no family of detectors called yolo"),
        ({"model": "maskrcnn"}, "gives masks"),
        ({"model": "fcos/vit_tiny_patch16_224"}, "no maps at strides"),
        ({"monitor": "accuracy"}, "accuracy"),
        ({"batch": 5000}, "does not fit"),
    ],
)
def test_what_a_detector_cannot_do_is_refused(scenes, tmp_path, asked, says):
    with pytest.raises(RequestError, match=says):
        goodfit.train(
            scenes,
            project=str(tmp_path),
            **{"pretrained": "false", "max_bad": 0.1, "epochs": 1, "measure": False, **asked},
        )


def test_no_zoom_is_no_zoom(scenes):
    def zoom(**asked):
        request = parse_request({"data": str(scenes), "max_bad": 0.1, **SMALL, **asked})
        audited = read_and_audit(request, Journal(None))
        plan = decide(request, audited, Journal(None))
        return assemble_detector(plan, audited.index).train.samples.preset.zoom, plan.close_augment.value

    assert [zoom()[0], zoom(scale=0.0)[0], zoom(scale=0.2)[0]] == [0.4, 0.0, 0.2]
    assert zoom(augment="off") == (0.0, 0.0) and zoom(augment="off", mosaic=0.5) == (
        0.0,
        0.1,
    )  # mosaic ends before the run does


def test_a_plan_of_another_task_is_refused(finished, masked, tmp_path):
    with pytest.raises(RequestError, match="task detect"):
        goodfit.train(masked, project=str(tmp_path), plan=str(finished.path / "plan.json"))


def test_a_detector_is_trained_again_by_its_plan(finished, scenes, tmp_path):
    again = goodfit.plan(scenes, plan=str(finished.path / "plan.json"), max_bad=0.1).plan
    assert {n: d.value for n, d in again.decisions().items()} == {
        n: d.value for n, d in finished.plan.decisions().items()
    }


def test_a_detector_goes_on_from_another(finished, scenes, tmp_path):
    """All weights are taken; of the class layers, the rows of the classes that both know by name."""
    notes = json.loads((scenes / "annotations.json").read_text())
    kept = {c["id"]: c for c in notes["categories"] if c["name"] in "0123456"}
    kept[1]["name"] = "none of them"
    folder = tmp_path / "fewer"
    folder.mkdir()
    (folder / "images").symlink_to(scenes / "images")
    notes["categories"] = list(kept.values())
    notes["annotations"] = [a for a in notes["annotations"] if a["category_id"] in kept]
    (folder / "annotations.json").write_text(json.dumps(notes))
    request = parse_request(
        {
            "data": str(folder),
            "pretrained": str(finished.path),
            "max_bad": 0.1,
            "measure": False,
            "imgsz": 96,
            "freeze": "off",
        }
    )
    audited = read_and_audit(request, Journal(None))
    plan = decide(request, audited, Journal(None))
    assert plan.model.value == "fcos/resnet10t" and plan.weights.value.endswith("bundle/model.safetensors")
    parts = assemble_detector(plan, audited.index)
    assert parts.weights is not None and parts.weights.known == tuple("123456")
    assert plan.detector.value == finished.plan.detector.value
    larger = decide(replace(request, imgsz=256), audited, Journal(None))  # where a new detector would have more levels
    assert larger.detector.value == plan.detector.value
    with pytest.raises(RequestError, match="those of fcos/resnet10t, not of fcos/resnet18"):
        decide(replace(request, model="fcos/resnet18"), audited, Journal(None))
    old, new = load_file(str(finished.bundle / "model.safetensors")), parts.state.model.state_dict()
    layer = "head.classification_head.cls_logits.weight"
    names = list(audited.index.class_names)
    for digit in "123456":
        assert torch.equal(new[layer][names.index(digit)], old[layer][Predictor(finished.bundle).labels.index(digit)])
    assert not any(torch.equal(new[layer][names.index("none of them")], row) for row in old[layer])
    assert torch.equal(new["pyramid.fpn.inner_blocks.0.0.weight"], old["pyramid.fpn.inner_blocks.0.0.weight"])


def test_a_detector_of_transformers_goes_from_its_folder_to_a_bundle(scenes, tmp_path):
    """Its description and weights come from a folder as the hub has it; the finished bundle does not need that."""
    pytest.importorskip("transformers", reason="the extra detr is not installed")
    folder = write_tiny(tmp_path / "tiny", "rt_detr_v2", labels=["7", "cat", "3"])
    asked = {
        "pretrained": str(folder),
        "max_bad": 0.1,
        "measure": False,
        "imgsz": 96,
        "batch": 8,
        "project": str(tmp_path / "runs"),
    }
    made = goodfit.train(scenes, epochs=2, **asked)
    assert made.result["task"] == "detect" and made.plan.detector.value["config"]["model_type"] == "rt_detr_v2"
    assert made.plan.lr.value < made.plan.head_lr.value < 1.1e-4 and made.plan.clip.value == 0.1
    (said,) = [e["text"] for e in made.events if e["event"] == "stage" and e["name"] == "transfer"]
    assert "2 of 10 classes by name" in said
    card = json.loads((made.bundle / "bundle.json").read_text())
    assert card["fixed_batch"] and card["parity"]["num_files"] > 5 and card["selection"]["iou"] == 1.0
    assert card["needs"] == "torch"  # after two epochs all places rate alike, and another runtime would choose others
    for file in folder.iterdir():
        file.unlink()
    files = [scenes / "images" / f"{n:04d}.png" for n in range(3)]
    rows = goodfit.predict(made.bundle, files, threshold=0.0)
    assert all(len(row["objects"]) == 20 for row in rows) and made.plan.max_det.value == 20  # its queries
    request = parse_request({"data": str(scenes), **asked, "pretrained": str(made.path)})
    audited = read_and_audit(request, Journal(None))
    plan = decide(request, audited, Journal(None))
    assert plan.model.value == made.plan.model.value and plan.weights.value.endswith("bundle/model.safetensors")
    parts = assemble_detector(plan, audited.index)
    assert parts.weights is not None and len(parts.weights.known) == 10
    for asked in ({"layer_decay": 0.5}, {"freeze": "3"}, {"unfreeze": "gradual"}):
        with pytest.raises(RequestError, match="no known order"):
            decide(replace(request, **asked), audited, Journal(None))
