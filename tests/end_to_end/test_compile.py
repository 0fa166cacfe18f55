"""A compiled network trains, validates, saves, resumes and exports as an eager one does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

import goodfit
from goodfit.engine.device import compiler_problem

ASKED = {"model": "test_resnet", "imgsz": 32, "epochs": 3, "batch": 16, "dropout": 0.3, "precision": "fp32",
         "measure": False, "rehearse": False, "suspects": False, "seed": 1}  # fmt: skip


pytestmark = [pytest.mark.alone, pytest.mark.skipif(bool(compiler_problem()), reason="needs a C++ compiler")]


def test_a_compiled_run_is_the_eager_one(bars, tmp_path):
    eager = goodfit.train(bars, project=str(tmp_path), name="eager", compile="off", **ASKED)
    whole = goodfit.train(bars, project=str(tmp_path), name="whole", compile="default", **ASKED)
    assert whole.plan.compile.value == "default"
    losses = [[e["train_loss"] for e in run.events if e["event"] == "epoch"] for run in (eager, whole)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    # It really was compiled: other kernels round otherwise.
    assert whole.result["state_sha256"] != eager.result["state_sha256"]
    assert (whole.bundle / "model.onnx").is_file()


@pytest.mark.soak
def test_a_compiled_run_resumes_exactly(bars, tmp_path):
    whole = goodfit.train(bars, project=str(tmp_path), name="whole", compile="default", **ASKED)
    words = [f"{name}={value}" for name, value in ASKED.items()]
    process = subprocess.Popen([sys.executable, "-m", "goodfit", "train", str(bars), f"project={tmp_path}", "name=killed",
                                "compile=default", *words], stderr=subprocess.DEVNULL)  # fmt: skip
    events = tmp_path / "killed" / "events.jsonl"
    while process.poll() is None and not (events.is_file() and '"event": "epoch"' in events.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143, "it ended before it could be stopped"
    assert goodfit.resume(tmp_path / "killed").result["state_sha256"] == whole.result["state_sha256"]
