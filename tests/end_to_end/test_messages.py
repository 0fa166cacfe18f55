"""Bad input gets one clear message: what happened, where, and what to do next; no traceback, nothing started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pictures import draw


def refused(done, code):
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    value = json.loads(done.stdout.strip().splitlines()[-1])
    assert value["status"] == "refused" and value["error"] and value["next"]
    return value


def test_wrong_folder(run_cli, tmp_path):
    value = refused(run_cli("train", "no/such/folder", "json=true"), 3)
    assert "no such file or folder" in value["error"] and value["where"] == "no/such/folder"
    assert list(tmp_path.iterdir()) == []


def test_empty_folder(run_here, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(run_here("train", "empty", "json=true"), 3)["error"]


def test_one_class_only(run_here, tmp_path):
    (tmp_path / "d" / "cats").mkdir(parents=True)
    for number in range(5):
        draw(number, 0).save(tmp_path / "d" / "cats" / f"{number}.png")
    value = refused(run_here("train", "d", "json=true"), 3)
    assert "one class only: cats" in value["error"] and "two class folders" in value["next"]


def test_misspelled_and_unusable_options(run_cli, tmp_path):
    value = refused(run_cli("train", "d", "epoch=3", "lr=abc", "json=true"), 2)
    assert "did you mean epochs?" in value["error"] and "lr=abc: must be a number" in value["error"]
    plain = run_cli("train", "d", "epoch=3")
    assert plain.returncode == 2 and plain.stderr.startswith("goodfit: One option") and "next:" in plain.stderr
    assert refused(run_cli("train", "d", "--lr", "json=true"), 2)["error"].count("lr")
    assert list(tmp_path.iterdir()) == []


def test_a_text_file_and_a_zero_byte_image_among_the_images(run_here, bars):
    done = run_here("audit", str(bars), "json=true")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout.strip().splitlines()[-1])
    found = {f["kind"]: f for f in value["findings"]}
    assert "zero bytes" in found["unreadable"]["items"][0] and found["unreadable"]["action"] == "left out"
    assert found["wrong_type"]["items"] == ["class1/notes.txt"] and value["accepted"] == 180
    assert value["data"]["task"] == "classify" and value["data"]["num_items"] == 181


def test_commands(run_cli):
    assert run_cli("trian").stderr.count("goodfit train") == 1
    assert run_cli("--version").stdout.strip()
    assert "--label-smoothing" in run_cli("train", "--help").stdout
    assert run_cli("predict").returncode == 2
    assert run_cli("resume", "nowhere").returncode == 2


def test_no_such_model_and_device(run_here, bars):
    value = refused(run_here("plan", str(bars), "model=resnet1", "json=true"), 2)
    assert "resnet1" in value["error"] and "resnet18" in value["next"]
    assert "TPU" in refused(run_here("plan", str(bars), "device=TPU", "json=true"), 2)["error"]


def test_the_plan_is_shown_and_followed(run_cli, run_here, bars, tmp_path):
    done = run_cli("plan", str(bars), "json=true", "lr=0.003")
    plan = json.loads(done.stdout.strip().splitlines()[-1])
    assert plan["decisions"]["lr"] == {"value": 0.003, "source": "asked", "reason": "asked for"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    again = run_here("plan", str(bars), "plan=plan.json", "--epochs", "7", "json=true")
    second = json.loads(again.stdout.strip().splitlines()[-1])["decisions"]
    assert second["lr"]["value"] == 0.003 and second["epochs"]["value"] == 7
    table = run_here("plan", str(bars)).stdout
    assert "precision" in table and "rule" in table


def test_a_full_disk_is_told(bars, tmp_path):
    """A run folder that cannot be made ends in one message and exit code 4."""
    import goodfit

    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(goodfit.StorageError) as caught:
        goodfit.train(bars, epochs=1, project=str(tmp_path / "runs"))
    assert caught.value.exit_code == 4 and Path(caught.value.where).name.startswith("runs")
