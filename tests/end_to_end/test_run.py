"""A whole run, from a folder to a bundle: what lies in its folder, what Python and the command line return."""

from __future__ import annotations

import csv
import html
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import goodfit
from browser import check_page
from goodfit.api.finish import open_test
from goodfit.api.train import reopen
from goodfit.core.journal import Journal
from goodfit.engine.checkpoint import Checkpoints
from goodfit.runtime import Predictor
from pictures import REPOSITORY, draw, folder_hash


def test_the_run_learned(finished):
    test = finished.metrics["test"]
    assert test["accuracy"] > 0.9 and test["n"] == 27 and test["low"] < test["accuracy"] < test["high"] + 1e-9
    assert finished.result["baselines"]["majority"] == pytest.approx(1 / 3, abs=0.01)
    losses = [e["train_loss"] for e in finished.events if e["event"] == "epoch"]
    assert losses[-1] < 0.5 * losses[0]


def test_the_folder_holds_the_record(finished):
    path = finished.path
    for name in ("request.yaml", "plan.json", "audit.json", "split.csv", "events.jsonl", "metrics.csv", "test.json",
                 "report.html", "result.json", "plots/results.png", "plots/confusion_matrix.png"):  # fmt: skip
        assert (path / name).stat().st_size > 0, name
    rows = list(csv.DictReader((path / "metrics.csv").read_text().splitlines()))
    assert [int(r["epoch"]) for r in rows] == [1, 2, 3, 4, 5]
    assert finished.plan.epochs.source == "asked" and finished.plan.batch.value == 16
    assert {f["kind"] for f in finished.findings} == {"unreadable", "wrong_type"}
    events = {e["event"] for e in finished.events}
    assert {"run", "stage", "decision", "step", "epoch", "checkpoint", "test", "done"} <= events
    assert all(float(r["samples_per_second"]) > 0 for r in rows)
    assert not list(path.rglob(".tmp-*"))


def test_its_pages_are_read_in_a_browser(finished, tmp_path):
    assert check_page(finished.path / "report.html", tmp_path / "profile") >= 3
    check_page(finished.path / "audit.html", tmp_path / "profile")


def test_the_time_of_every_epoch_is_accounted_for(finished):
    """Its parts add up to the time between two epoch events, as the events' own stamps have it, and to what is reported."""
    parts = ("data", "step", "host", "validation", "saving", "other")
    epochs = [e for e in finished.events if e["event"] == "epoch"]
    gaps = []
    for before, after in itertools.pairwise(epochs):
        assert sum(after[f"{part}_seconds"] for part in parts) == pytest.approx(after["seconds"], abs=1e-6)
        gaps.append(abs(after["seconds"] - (after["time"] - before["time"])))
        assert after["step_seconds"] > 0.3 * after["seconds"] and after["saving_seconds"] > 0
        training = sum(after[f"{part}_seconds"] for part in ("data", "step", "host"))
        assert training == pytest.approx(after["train_seconds"], rel=0.05, abs=0.02)
    assert sorted(gaps)[1] < 0.02, gaps  # a pause of the machine between clock and stamp spoils two of the four
    found = finished.result["utilisation"]
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-3) and found["lever"]
    train = finished.result["seconds"]["train"]
    assert sum(found["seconds"].values()) == pytest.approx(train, rel=0.1, abs=0.1)
    assert found["lever"] in html.unescape((finished.path / "report.html").read_text())


def test_what_was_projected_is_compared_with_what_was_taken(finished):
    projected, achieved = (finished.result["projection"][name] for name in ("projected", "achieved"))
    assert projected["epochs"] == achieved["epochs"] == 5
    assert 0.3 < achieved["epoch_seconds"] / projected["epoch_seconds"] < 5
    assert 0.4 < achieved["kept"] / projected["kept"] <= 1 and projected["disk"] >= projected["kept"]
    stages = [e["name"] for e in finished.events if e["event"] == "stage"]
    assert stages.index("rehearse") < stages.index("projection") < stages.index("train") < stages.index("time")


def test_the_bundle_predicts_what_the_final_test_saw(finished):
    """Every test image through the bundle gives the very accuracy of test.json."""
    rows = [r for r in csv.DictReader((finished.path / "split.csv").read_text().splitlines()) if r["split"] == "test"]
    root = Path(json.loads((finished.path / "run.json").read_text())["root"])
    found = finished.predict([root / r["path"] for r in rows])
    hits = sum(f["label"] == r["label"] for f, r in zip(found, rows, strict=True))
    assert hits / len(rows) == pytest.approx(finished.metrics["test"]["accuracy"], abs=1e-12)
    for row in found:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4)


def test_training_accuracy_is_that_of_the_served_model_on_training_images(finished):
    """No accuracy is claimed while training goes on; at its end the bundle itself agrees with what is reported."""
    rows = [r for r in csv.DictReader((finished.path / "split.csv").read_text().splitlines()) if r["split"] == "train"]
    root = Path(json.loads((finished.path / "run.json").read_text())["root"])
    found = finished.predict([root / r["path"] for r in rows])
    hits = sum(p["label"] == r["path"].split("/")[0] for p, r in zip(found, rows, strict=True))
    train = finished.metrics["train"]
    assert train["n"] == len(rows) and set(train) == {"loss", "accuracy", "macro_f1", "n"}
    assert hits / len(rows) == pytest.approx(train["accuracy"], abs=1e-12)
    losses = [
        -math.log(max(1e-6, p["probabilities"][r["path"].split("/")[0]])) for p, r in zip(found, rows, strict=True)
    ]
    assert sum(losses) / len(losses) == pytest.approx(train["loss"], abs=1e-4)
    assert json.loads((finished.bundle / "metrics.json").read_text())["train"] == train
    assert f"(n = {len(rows)})" in (finished.path / "report.html").read_text()
    (told,) = [e["text"] for e in finished.events if e["event"] == "stage" and e["name"] == "gap"]
    assert told.startswith(f"train acc {100 * train['accuracy']:.1f} % on {len(rows)} training images")
    for epoch in (e for e in finished.events if e["event"] == "epoch"):
        assert [name for name in epoch if name.startswith("train")] == ["train_loss", "train_seconds"]


def test_the_bundle_is_complete_and_its_parity_was_measured(finished):
    card = json.loads((finished.bundle / "bundle.json").read_text())
    assert (
        0 <= card["parity"]["max_difference"] <= card["parity"]["tolerance"] and card["parity"]["num_files"] == 27 + 5
    )
    assert card["labels"] == ["class0", "class1", "class2"] and card["licence"].startswith("none")
    assert card["versions"]["torch"] == metadata.version("torch") and card["latency"]["p50_ms"] > 0
    names = {p.name for p in finished.bundle.iterdir()}
    assert names == {"model.safetensors", "model.onnx", "bundle.json", "plan.json", "metrics.json", "predict.py",
                     "manifest.json"}  # fmt: skip


def test_a_changed_bundle_is_refused(finished, tmp_path):
    import shutil

    copy = shutil.copytree(finished.bundle, tmp_path / "bundle")
    data = bytearray((copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx").write_bytes(data)
    with pytest.raises(goodfit.DataError, match="damaged"):
        Predictor(copy)
    with pytest.raises(goodfit.DataError, match="not a bundle"):
        Predictor(tmp_path)


def test_parity_refuses_a_wrong_export(finished):
    """The control: weights that differ a little from the exported ones are noticed."""
    from goodfit.api.assemble import assemble
    from goodfit.api.train import reopen
    from goodfit.core.errors import ExportError
    from goodfit.core.journal import Journal
    from goodfit.outcome.export import _WithNormalisation, check_parity

    parts = reopen(finished, Journal(None))
    assert parts.plan == finished.plan and assemble is not None
    network = parts.state.model
    network.load_state_dict(load_file(str(finished.bundle / "model.safetensors")))
    predictor = Predictor(finished.bundle)
    files = [(parts.index.file(int(r))).read_bytes() for r in parts.index.rows("val")[:4]]
    names = ["a", "b", "c", "d"]
    reference = _WithNormalisation(network, parts.preprocessing).eval()
    assert check_parity(predictor, reference, files, names)["num_files"] == 4
    with torch.no_grad():
        next(p for n, p in network.named_parameters() if n.endswith("fc.weight"))[0] *= 1.05
    with pytest.raises(ExportError, match="does not reproduce"):
        check_parity(predictor, reference, files, names)


def test_odd_files_through_the_bundle(finished, tmp_path):
    image = draw(77, 1, 48)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "turned.jpg", quality=97, exif=exif.tobytes())
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=97)
    image.convert("RGBA").save(tmp_path / "rgba.png")
    image.resize((5000, 5000)).save(tmp_path / "large.jpg")
    (tmp_path / "broken.png").write_bytes(b"x")
    rows = goodfit.predict(finished.path, [tmp_path])
    found = {Path(r["image"]).name: r for r in rows}
    assert {found[n]["label"] for n in ("turned.jpg", "grey.png", "cmyk.jpg", "rgba.png", "large.jpg")} == {"class1"}
    assert "not an image" in found["broken.png"]["error"]


def test_predict_needs_only_numpy_pillow_and_onnxruntime(finished, bars, tmp_path):
    """In an environment that sees those three packages and goodfit alone, by command and by the bundle's own script."""
    site = tmp_path / "site"
    site.mkdir()
    for name in ("numpy", "pillow", "onnxruntime"):
        for file in metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    for extra in ("flatbuffers", "google", "packaging"):  # what onnxruntime itself requires
        found = Path(np.__file__).parent.parent / extra
        if found.exists():
            (site / extra).symlink_to(found)
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{site}:{REPOSITORY / 'src'}"}
    image = str(next((bars / "class2").glob("*.png")))
    check = "import importlib.util as u; print([m for m in ('torch','timm','yaml','rich','psutil') if u.find_spec(m)])"
    seen = subprocess.run([python, "-c", check], env=environment, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]", "the environment is not as bare as it should be"
    for words in (
        ["-m", "goodfit", "predict", str(finished.bundle), image],
        [str(finished.bundle / "predict.py"), image],
    ):
        done = subprocess.run([python, *words], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "class2" in done.stdout


def test_resuming_a_finished_run_changes_nothing(finished):
    before = folder_hash(finished.path)
    again = goodfit.resume(finished.path)
    assert again.result == finished.result and folder_hash(finished.path) == before


def test_a_test_file_that_changed_is_noticed_before_the_look(finished, bars, tmp_path):
    parts = reopen(finished, Journal(None))
    shutil.copytree(bars, tmp_path / "data")
    parts = replace(parts, index=replace(parts.index, root=tmp_path / "data"))
    _, rows = open_test(finished, parts)
    parts.index.file(int(rows[0])).write_bytes(b"another picture")
    with pytest.raises(goodfit.DataError, match="1 files of the test split changed"):
        open_test(finished, parts)


def test_resuming_with_another_torch_is_said(finished, tmp_path, monkeypatch):
    from goodfit.api import train

    monkeypatch.setattr(train, "versions", lambda: {"torch": "99.0", "python": "3.99"})
    journal = Journal(tmp_path / "events.jsonl")
    parts = reopen(finished, Journal(None))
    train.continue_from(
        parts, Checkpoints(finished.path / "checkpoints", parts.hashes), journal, finished.path / "events.jsonl"
    )
    journal.close()
    (said,) = [
        e["text"]
        for e in map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
        if e["event"] == "stage"
    ]
    assert f"torch {torch.__version__}, now 99.0" in said and "machine" not in said


def test_predictions_come_as_they_are_made(finished, bars, monkeypatch, tmp_path):
    from goodfit.api.predict import stream_predictions

    read = []
    plain = Predictor._read
    monkeypatch.setattr(Predictor, "_read", lambda self, source: read.append(source) or plain(self, source))
    files = sorted((bars / "class1").glob("*.png"))
    rows = stream_predictions(finished.path, files, out=tmp_path / "out")
    first = next(rows)
    assert len(read) == 32 < len(files) and first["image"] == str(files[0])
    assert 1 + len(list(rows)) == len(files) == len(json.loads((tmp_path / "out" / "predictions.json").read_text()))


def test_data_is_never_changed(finished, bars):
    assert len(list(bars.rglob("*"))) == 3 + 180 + 2
    draw(2001, 2).save(bars.parent / "again.png")
    assert (bars.parent / "again.png").read_bytes() == (bars / "class2" / "001.png").read_bytes()


def test_python_leaves_the_process_as_it_was(finished, bars, tmp_path):
    folder, threads, state = os.getcwd(), torch.get_num_threads(), torch.random.get_rng_state()
    goodfit.plan(bars)
    with pytest.raises(goodfit.RequestError):
        goodfit.train(bars, epoch=3)
    with pytest.raises(goodfit.RequestError, match="exists"):
        goodfit.train(bars, epochs=1, project=str(finished.path.parent), name=finished.path.name)
    assert os.getcwd() == folder and torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_two_runs_of_one_seed_are_equal_and_of_another_are_not_and_every_look_is_counted(bars, tmp_path):
    def run(**more):
        made = goodfit.train(
            bars, epochs=2, project=str(tmp_path), batch=16, rehearse=False, deterministic=True, **more
        )
        return made, (made.result["state_sha256"], made.result["weights_sha256"]), made.metrics["test"]["look"]

    first, hashes, look = run(seed=4)
    assert look == 1 and goodfit.test(first.path)["metrics"]["test"]["look"] == 2
    _, again, look = run(seed=4, cache="off")
    assert again == hashes and look == 3, "the same test split, looked at by another run"
    assert run(seed=5)[1][0] != hashes[0]


def test_a_pretrained_file_is_recognised_and_reported(bars, real_data, tmp_path):
    weights = real_data / "weights" / "mobilenetv2_100.safetensors"
    planned = goodfit.plan(bars, pretrained=str(weights))
    assert planned.plan.model.value == "mobilenetv2_100" and planned.plan.pretrained.value == "file"
    assert planned.plan.head_lr.value > planned.plan.lr.value
    with pytest.raises(goodfit.WeightsError, match="do not fit"):
        goodfit.train(bars, pretrained=str(weights), model="resnet18", project=str(tmp_path), rehearse=False)


def test_weights_without_a_network(bars):
    """What was asked for and cannot be had is an error that says what to do; what was not asked for is a decision."""
    code = (
        "import os; os.environ['HF_HUB_OFFLINE'] = '1'; os.environ['HF_HOME'] = '/nonexistent'; import sys, goodfit\n"
        "try: goodfit.plan(sys.argv[1], model='resnet18', pretrained=True)\n"
        "except goodfit.WeightsError as error: print(error)\n"
        "p = goodfit.plan(sys.argv[1], model='resnet18').plan.pretrained; print(p.value, p.reason)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bars)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pretrained=FILE.safetensors" in done.stdout and "pretrained=false" in done.stdout
    assert "false pictures of 24 px" in done.stdout


def test_pickle_is_never_read(bars, tmp_path):
    import pickle

    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'marker'}",))

    for name in ("evil.pt", "evil.bin", "evil.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload()))
        with pytest.raises(goodfit.WeightsError):
            goodfit.plan(bars, model="resnet10t", pretrained=str(tmp_path / name))
    assert not (tmp_path / "marker").exists()
