"""Stopping and going on: real processes, real signals, and the very hashes of an uninterrupted run."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import goodfit
from outcomes import only_hashes

# Everything that draws random numbers or keeps state: dropout, mixup, cutmix, averaging, accumulation, uneven micro-batches.
EVERYTHING = ("model=resnet10t", "epochs=4", "batch=18", "accumulate=4", "dropout=0.3", "mixup=0.2", "cutmix=0.5", "ema=true", "swa=0.5",
              "deterministic=true", "rehearse=false", "suspects=false", "augment=standard", "flip=0.5", "json=true")  # fmt: skip


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """A run in a process group of its own, as a terminal starts it."""
    return subprocess.Popen([sys.executable, "-m", "goodfit", *words], cwd=cwd, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str], *, after: int = 0) -> None:
    """Until the journal shows, in lines after so many, a step event at or beyond `step`, or the end of an epoch there."""
    for _ in range(3000):
        events = (run / "events.jsonl").read_text() if (run / "events.jsonl").exists() else ""
        for line in events.splitlines()[after:]:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event["event"] in ("step", "epoch") and event["step"] >= step:
                return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("the run never came that far")


def last_json(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def uninterrupted(bars, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("whole")
    done = subprocess.run([sys.executable, "-m", "goodfit", "train", str(bars), "name=whole", *EVERYTHING], cwd=folder,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = folder / "runs" / "whole" / "metrics.csv"
    return {**last_json(done.stdout), "rows": list(csv.DictReader(metrics.read_text().splitlines()))}


@pytest.mark.parametrize(
    ("number", "code", "workers", "later"),
    [
        (signal.SIGINT, 130, 0, 2),
        (signal.SIGTERM, 143, 2, 1),
        pytest.param(signal.SIGINT, 130, 2, 0, marks=pytest.mark.soak),
    ],
)
def test_stopped_in_mid_epoch_and_resumed_with_other_workers(
    bars, uninterrupted, tmp_path, monkeypatch, number, code, workers, later
):
    process = start("train", str(bars), "name=cut", *EVERYTHING, f"workers={workers}", cwd=tmp_path)
    run = tmp_path / "runs" / "cut"
    wait_for_step(run, 9, process)
    os.killpg(process.pid, number)  # as Ctrl-C in a terminal does: loader processes get it too
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    told = last_json(out)
    assert (
        told["status"] == "stopped" and told["kept"].startswith("checkpoint step-") and "goodfit resume" in told["next"]
    )
    assert "Traceback" not in err
    stopped_at = json.loads((run / "checkpoints" / "last" / "state.json").read_text())["progress"]
    assert 0 < stopped_at["step"] < uninterrupted["steps"]
    only_hashes(monkeypatch)
    result = goodfit.resume(
        run, workers=later
    )  # in another process than the one that began it, as a killed run is below
    assert result["state_sha256"] == uninterrupted["state_sha256"]
    assert result["weights_sha256"] == uninterrupted["weights_sha256"]
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [int(r["epoch"]) for r in rows] == [1, 2, 3, 4]
    for mine, other in zip(rows, uninterrupted["rows"], strict=True):
        assert {k: mine[k] for k in ("step", "lr", "train/loss", "val/loss")} == {
            k: other[k] for k in ("step", "lr", "train/loss", "val/loss")}  # fmt: skip


def test_killed_and_resumed(bars, uninterrupted, tmp_path):
    """SIGKILL leaves no chance to save: the run goes on from the last committed checkpoint, to the same hashes."""
    process = start("train", str(bars), "name=killed", *EVERYTHING, cwd=tmp_path)
    run = tmp_path / "runs" / "killed"
    wait_for_step(run, 15, process)
    process.kill()
    process.communicate()
    for again in (True, False):  # killed a second time on the way
        before = len((run / "events.jsonl").read_text().splitlines())
        process = start("resume", "runs/killed", "json=true", cwd=tmp_path)
        if again:
            wait_for_step(run, 15, process, after=before)
            process.kill()
        out, err = process.communicate()
        assert not again or process.returncode == -signal.SIGKILL
    assert process.returncode == 0, err
    assert last_json(out)["state_sha256"] == uninterrupted["state_sha256"]
    assert [int(r["epoch"]) for r in csv.DictReader((run / "metrics.csv").read_text().splitlines())] == [1, 2, 3, 4]


def test_changed_files_and_damaged_checkpoints(bars, uninterrupted, tmp_path):
    """With another seed; so it is also the control: its hashes differ, and equality above means something."""
    import shutil

    data = Path(shutil.copytree(bars, tmp_path / "data"))
    process = start("train", str(data), "name=r", *EVERYTHING, "seed=1", cwd=tmp_path)
    run = tmp_path / "runs" / "r"
    wait_for_step(run, 15, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    newest = max((p for p in (run / "checkpoints").glob("step-*")), key=lambda p: p.name)
    file = newest / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    image = data / "class0" / "000.png"
    original = image.read_bytes()
    image.write_bytes((data / "class0" / "001.png").read_bytes())
    with pytest.raises(goodfit.DataError, match="1 files changed"):
        goodfit.resume(run)
    image.write_bytes(original)
    finished = goodfit.resume(run)
    said = [e["text"] for e in finished.events if e["event"] == "stage" and e["name"] == "resume"]
    assert any("damaged" in text for text in said), said
    assert finished.result["state_sha256"] != uninterrupted["state_sha256"]


def test_nothing_to_resume(tmp_path):
    with pytest.raises(goodfit.RequestError, match="no such run"):
        goodfit.resume(tmp_path / "nowhere")
    with pytest.raises(goodfit.RequestError, match="not a run"):
        goodfit.resume(tmp_path)
