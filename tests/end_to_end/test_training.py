"""What the loop does beyond the straight path: memory, plateaus, divergence, rehearsal."""

from __future__ import annotations

import errno
import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import goodfit
from goodfit.api.assemble import assemble, execution
from goodfit.api.finish import load_best
from goodfit.api.train import continue_from
from goodfit.core.errors import OutOfMemory, StorageError, TrainingError
from goodfit.core.journal import Journal
from goodfit.engine.checkpoint import Checkpoints, restore, tensors_sha256
from goodfit.engine.clock import Clock
from goodfit.engine.epoch import Epoch
from goodfit.engine.loop import fit
from goodfit.engine.optimizer import optimizer_tensors
from goodfit.engine.stop import StopFlag
from goodfit.runtime.images import ImageError


def parts_of(bars, **asked):
    from goodfit.api.decide import decide
    from goodfit.api.prepare import read_and_audit
    from goodfit.config.parse import parse_request

    request = parse_request({"data": str(bars), "batch": 16, "rehearse": False, **asked})
    journal = Journal(None)
    audited = read_and_audit(request, journal)
    return assemble(decide(request, audited, journal), audited.index)


def run_fit(parts, folder, journal=None):
    checkpoints = Checkpoints(folder, {})
    with execution(parts.plan), StopFlag() as stop:
        fit(parts.state, parts.context, parts.train, parts.val, settings=parts.settings, checkpoints=checkpoints,
            journal=journal or Journal(None), stop=stop)  # fmt: skip
    return checkpoints


def events_of(run):
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


class Failing:
    """A task that runs out of memory when a micro-batch is larger than a limit, or gives NaN at some steps."""

    def __init__(self, task, limit=10**9, nan_at=()):
        self._task, self._limit, self._nan_at, self.calls = task, limit, nan_at, 0

    def __getattr__(self, name):
        return getattr(self._task, name)

    def loss(self, model, batch):
        terms = self._task.loss(model, batch)  # the forward pass has touched the batch-norm statistics
        if len(batch["image"]) > self._limit:
            raise torch.OutOfMemoryError("simulated")
        self.calls += 1
        total, count = terms["loss"]
        return {"loss": (total * float("nan") if self.calls in self._nan_at else total, count)}


class Crowded(Failing):
    """A task that runs out of memory when more samples than a limit are evaluated at once; `seen` are those that were not too many."""

    def __init__(self, task, limit, error=None):
        super().__init__(task)
        self._most, self._error, self.seen = limit, error or torch.OutOfMemoryError("simulated"), []

    def predict(self, model, batch):
        if len(batch["image"]) > self._most:
            raise self._error
        self.seen.append(len(batch["image"]))
        return self._task.predict(model, batch)


def with_task(parts, *, kind=Failing, **failing):
    import dataclasses

    context = dataclasses.replace(parts.context, task=kind(parts.task, **failing))
    return dataclasses.replace(parts, context=context)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(bars, tmp_path):
    direct = parts_of(bars, epochs=1, accumulate=4)
    run_fit(direct, tmp_path / "direct")
    survived = with_task(parts_of(bars, epochs=1), limit=5)
    journal = Journal(tmp_path / "events.jsonl")
    run_fit(survived, tmp_path / "survived", journal)
    assert survived.state.progress.num_micro == 4 and survived.state.step == direct.state.step
    assert tensors_sha256({"": survived.state.model.state_dict()}) == tensors_sha256(
        {"": direct.state.model.state_dict()}
    )
    said = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["value"] for e in said if e["event"] == "decision"] == [2, 4]


def test_out_of_memory_with_one_sample_is_an_error(bars, tmp_path):
    with pytest.raises(OutOfMemory) as caught:
        run_fit(with_task(parts_of(bars, epochs=1, cache="off", workers=2), limit=0), tmp_path)
    assert caught.value.exit_code == 5 and "imgsz" in caught.value.next
    assert multiprocessing.active_children() == [], "a loader process would keep the program from ending"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("simulated"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()],
                         ids=["gpu", "cpu", "numpy"])  # fmt: skip
def test_memory_that_runs_out_in_validation_halves_its_batch_and_gives_the_same_figures(bars, tmp_path, error):
    direct, survived = (
        parts_of(bars, epochs=1),
        with_task(parts_of(bars, epochs=1), kind=Crowded, limit=10, error=error),
    )
    found = [run_fit(p, tmp_path / str(n)).latest().progress["best"] for n, p in enumerate((direct, survived))]
    assert found[0]["metrics"] == pytest.approx(found[1]["metrics"], rel=1e-5)
    seen = survived.context.task.seen
    assert max(seen) <= 10 and sum(seen) == len(survived.val.rows), "every sample once, after those that did not fit"


def test_memory_for_one_sample_of_validation_is_an_error(bars, tmp_path):
    with pytest.raises(OutOfMemory, match="one sample at a time") as caught:
        run_fit(with_task(parts_of(bars, epochs=1), kind=Crowded, limit=0), tmp_path)
    assert caught.value.exit_code == 5


def test_a_loader_process_that_dies_and_a_file_that_vanishes_cost_no_step(bars, tmp_path):
    """Killed, as by the system where memory is short; a picture that is gone. Both end resumable, and both hashes are those of a whole run."""
    import os
    import shutil
    import signal

    shutil.copytree(bars, tmp_path / "data")
    asked = {"epochs": 2, "cache": "off", "workers": 1, "prefetch": 1, "batch": 8}
    whole = parts_of(tmp_path / "data", **asked)
    run_fit(whole, tmp_path / "whole")

    class Killing(Failing):
        def loss(self, model, batch):
            if self.calls == 3:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            return super().loss(model, batch)

    parts = with_task(parts_of(tmp_path / "data", **asked), kind=Killing)
    with pytest.raises(TrainingError, match="A loader process died") as caught:
        run_fit(parts, tmp_path / "cut")
    assert "step-0000000" in caught.value.kept and "workers=0" in caught.value.next
    again = parts_of(tmp_path / "data", **asked)
    restore(again.state, Checkpoints(tmp_path / "cut", {}).latest())
    assert again.state.step >= 4
    lost = again.train.rows[0]
    gone = again.index.file(int(lost))
    content = gone.read_bytes()
    gone.unlink()
    with pytest.raises(ImageError) as caught:
        run_fit(again, tmp_path / "cut")
    assert "step-0000" in caught.value.kept and "resume" in caught.value.next
    assert str(gone) in caught.value.where + caught.value.message and "Traceback" not in caught.value.message
    gone.write_bytes(content)
    last = parts_of(tmp_path / "data", **asked)
    restore(last.state, Checkpoints(tmp_path / "cut", {}).latest())
    run_fit(last, tmp_path / "cut")
    assert last.state.step == whole.state.step
    assert tensors_sha256({"": last.state.model.state_dict()}) == tensors_sha256({"": whole.state.model.state_dict()})


def test_an_error_of_a_dataset_keeps_its_kind_and_the_steps(tmp_path):
    """In a loader process too; its state is saved before."""
    import goodfit

    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, row):
            if row == 50 and (tmp_path / "broken").exists():
                raise ValueError("the fiftieth")
            return torch.full((4,), float(row % 2)), row % 2

    (tmp_path / "broken").write_text("")
    model = torch.nn.Linear(4, 2)
    with pytest.raises(goodfit.DataError, match="Sample 50 cannot be had: ValueError: the fiftieth") as caught:
        goodfit.fit(model, train=Numbers(), val=Numbers(), loss=torch.nn.CrossEntropyLoss(), epochs=2, batch=4, workers=1, rehearse=False,
                    measure=False, project=str(tmp_path / "runs"), name="a")  # fmt: skip
    assert "step-000000" in caught.value.kept and "resume=" in caught.value.next


def test_a_save_that_can_wait_is_tried_three_times(bars, tmp_path, monkeypatch):
    """A disk that is full for a while: training goes on and says so; full for good: it stops with the last checkpoint as it was."""
    parts, tried, most = parts_of(bars, epochs=8), [], [2]
    plain = Checkpoints._write

    def write(self, snapshot):
        if len(tried) < most[0] and not snapshot.progress["finished"]:
            tried.append(snapshot.name)
            raise StorageError("The disk is full.")
        return plain(self, snapshot)

    monkeypatch.setattr(Checkpoints, "_write", write)
    monkeypatch.setattr(Checkpoints, "is_due", lambda self: True)

    journal = Journal(tmp_path / "events.jsonl")
    run_fit(parts, tmp_path / "c", journal)
    assert parts.state.progress.finished and len(tried) == 2
    said = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert sum(e.get("name") == "saving" and "The disk is full" in e["text"] for e in said) == 2
    tried.clear()
    most[0] = 10**9
    parts = parts_of(bars, epochs=8)
    with pytest.raises(StorageError, match="The disk is full"):
        run_fit(parts, tmp_path / "never")
    assert len(tried) == 3 and parts.state.progress.epoch == 3


def test_a_nan_step_is_named_and_training_goes_on(bars, tmp_path):
    parts = with_task(parts_of(bars, epochs=1), nan_at=(3,))
    journal = Journal(tmp_path / "events.jsonl")
    run_fit(parts, tmp_path / "c", journal)
    (skipped,) = parts.state.progress.skipped
    assert skipped["step"] == 3 and len(skipped["samples"]) == 16
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (event,) = [e for e in events if e.get("skipped") is True]
    assert event["loss"] == "nan" and event["samples"] == skipped["samples"]
    assert all(torch.isfinite(p).all() for p in parts.state.model.parameters())


def test_nan_for_good_ends_the_run_with_finite_checkpoints(bars, tmp_path):
    parts = with_task(parts_of(bars, epochs=5), nan_at=range(10, 10_000))
    with pytest.raises(TrainingError, match="20 updates in a row") as caught:
        run_fit(parts, tmp_path)
    assert caught.value.exit_code == 5
    kept = Checkpoints(tmp_path, {}).latest()
    assert kept is not None and all(torch.isfinite(t).all() for t in kept.files["model"].values())


def test_a_plateau_cools_down_from_the_best_state_in_a_new_segment(bars, tmp_path):
    parts = parts_of(bars, epochs=60, patience=3, warmup=0.5, min_delta=0.01)
    journal = Journal(tmp_path / "events.jsonl")
    run_fit(parts, tmp_path / "c", journal)
    progress = parts.state.progress
    assert (progress.segment, progress.ended) == (1, "cool-down") and progress.parent is not None
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (branch,) = [e for e in events if e["event"] == "segment"]
    best_before = max(e["val"]["accuracy"] for e in events if e["event"] == "epoch" and e["segment"] == 0)
    assert branch["parent"] == {"segment": 0, "step": branch["step"]}
    cooled = [e for e in events if e["event"] == "epoch" and e["segment"] == 1]
    highest = max(e["lr"] for e in events if e["event"] == "epoch")
    assert cooled and cooled[0]["step"] > branch["step"] and cooled[-1]["lr"] < 0.1 * highest
    assert progress.best["value"] >= best_before
    assert progress.step < 60 * parts.train.steps_per_epoch


def test_the_state_before_the_decay_is_pinned(bars, tmp_path):
    parts = parts_of(bars, epochs=5)
    run_fit(parts, tmp_path)
    found = {p.name: json.loads((p / "state.json").read_text()) for p in tmp_path.glob("step-*")}
    pinned = [s["progress"]["step"] for s in found.values() if s["pinned"]]
    assert pinned == [parts.state.progress.schedule.stable_until]
    assert (tmp_path / "last").is_symlink() and (tmp_path / "best").is_symlink()


@pytest.mark.parametrize(
    ("asked", "check"),
    [({"lr": 0.0, "head_lr": 0.0}, "learning rate: "), ({"lr": 100.0, "head_lr": 100.0}, "overfit a few samples: ")],
)
def test_the_rehearsal_stops_a_run_that_would_not_learn(bars, tmp_path, asked, check):
    with pytest.raises(TrainingError, match=check) as caught:
        goodfit.train(bars, project=str(tmp_path), epochs=1, batch=16, optimizer="sgd", clip=0, **asked)
    assert "rehearse=false" in caught.value.next and not list(tmp_path.rglob("test.json"))
    (failed,) = [e for e in events_of(tmp_path / "bars-1") if e["event"] == "failed"]
    named = {c["name"]: c for c in failed["checks"]}
    assert not named[check.removesuffix(": ")]["passed"] and named["labels"]["passed"] and len(named) > 5
    assert all(c["evidence"] and c["meaning"] for c in failed["checks"])
    assert caught.value.where == failed["where"] == str(tmp_path / "bars-1" / "rehearsal.txt")
    told = (tmp_path / "bars-1" / "rehearsal.txt").read_text()
    assert f"FAILED  {check}" in told and told.count("usually means") == len(named)
    picture = Path(told.splitlines()[-1].removeprefix("labels drawn on the exact tensors of a batch: "))
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(TrainingError, match=check):  # what failed once is rehearsed again
        goodfit.resume(tmp_path / "bars-1")


def test_a_resumed_run_is_refused_where_the_rest_finds_no_room(bars, tmp_path, monkeypatch):
    """What lies there already needs no more room; what is missing is asked for before anything is trained."""
    from goodfit.api.verdict import folder_bytes
    from goodfit.engine import loop
    from goodfit.planning import projection

    def cut(state, *_, **__):
        if state.step == 20:
            raise KeyboardInterrupt
        return step(state, *_, **__)

    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", cut)
    with pytest.raises(KeyboardInterrupt):
        goodfit.train(bars, project=str(tmp_path), epochs=4, batch=16, rehearse=False)
    monkeypatch.setattr(loop, "train_step", step)
    run = tmp_path / "bars-1"
    begun, before = folder_bytes(run / "checkpoints"), (run / "events.jsonl").read_text()
    assert begun > 10**7
    (made,) = [e["projected"] for e in events_of(run) if e.get("name") == "projection"]
    free = made["disk"] - begun
    monkeypatch.setattr(projection, "free_bytes", lambda _folder: free - 1)
    with pytest.raises(StorageError, match="The rest of the run needs up to") as caught:
        goodfit.resume(run)
    assert f"goodfit resume {run}" in caught.value.next and "checkpoints" in caught.value.kept
    since = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text()[len(before) :].splitlines()]
    assert since == ["stage", "failed"] and folder_bytes(run / "checkpoints") == begun
    monkeypatch.setattr(projection, "free_bytes", lambda _folder: free)
    assert goodfit.resume(run).result["epochs"] == 4
    (run / "result.json").unlink()  # trained: only test, bundle and report can still be missing
    now = folder_bytes(run / "checkpoints") + folder_bytes(run / "bundle")
    monkeypatch.setattr(projection, "free_bytes", lambda _folder: max(0, made["kept"] - now))
    assert goodfit.resume(run).result["epochs"] == 4


def test_the_rehearsal_leaves_the_state_untouched(bars):
    from goodfit.api.rehearse import rehearsal_stage

    parts = parts_of(bars, epochs=1)
    before = tensors_sha256({"": parts.state.model.state_dict()})
    with execution(parts.plan):
        rehearsal_stage(parts, Journal(None))
    assert tensors_sha256({"": parts.state.model.state_dict()}) == before
    assert not any(moment.any() for moment in optimizer_tensors(parts.state.optimizer).values())


def test_a_head_that_is_not_new_is_noticed(bars):
    from goodfit.api.rehearse import rehearsal_stage

    parts = parts_of(bars, epochs=1)
    with torch.no_grad():
        next(p for n, p in parts.state.model.named_parameters() if n == "fc.weight").normal_(std=30.0)
    with execution(parts.plan), pytest.raises(TrainingError, match="loss at start"):
        rehearsal_stage(parts, Journal(None))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_falls_in_fifty_steps_of_a_real_network(bars, tmp_path, optimizer, precision):
    parts = parts_of(bars, epochs=7, optimizer=optimizer, precision=precision)
    journal = Journal(tmp_path / "events.jsonl")
    run_fit(parts, tmp_path / "c", journal)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    losses = [e["train_loss"] for e in events if e["event"] == "epoch"]
    assert parts.state.step >= 49 and losses[-1] < 0.5 * losses[0]


def test_the_averaged_weights_are_validated_and_kept(bars, tmp_path):
    """SWA over the last half of a run of pictures, with a loader process: its network is the best state's model."""
    parts = parts_of(bars, epochs=4, swa=0.5, model="resnet10t", workers=1, precision="bf16", channels_last=True)
    checkpoints = run_fit(parts, tmp_path)
    progress, state = parts.state.progress, parts.state
    assert progress.num_averaged == 2 and progress.schedule.averaging_from == progress.step // 2
    assert state.evaluated is state.swa is state.ema.model
    progress.best = {**progress.best, "step": progress.step}  # the last state, whichever was the best
    load_best(parts, checkpoints)
    averaged, loaded = state.swa.state_dict(), state.model.state_dict()
    assert all(torch.equal(loaded[name], averaged[name]) for name in averaged)
    last = checkpoints.latest().files
    assert not torch.equal(last["ema"]["conv1.0.weight"], last["model"]["conv1.0.weight"])
    assert not torch.equal(last["ema"]["bn1.running_var"], last["model"]["bn1.running_var"])


def test_a_save_that_cannot_wait_is_tried_again(bars, tmp_path, monkeypatch):
    """The last of a run, on a disk that is full for some seconds; not where permission is denied."""
    monkeypatch.setattr("goodfit.engine.loop.RETRY_SECONDS", 0.0)
    plain, failed, cause = Checkpoints._write, [], [OSError(errno.ENOSPC, "full")]

    def write(self, snapshot):
        if snapshot.progress["finished"] and len(failed) < 2:
            failed.append(snapshot.name)
            raise StorageError("The disk is full.") from cause[0]
        return plain(self, snapshot)

    monkeypatch.setattr(Checkpoints, "_write", write)
    parts = parts_of(bars, epochs=2)
    assert run_fit(parts, tmp_path / "c").latest().progress["finished"] and len(failed) == 2
    failed.clear()
    cause[0] = OSError(errno.EACCES, "denied")
    with pytest.raises(StorageError):
        run_fit(parts_of(bars, epochs=2), tmp_path / "d")
    assert len(failed) == 1


def test_a_damaged_best_state_does_not_keep_a_run_from_its_end(bars, tmp_path):
    """The newest checkpoint takes its place where it was validated; where it was not, the next validation finds another."""
    parts, journal = parts_of(bars, epochs=4), Journal(tmp_path / "events.jsonl")
    checkpoints = run_fit(parts, tmp_path / "checkpoints", journal)
    progress = parts.state.progress
    best = dict(progress.best)
    journal.close()
    other = {**best, "step": 1}  # a state that is not there
    for place, finished in ((other, True), (other, False)):
        again = parts_of(bars, epochs=4)
        snapshot = Checkpoints(tmp_path / "checkpoints", {}).latest()
        snapshot.progress["best"] = snapshot.progress["reference"] = place
        if not finished:
            snapshot.progress["position"] = 16
        opened = Checkpoints(tmp_path / "checkpoints", {})
        opened.latest = lambda snapshot=snapshot: snapshot
        said = []
        record = Journal(None, (lambda event, said=said: said.append(event.get("text", "")),))
        continue_from(again, opened, record, tmp_path / "events.jsonl")
        found = again.state.progress
        if finished:
            assert found.finished and (found.best["step"], found.reference["step"]) == (progress.step, progress.step)
            assert (
                found.best["metrics"]["accuracy"] >= 0
                and found.best["value"] == found.best["metrics"][again.settings.monitor]
            )
            load_best(again, opened)
        else:
            assert found.best is None and not found.finished
        assert sum("is damaged" in text for text in said) == 2, said
    assert checkpoints.load_best(progress).progress["step"] == best["step"]


def test_memory_that_runs_out_in_an_epoch_is_no_part_of_what_comes_after_its_steps(monkeypatch):
    """What an epoch took before memory ran out is its steps', not time to be kept for every validation."""
    now = [0.0]
    monkeypatch.setattr("goodfit.engine.clock.time.monotonic", lambda: now[0])
    epoch = Epoch(SimpleNamespace(step=0), Journal(None), Clock())
    context = SimpleNamespace(device=SimpleNamespace(peak_memory=lambda: 0))
    for again in (False, True):
        epoch.start(again=again)
        epoch._samples += 90 if not again else 10
        now[0] += 9.0 if not again else 1.0
    found = epoch.finish(context)
    assert found["train_seconds"] == 10.0 and found["samples_per_second"] == 10.0
    epoch.start()
    now[0] += 2.0
    assert epoch.finish(context)["train_seconds"] == 2.0
