"""Asked and decided: parsing, YAML, the plan and its rules."""

from __future__ import annotations

import dataclasses

import pytest

from goodfit.cli.arguments import split_words
from goodfit.config.facts import DataFacts, Facts, MachineFacts, ModelFacts
from goodfit.config.parse import parse_request, read_request
from goodfit.config.plan import ADDED, Plan
from goodfit.config.request import TrainRequest
from goodfit.config.resolve import resolve
from goodfit.config.yaml12 import read_yaml
from goodfit.core.errors import RequestError
from plans import plan_of


def facts(**changes):
    data = DataFacts(format="folders", format_reason="one folder per class", num_train=767, num_val=165, num_test=165,
                     num_classes=6, smallest_class=90, largest_class=160, median_side=512, grey_share=0.0,
                     given_splits=(), decode_seconds=0.002, pixel_bytes_at=9.0)  # fmt: skip
    machine = MachineFacts(device="cpu", device_reason="no GPU", device_name="x", native_bf16=True, num_cores=2,
                           free_memory=16 * 10**9)  # fmt: skip
    model = ModelFacts(name="resnet18.a1_in1k", num_parameters=11_000_000, native_imgsz=224, stride=1,
                       mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic", crop_share=0.875,
                       weights="timm/x", weights_kind="hub", weights_problem="", licence="apache-2.0",
                       has_drop_path=False)  # fmt: skip
    parts = {"data": data, "machine": machine, "model": model}
    for name, change in changes.items():
        parts[name] = dataclasses.replace(parts[name], **change)
    return Facts(**parts)


@pytest.mark.parametrize(
    "words",
    [["lr=1e-3", "batch=32"], ["--lr", "1e-3", "--batch", "32"], ["--lr=1e-3", "--batch=32"],
     ["lr0=0.001", "batch_size=32"], ["--learning-rate", "1e-3", "--bs=32"]],
)  # fmt: skip
def test_all_spellings_mean_the_same(words):
    places, asked = split_words(["data/", *words])
    assert places == ["data/"]
    assert parse_request(asked) == TrainRequest(lr=0.001, batch=32)


def test_flags_and_aliases():
    _, asked = split_words(["--exist-ok", "--no-ema", "cache=True", "amp=false", "batch=-1", "optimizer=Adam"])
    request = parse_request(asked)
    assert (request.exist_ok, request.ema, request.cache) == (True, False, "ram")
    assert (request.precision, request.batch, request.optimizer) == ("fp32", None, "adam")
    assert parse_request({"precision": "bf16"}).precision == "bf16"
    assert parse_request({"max_bad": "5%"}).max_bad == pytest.approx(0.05)


def test_all_problems_are_reported_together_with_the_nearest_name():
    with pytest.raises(RequestError) as caught:
        parse_request({"epoch": "3", "lr": "abc", "flip": "2", "optimizer": "adamv", "workers": True})
    text = str(caught.value)
    for part in ("did you mean epochs?", "lr=abc: must be a number", "flip=2", "did you mean adam?", "5 options",
                 "workers=True: must be a whole number"):  # fmt: skip
        assert part in text
    assert caught.value.exit_code == 2


def test_asked_twice_is_refused():
    with pytest.raises(RequestError, match="given twice"):
        parse_request({"lr": 1.0, "lr0": 2.0})
    with pytest.raises(RequestError, match="given twice"):
        split_words(["lr=1", "--lr", "2"])


@pytest.mark.parametrize("value", ["nan", "inf", "1.5", "", "-3", "1e400"])
def test_bad_whole_numbers(value):
    if value == "":
        assert parse_request({"epochs": value}).epochs is None
        return
    with pytest.raises(RequestError):
        parse_request({"epochs": value})


def test_yaml_reads_as_people_mean_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-3\nname: no\nepochs: 010\nema: true\nsplit: 12:30\nbatch: null\n")
    assert read_yaml(path) == {"lr": 0.001, "name": "no", "epochs": 10, "ema": True, "split": "12:30", "batch": None}


@pytest.mark.parametrize(
    "text",
    ["lr: 1\nlr: 2\n", "a: &x [1]\nb: *x\n", "!!python/object/apply:os.system ['touch marker']", "- 1\n", "[" * 5000],
)
def test_yaml_refuses(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(RequestError):
        read_yaml(path)
    assert not (tmp_path / "marker").exists()


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-3\nepochs: 5\n")
    request = read_request({"cfg": str(path), "learning_rate": "0.5"})
    assert (request.lr, request.epochs) == (0.5, 5)


def test_asked_values_win_and_say_so():
    plan = resolve(TrainRequest(lr=0.5, batch=48), facts())
    assert (plan.lr.value, plan.lr.source, plan.batch.value) == (0.5, "asked", 48)
    assert plan.epochs.source == "rule" and plan.epochs.reason


def test_every_decision_has_a_reason_and_survives_json():
    plan = resolve(TrainRequest(), facts())
    assert all(d.reason and d.source in ("asked", "rule", "measured") for d in plan.decisions().values())
    assert Plan.from_dict(plan.to_dict()) == plan


def test_an_earlier_plan_decides_where_nothing_is_asked():
    first = resolve(TrainRequest(lr=0.5, epochs=7, patience=3, imgsz=96), facts())
    again = resolve(TrainRequest(epochs=9), facts(), first)
    assert (again.lr, again.patience, again.imgsz.value) == (first.lr, first.patience, 96)
    assert (again.epochs.value, again.epochs.source) == (9, "asked")


def test_a_plan_with_wrong_entries_is_refused():
    value = resolve(TrainRequest(), facts()).to_dict()
    value["decisions"]["epochs"]["value"] = "many"
    del value["decisions"]["lr"]
    value["decisions"]["what"] = {}
    with pytest.raises(RequestError) as caught:
        Plan.from_dict(value)
    assert all(part in str(caught.value) for part in ("epochs: must be a int", "lr: missing", "what: no such decision"))


def test_rules():
    assert resolve(TrainRequest(), facts()).batch.value == 32  # 767 images: 23 updates an epoch rather than 11
    assert resolve(TrainRequest(), facts(data={"num_train": 5000})).batch.value == 64
    small = resolve(TrainRequest(), facts(data={"median_side": 8, "grey_share": 1.0}, model={"weights_kind": "none"}))
    assert (small.imgsz.value, small.flip.value, small.augment.value) == (32, 0.0, "light")
    assert resolve(TrainRequest(), facts(machine={"native_bf16": False})).precision.value == "fp32"
    assert resolve(TrainRequest(), facts(machine={"device": "cuda", "native_bf16": False})).precision.value == "fp16"
    assert resolve(TrainRequest(), facts(machine={"free_memory": 10**8})).cache.value == "off"
    stride = resolve(TrainRequest(imgsz=100), facts(model={"stride": 16}))
    assert stride.imgsz.value == 96 and "multiples of 16" in stride.imgsz.reason and stride.imgsz.source == "asked"


def test_missing_weights_that_nobody_asked_for_are_said():
    plan = resolve(
        TrainRequest(), facts(model={"weights_kind": "none", "weights": "", "weights_problem": "no network"})
    )
    assert plan.pretrained.value == "false" and "no network" in plan.pretrained.reason


@pytest.mark.parametrize(
    "asked", [{"batch": 10_000}, {"accumulate": 64}, {"drop_path": 0.1}, {"mosaic": 0.5}, {"copy_paste": 0.5}]
)
def test_contradictions_are_refused(asked):
    with pytest.raises(RequestError):
        resolve(TrainRequest(**asked), facts())


def test_words_that_mean_another_field():
    assert parse_request({"batch": "study"}).batch_study is True
    assert parse_request({"lr": "find"}).lr_find is True
    assert parse_request({"lr0": "find"}).lr is None
    assert parse_request({"compile": "true"}).compile == "default"
    assert parse_request({"latency": "0.5s"}).latency == 500.0
    assert parse_request({"latency": "800us"}).latency == pytest.approx(0.8)
    assert parse_request({"latency": "10 ms"}).latency == parse_request({"latency": 10}).latency == 10.0
    for bad in ("10", "ms", "fast", "0ms", "-3ms"):
        with pytest.raises(RequestError, match="latency"):
            parse_request({"latency": bad})


def test_plans_of_earlier_versions_can_still_be_read():
    whole = plan_of().to_dict()
    older = {"decisions": {n: d for n, d in whole["decisions"].items() if n not in ADDED}}
    assert {n: getattr(Plan.from_dict(older), n).value for n in ADDED} == ADDED
    assert set(ADDED) <= set(whole["decisions"])
