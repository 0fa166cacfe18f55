"""goodfit.fit on real modules: it learns, stops and goes on bit for bit, says what is wrong, and leaves the caller's things alone."""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import goodfit
import own_module
from goodfit.engine.checkpoint import tensors_sha256
from own_module import Net, Vectors
from pictures import REPOSITORY

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more processes than processors, here or there


def digest(module):
    if not isinstance(module, nn.Module):
        return ""
    return tensors_sha256({"": dict(module.state_dict())})


def vectors(num, seed, features=4):
    values = torch.Generator().manual_seed(seed)
    x = torch.randn(num, features, generator=values)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))


def test_it_learns_and_the_best_weights_are_in_the_module(tmp_path, capfd):
    module = mlp()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    data = [vectors(n, seed) for n, seed in ((800, 0), (200, 1), (200, 2))]
    run = goodfit.fit(module, *data, loss=nn.functional.cross_entropy, metrics=["accuracy"], epochs=12, lr=0.01,
                      monitor="accuracy", project=str(tmp_path))  # fmt: skip
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    result = run.result
    assert result["metrics"]["test"]["accuracy"] > 0.9 and result["metrics"]["test"]["look"] == 1
    assert result["metrics"]["test"]["low"] < result["metrics"]["test"]["accuracy"] < result["metrics"]["test"]["high"]
    assert not module.training and digest(module) == result["weights_sha256"]
    x, y = data[1]
    assert float((module(x).argmax(1) == y).float().mean()) == pytest.approx(result["metrics"]["val"]["accuracy"])
    assert result["metrics"]["val"]["accuracy"] == max(
        e["val"]["accuracy"] for e in run.events if e["event"] == "epoch"
    )
    (rehearsed,) = [e for e in run.events if e["event"] == "stage" and e["name"] == "rehearse"]
    assert {"gradients", "samples apart", "overfit a few samples", "subset run"} <= {
        c["name"] for c in rehearsed["checks"]
    }
    page = (run.path / "report.html").read_text()
    assert (
        "Accuracy" not in page and "not exported to" in page and f"{result['metrics']['test']['accuracy']:.4g}" in page
    )
    told = capfd.readouterr().err
    assert "img" not in told and "imgsz" not in told and "acc " in told
    assert run.plan.monitor.source == "asked" and run.plan.precision.value == "fp32" and run.plan.imgsz.value == 0
    again = goodfit.fit(mlp(), *data, loss=nn.functional.cross_entropy, metrics=["accuracy"], project=str(tmp_path), rehearse=False,
                        plan=str(run.path / "plan.json"))  # fmt: skip
    assert again.result["weights_sha256"] == result["weights_sha256"] and again.metrics["test"]["look"] == 2


def test_any_loss_and_metric_a_mean_of_errors_is_minimised(tmp_path):
    x, _ = vectors(300, 0)
    data = (x, (x[:, :1] * 2).sin()), (x[:100], (x[:100, :1] * 2).sin())
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))

    def step_loss(module, batch):
        error = module(batch[0]) - batch[1]
        return {"square": (error.square().sum(), error.numel()), "size": (0.01 * error.abs().sum(), error.numel())}

    run = goodfit.fit(module, *data, step_loss=step_loss, metrics={"mae": lambda m, b: (m(b[0]) - b[1]).abs()}, epochs=4,
                      monitor="mae", lr=0.01, batch=50, accumulate=2, rehearse=False, project=str(tmp_path))  # fmt: skip
    epochs = [e["val"] for e in run.events if e["event"] == "epoch"]
    assert run.metrics["val"]["mae"] == min(e["mae"] for e in epochs) < epochs[0]["mae"]
    assert all(e["loss"] == pytest.approx(e["square"] + e["size"]) for e in epochs)
    assert run.metrics["test"] == {}


def test_elements_of_the_gradient_are_limited_where_that_is_asked_for(tmp_path):
    def moved(**asked):
        module = mlp()
        data = [vectors(n, seed) for n, seed in ((100, 0), (50, 1))]
        goodfit.fit(module, *data, loss=nn.functional.cross_entropy, epochs=1, batch=20, lr=0.1, optimizer="sgd", momentum=0.0, schedule="constant",
                    weight_decay=0.0, ema=False, rehearse=False, measure=False, project=str(tmp_path), **asked)  # fmt: skip
        return max(
            float((a - b).detach().abs().max()) for a, b in zip(module.parameters(), mlp().parameters(), strict=True)
        )

    assert moved(clip_value=1e-4) <= 5 * 0.1 * 1e-4 * 1.01 < 0.1 * moved()


def test_a_figure_that_is_no_number_does_not_end_a_run(tmp_path):
    data = [vectors(n, seed) for n, seed in ((100, 0), (50, 1), (50, 2))]
    run = goodfit.fit(mlp(), *data, loss=nn.functional.cross_entropy, metrics={"odd": lambda output, target: output[:, 0] * float("nan")},
                      epochs=2, lr=0.01, rehearse=False, measure=False, project=str(tmp_path))  # fmt: skip
    assert run.result["status"] == "done" and run.metrics["val"]["loss"] > 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return own_module.train(str(tmp_path_factory.mktemp("whole"))).result


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGKILL, 0)])
def test_stopped_in_mid_epoch_and_resumed_to_the_same_bits(uninterrupted, tmp_path, number, workers):
    """The resumed module starts from other weights, with other workers, in another process."""
    words = [sys.executable, own_module.__file__, str(tmp_path), "0.03" if workers else "0.015", str(workers)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    run = tmp_path / "net-1"
    for _ in range(3000):
        text = (run / "events.jsonl").read_text() if (run / "events.jsonl").exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()  # the last line may be half written
        if any(e["event"] == "step" and 2 <= e["step"] % 10 <= 6 for e in map(json.loads, whole)):
            break
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130, err
        assert f"resume='{run}'" in out
        stopped = json.loads((run / "checkpoints" / "last" / "state.json").read_text())["progress"]
        assert 0 < stopped["position"] < 120 and stopped["step"] % 10
    else:
        assert process.returncode == -signal.SIGKILL
    result = own_module.train("", start=9, resume=run, workers=2 - workers).result
    assert (result["state_sha256"], result["weights_sha256"]) == (
        uninterrupted["state_sha256"],
        uninterrupted["weights_sha256"],
    )
    epochs = [e for e in goodfit.Run(run).events if e["event"] == "epoch"]
    assert [e["epoch"] for e in epochs] == [0, 1, 2]


def test_another_start_or_seed_is_another_result(uninterrupted, tmp_path):
    """The control: equality above means something."""
    for asked in ({"start": 9}, {"seed": 5}):
        assert own_module.train(str(tmp_path), **asked).result["state_sha256"] != uninterrupted["state_sha256"]


def test_resume_asks_for_what_the_run_began_with(uninterrupted, tmp_path, run_cli):
    run = Path(uninterrupted["run"])
    given = {"loss": nn.CrossEntropyLoss(), "metrics": ["accuracy"], "resume": run}
    data = Vectors(120), Vectors(40, seed=1)
    module = Net()
    assert goodfit.fit(module, *data, **given).path == run  # finished: only its weights are given
    assert digest(module) == uninterrupted["weights_sha256"] and not module.training
    for other, text in (
        ((Net(16), *data), "first.weight was float32 32 12, now float32 16 12"),
        ((Net(), Vectors(119), data[1]), "train= had 120 samples, now 119"),
        ((Net(), Vectors(120, seed=3), data[1]), "samples of train= are other ones"),
        ((Net(), *data, data[1]), "test= was not given"),
    ):
        with pytest.raises(goodfit.RequestError, match=text):
            goodfit.fit(*other, **given)
    with pytest.raises(goodfit.RequestError, match="loss was"):
        goodfit.fit(Net(), *data, **(given | {"loss": nn.MSELoss()}))
    with pytest.raises(goodfit.RequestError, match="epochs cannot change"):
        goodfit.fit(Net(), *data, epochs=9, **given)
    with pytest.raises(goodfit.RequestError, match="has no bundle"):
        goodfit.Run(run).predict([])
    (run / "result.json").rename(tmp_path / "result.json")
    try:
        with pytest.raises(goodfit.RequestError, match=r"(?s)handed over in Python.*goodfit\.fit\(module"):
            goodfit.resume(run)
    finally:
        (tmp_path / "result.json").rename(run / "result.json")


def nan_targets():
    x, _ = vectors(20, 0)
    y = torch.zeros(20, 2)
    y[3] = torch.nan
    return x, y


class Detached(nn.Module):
    """One layer never gets a gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x).detach())


def endless():
    while True:
        yield torch.zeros(4), 0


def test_a_run_that_fails_in_training_leaves_the_module_as_it_was(tmp_path):
    calls = iter(range(10**6))

    def loss(output, target):
        return nn.functional.cross_entropy(output, target) * (torch.nan if next(calls) > 12 else 1)

    module, data = mlp(), vectors(64, 0)
    before = digest(module)
    with pytest.raises(goodfit.TrainingError, match="were not finite"):
        goodfit.fit(
            module, data, data, loss=loss, rehearse=False, batch=16, epochs=20, ema=False, project=str(tmp_path)
        )
    trained = goodfit.Run(tmp_path / "sequential-1").events
    assert any(e["event"] == "step" and not e.get("skipped") for e in trained) and any(
        e.get("skipped") for e in trained
    )
    assert digest(module) == before and module.training


FEW = vectors(40, 0)
WRONG = {
    "iterable": ((mlp, endless(), FEW), {}, goodfit.DataError, "iterable of more than"),
    "unequal": ((mlp, (FEW[0], FEW[1][:-1]), FEW), {}, goodfit.DataError, "unequal length"),
    "no val": ((mlp, FEW, None), {}, goodfit.RequestError, "val= is missing"),
    "no pair": ((mlp, FEW[0], FEW), {}, goodfit.RequestError, "a pair"),
    "vector": ((mlp, FEW, FEW), {"loss": lambda o, t: o.sum(1)}, goodfit.RequestError, "not a mean"),
    "no loss": ((mlp, FEW, FEW), {"loss": None}, goodfit.RequestError, "One loss is needed"),
    "no parameters": ((nn.ReLU, FEW, FEW), {}, goodfit.RequestError, "no parameters"),
    "class": ((lambda: nn.Linear, FEW, FEW), {}, goodfit.RequestError, "the class Linear"),
    "nan targets": ((mlp, nan_targets(), FEW), {"loss": nn.MSELoss()}, goodfit.DataError, "1 of 20 targets are NaN .* row 3"),
    "nan inputs": ((mlp, (FEW[0] / 0, FEW[1]), FEW), {}, goodfit.DataError, "`0` holds values that are not finite"),
    "classes": ((mlp, (FEW[0], FEW[1] + 1), FEW), {}, goodfit.DataError, "a target is 2, and the module has 2 outputs"),
    "shapes": ((mlp, (FEW[0][:, :3], FEW[1]), FEW), {}, goodfit.RequestError, r"(?s)does not take a batch.*float32 \(8, 3\)"),
    "metric": ((mlp, FEW, FEW), {"metrics": ["acuracy"]}, goodfit.RequestError, "acuracy cannot be used"),
    "monitor": ((mlp, FEW, FEW), {"monitor": "f1"}, goodfit.RequestError, "monitor=f1"),
    "option": ((mlp, FEW, FEW), {"imgsz": 32}, goodfit.RequestError, "imgsz"),
    "gradient": ((Detached, FEW, FEW), {}, goodfit.TrainingError, r"none for a\.weight, a\.bias"),
    "softmax": ((lambda: nn.Sequential(mlp(), nn.Softmax(1)), FEW, FEW), {}, goodfit.TrainingError, "probabilities"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_error_and_nothing_is_changed(case, tmp_path, monkeypatch):
    monkeypatch.setattr("goodfit.data.samples.MOST_SAMPLES", 500)
    (make, train, val), more, error, text = WRONG[case]
    module = make()
    before, training = digest(module), getattr(module, "training", None)
    state = torch.get_rng_state()
    with pytest.raises(error, match=text) as raised:
        goodfit.fit(module, train, val, **({"loss": nn.CrossEntropyLoss(), "project": str(tmp_path / "runs")} | more))
    assert type(raised.value) is error or isinstance(raised.value, goodfit.TrainingError)
    assert (
        before == digest(module)
        and training == getattr(module, "training", None)
        and torch.equal(state, torch.get_rng_state())
    )
    assert (tmp_path / "runs").exists() == (error is goodfit.TrainingError), (
        "a folder is left where nothing was planned"
    )


@pytest.mark.parametrize(("example", "least"), [("mlp_tensors", 0.93), ("lstm_tokens", 0.97), ("two_inputs", 0.8)])
def test_the_examples_run_and_learn(example, least, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(REPOSITORY / "examples" / f"{example}.py"))
    said = next(line for line in capsys.readouterr().out.splitlines() if "accuracy" in line)
    assert float(said.split("accuracy ")[1].split(";")[0]) > least, said
