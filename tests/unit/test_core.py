"""Safe files, the journal, locks and counter-based random numbers."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from goodfit.api.folder import create_folder
from goodfit.api.train import recorded
from goodfit.config.parse import parse_request
from goodfit.core import safeio
from goodfit.core.errors import RequestError, StorageError
from goodfit.core.history import SECONDS, metrics_rows, stage_found
from goodfit.core.journal import PATIENCE, Journal, read_events, read_lines
from goodfit.core.lock import run_lock
from goodfit.core.random import derive_seed, hash64, permutation, stream, uniform


def test_draws_depend_on_the_key_alone():
    whole = uniform(1, 2, np.arange(100), 3)
    assert np.array_equal(whole[40:60], uniform(1, 2, np.arange(40, 60), 3))
    assert len(np.unique(hash64(5, np.arange(10_000)))) == 10_000
    assert not np.array_equal(uniform(1, np.arange(9)), uniform(2, np.arange(9)))
    assert derive_seed(1, 2) != derive_seed(2, 1) and derive_seed(1, 2) >= 0
    assert stream("order") != stream("crop")


def test_draws_are_uniform():
    draws = uniform(7, np.arange(20_000))
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03
    assert sorted(permutation(50, 3)) == list(range(50))


def test_a_directory_is_committed_whole(tmp_path):
    def fill(folder: Path) -> None:
        (folder / "a.bin").write_bytes(b"x" * 1000)

    safeio.commit_directory(tmp_path / "c", fill, {"schema": 1})
    assert safeio.verify_directory(tmp_path / "c")["schema"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_damage_is_seen(tmp_path, damage):
    safeio.commit_directory(tmp_path / "c", lambda f: (f / "a.bin").write_bytes(b"x" * 1000) and None, {})
    file = tmp_path / "c" / "a.bin"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[500] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    with pytest.raises(StorageError) as caught:
        safeio.verify_directory(tmp_path / "c")
    assert "a.bin" in caught.value.where


def test_a_failed_commit_leaves_the_older_one(tmp_path, monkeypatch):
    safeio.commit_directory(tmp_path / "c", lambda f: (f / "a").write_text("old") and None, {})

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safeio, "sync_file", full)
    with pytest.raises(StorageError, match="disk is full") as caught:
        safeio.commit_directory(tmp_path / "c", lambda f: (f / "a").write_text("new") and None, {})
    assert caught.value.exit_code == 4
    assert (tmp_path / "c" / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_replacement_killed_half_way_is_mended(tmp_path):
    safeio.commit_directory(tmp_path / "c", lambda f: (f / "a").write_text("old") and None, {})
    os.rename(tmp_path / "c", tmp_path / f"{safeio.REPLACED}c")  # as between the two renames
    (tmp_path / ".tmp-c-1").mkdir()
    assert safeio.remove_temporaries(tmp_path) == [".tmp-c-1"]
    assert safeio.verify_directory(tmp_path / "c")


def test_torn_last_line_is_skipped_at_any_byte(tmp_path):
    path = tmp_path / "events.jsonl"
    journal = Journal(path)
    for number in range(3):
        journal.emit("epoch", number=number)
    journal.close()
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert [e["number"] for e in read_lines(path)] == [0, 1]
        again = Journal(path)
        again.emit("epoch", number=9)
        again.close()
        assert [e["number"] for e in read_lines(path)] == [0, 1, 9]


def test_a_resume_leaves_out_what_was_lost(tmp_path):
    path = tmp_path / "events.jsonl"
    journal = Journal(path)
    row = {"train_loss": 1.0, "val": {"loss": 1.0}, "lr": 0.1, "samples_per_second": 1.0,
           **dict.fromkeys(SECONDS, 0.0)}  # fmt: skip
    for epoch in range(4):
        journal.step = 10 * (epoch + 1)
        journal.emit("epoch", epoch=epoch, **row)
    journal.step = 20
    journal.emit("run", resumed_from={"segment": 0, "step": 20})
    for epoch in range(2, 5):
        journal.step = 10 * (epoch + 1)
        journal.emit("epoch", epoch=epoch, **row)
    epochs = [e for e in read_events(path) if e["event"] == "epoch"]
    assert [e["epoch"] for e in epochs] == [0, 1, 2, 3, 4]
    assert [r["step"] for r in metrics_rows(epochs)] == [10, 20, 30, 40, 50]


def test_events_stay_json_and_a_failing_watcher_is_dropped(tmp_path, caplog):
    calls = []

    def fails(event):
        calls.append(event)
        raise RuntimeError("no")

    journal = Journal(tmp_path / "e.jsonl", (fails,))
    journal.emit("step", loss=float("nan"))
    journal.emit("step", loss=1.0)
    assert len(calls) == 1 and "switched off" in caplog.text
    assert [json.loads(line)["loss"] for line in (tmp_path / "e.jsonl").read_text().splitlines()] == ["nan", 1.0]


def test_one_writer_per_run_and_the_lock_dies_with_its_holder(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from goodfit.core.lock import run_lock\n"
        "with run_lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(StorageError, match=f"id {holder.pid}"), run_lock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with run_lock(tmp_path):
        pass


def test_what_a_stage_found_holds_until_the_run_is_extended():
    def stage(name, **found):
        return {"event": "stage", "name": name, **found}

    first = [{"event": "segment"}, stage("threshold", found={"threshold": 0.3}), stage("test")]
    assert stage_found(first, "threshold", "found") == {"threshold": 0.3}
    extended = [*first, {"event": "segment"}, {"event": "epoch"}]
    assert stage_found(extended, "threshold", "found") == {}
    assert stage_found([*extended, stage("threshold", found={"threshold": 0.5})], "threshold", "found") == {
        "threshold": 0.5
    }
    assert stage_found([], "threshold", "found") == {}


def test_a_full_disk_is_said_as_one_and_no_line_is_cut(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "events.jsonl")
    real, sizes = os.write, [7, 3]
    monkeypatch.setattr(os, "write", lambda d, data: real(d, data[: sizes.pop()] if sizes else data))
    journal.emit("step", loss=0.5)
    assert [e["event"] for e in read_lines(tmp_path / "events.jsonl")] == ["step"]

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = os.write
    monkeypatch.setattr(os, "write", full)
    now = [1000.0]
    monkeypatch.setattr("goodfit.core.journal.time.monotonic", lambda: now[0])
    journal.emit("step", loss=0.25)
    now[0] += PATIENCE - 1
    journal.emit("step", loss=0.125)
    monkeypatch.setattr(os, "write", whole)
    journal.emit("step", loss=0.0625)
    assert [e["loss"] for e in read_lines(tmp_path / "events.jsonl")] == [0.5, 0.25, 0.125, 0.0625], "nothing was lost"
    monkeypatch.setattr(os, "write", full)
    journal.emit("step", loss=0.5)
    now[0] += PATIENCE + 1
    with pytest.raises(StorageError, match="the disk is full"):
        journal.emit("step", loss=0.5)
    with pytest.raises(StorageError, match="kept whole"), recorded(journal, tmp_path):
        raise StorageError("the disk is full; kept whole", next="goodfit resume RUN and look at PRUNED/RUNS")


def test_the_next_command_names_the_run_and_nothing_else(tmp_path):
    folder = tmp_path / "PRUNED-1"
    folder.mkdir()
    with pytest.raises(StorageError) as caught, recorded(Journal(None), folder):
        raise StorageError("x", next="goodfit resume RUN, in PRUNED")
    assert caught.value.next == f"goodfit resume {folder}, in PRUNED"
    with pytest.raises(StorageError) as caught, recorded(Journal(None), folder, resume="goodfit.fit(resume='RUN')"):
        raise StorageError("x", next="goodfit resume RUN")
    assert caught.value.next == f"goodfit.fit(resume='{folder}')"


def test_a_folder_that_is_no_run_is_not_moved_away(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jpg").write_bytes(b"1")
    request = parse_request({"data": str(data), "project": str(tmp_path), "name": "data", "exist_ok": True})
    with pytest.raises(RequestError, match="is not a run"):
        create_folder(request, "x")
    assert (data / "a.jpg").read_bytes() == b"1"
    (data / "events.jsonl").write_text("")
    assert create_folder(request, "x") == data and (tmp_path / "data.replaced-1" / "a.jpg").is_file()
