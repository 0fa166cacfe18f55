"""The catalogue: its figures, the rule that chooses from it, and one contract over every network that it may choose."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from goodfit.api.models import list_models, table
from goodfit.cli.main import main
from goodfit.config.catalogue import CATALOGUE, CLASSIFY, PERMISSIVE, Need, choose_model, ladder, pictures_of
from goodfit.config.latency import candidates
from goodfit.config.parse import parse_request
from goodfit.config.request import TrainRequest
from goodfit.config.resolve import resolve, resolve_model
from goodfit.core.errors import RequestError, WeightsError
from goodfit.models.builder import create, create_at_size, load_weights
from goodfit.models.catalog import look_up
from goodfit.models.cost import count_cost
from goodfit.models.stem import ModelName, split_name
from goodfit.outcome.bundle import draft_bundle
from goodfit.outcome.export import TOLERANCE, check_parity, traced_difference
from goodfit.runtime.images import Preprocessing
from goodfit.runtime.predictor import Predictor
from pictures import draw
from plans import facts_of

CHEAP = 2.5e9  # multiply-adds: above it, the contract takes seconds
PHOTOS = Need(num_train=1000, num_classes=6, side=512, num_cores=2)


def over(models, heavy):
    """Parametrise over records; the heavy ones are left to `make soak`."""
    marks = {True: [pytest.mark.soak], False: []}
    return pytest.mark.parametrize("model", [pytest.param(m, id=m.name, marks=marks[heavy(m)]) for m in models])


def test_the_catalogue_is_ordered_by_cost_and_every_licence_is_permissive():
    for models in CATALOGUE.values():
        assert [m.multiply_adds for m in models] == sorted(m.multiply_adds for m in models)
        assert len({m.name for m in models}) == len(models)
        for model in models:
            assert model.licence in PERMISSIVE if model.top1 else model.licence == "", model.name
            assert bool(model.top1) == bool(model.top1_imgsz) == ("." in model.name), model.name
    for pictures in ("tiny", "small", "photos"):
        costs = [rung.cost_at(64) for rung in ladder("classify", pictures)]
        assert len(costs) > 1 and costs == sorted(costs)


def test_the_figures_are_those_of_timms_own_models():
    from timm.models import get_pretrained_cfg

    for model in CLASSIFY:
        assert count_cost(model.name, model.imgsz) == (model.num_parameters, model.multiply_adds), model.name
        if model.licence:
            config = get_pretrained_cfg(model.name).to_dict()
            assert config["input_size"][-1] == model.imgsz and config["license"] == model.licence, model.name
            assert (config["hf_hub_id"] or "").split("@")[0] == model.repository


def test_counted_multiply_adds_follow_the_arithmetic():
    """One residual network by hand: resnet18's published 1.8 G at 224 px, and a stem of stride 1 costs four times the blocks."""
    parameters, operations = count_cost("resnet18", 224)
    assert parameters == 11_689_512 and operations == 1_814_073_344
    stem = 3 * 49 * 64
    assert count_cost("resnet18-stem1", 32)[1] - stem * 32**2 - 512_000 == pytest.approx(
        16 * (count_cost("resnet18", 32)[1] - stem * 16**2 - 512_000), rel=1e-9
    )


CHOICES = [
    (PHOTOS, "resnet18.a1_in1k", "resnet50d"),
    (replace(PHOTOS, num_train=100_000), "resnet18.a1_in1k", "resnet50d"),  # on a CPU
    (replace(PHOTOS, device="cuda"), "resnet18.a1_in1k", "resnet50d"),
    (replace(PHOTOS, device="cuda", num_train=20_000), "resnet50d.a1_in1k", "convnext_tiny"),
    (replace(PHOTOS, device="cuda", num_classes=200), "resnet50d.a1_in1k", "convnext_tiny"),
    (replace(PHOTOS, device="cuda", num_train=20_000, weights=False), "resnet50d.a1_in1k", None),
    (replace(PHOTOS, device="cuda", num_train=200_000), "convnext_tiny.in12k_ft_in1k", "convnext_small"),
    (replace(PHOTOS, device="cuda", num_train=200_000, weights=False), "resnet50d.a1_in1k", None),
    (replace(PHOTOS, device="cuda", num_train=200_000, seconds=1200), "resnet18.a1_in1k", "resnet50d"),
    (replace(PHOTOS, seconds=40), "resnet10t.c3_in1k", "resnet18"),
    (replace(PHOTOS, seconds=60, epochs=2), "resnet18.a1_in1k", "resnet50d"),
    (replace(PHOTOS, num_train=2_000_000), "resnet10t.c3_in1k", "resnet18"),  # ten passes take over a day
    (Need(num_train=1257, num_classes=10, side=8, weights=False), "resnet10t", "resnet10t-stem"),
]


@pytest.mark.parametrize(("need", "name", "following"), CHOICES)
def test_the_smallest_sensible_network_is_chosen_and_the_next_is_named(need, name, following):
    choice = choose_model(need)
    assert choice.model.name == name
    if following is None:
        assert choice.following is None and "the largest" in choice.reason
    else:
        assert choice.following.name.startswith(following)
        assert f"next if it underfits: {choice.following.name} (" in choice.reason and "× the cost" in choice.reason
    assert choice == choose_model(need)


def test_small_pictures_start_cheap_and_grow_by_a_stem_that_keeps_them_unless_they_are_enlarged():
    small = Need(num_train=40_000, num_classes=10, side=32, num_cores=2, weights=False)
    choice = choose_model(small)
    assert not split_name(choice.model.name).stem and split_name(choice.following.name).stem
    assert choice.following.cost_at(32) > choice.model.cost_at(32)
    photos = replace(small, side=400, weights=True)
    hurried = choose_model(replace(photos, seconds=60))
    assert hurried.model.cost_at(160) < choose_model(photos).model.cost_at(160) and "only" in hurried.reason
    assert not split_name(choose_model(replace(small, imgsz=128)).model.name).stem
    assert [pictures_of(side) for side in (8, 27, 28, 64, 65)] == ["tiny", "tiny", "small", "small", "photos"]


def test_the_plan_takes_the_rule_and_the_reason_and_leaves_what_was_asked():
    facts = facts_of()
    plan = resolve(TrainRequest(), facts)
    assert plan.model.source == "rule" and "next if it underfits: resnet50d.a1_in1k" in plan.model.reason
    assert resolve(TrainRequest(model="resnet34"), facts).model.reason == "asked for"
    small = replace(facts.data, median_side=32)
    made = resolve_model(TrainRequest(), small, facts.machine)
    assert made.model.value.startswith("resnet10t") and made.pretrained.value == "false"
    large = replace(facts.data, num_train=200_000)
    gpu = replace(facts.machine, device="cuda")
    assert resolve_model(TrainRequest(), large, gpu).model.value.startswith("convnext_tiny")
    assert resolve_model(TrainRequest(), large, gpu, weights=False).model.value.startswith("resnet50d")
    assert resolve_model(TrainRequest(time=1200.0), large, gpu).model.value.startswith("resnet18")
    for weights in ("x.safetensors", "resnet50.a1_in1k"):  # which name their network themselves
        assert resolve_model(TrainRequest(pretrained=weights), large, gpu).model.value == ""
    assert parse_request({"model": "auto"}) == TrainRequest()


def test_names_with_a_stem():
    assert split_name("resnet18-stem1.a1_in1k") == ModelName("resnet18", "a1_in1k", 1)
    for name in ("resnet18-stem1.a1_in1k", "resnet10t-stem2", "resnet50d.a1_in1k", "vgg11"):
        assert split_name(name).text == name
    facts = look_up("resnet10t-stem1", "false", asked=False)
    assert (
        facts.name == "resnet10t-stem1"
        and facts.num_parameters == look_up("resnet10t", "false", asked=False).num_parameters
    )
    with pytest.raises(RequestError, match=r"-stem3 is not -stem1 or -stem2"):
        look_up("resnet18-stem3", "false", asked=False)
    with pytest.raises(RequestError, match=r"no stem of a residual network"):
        look_up("mobilenetv3_small_100-stem1", "false", asked=False)
    with pytest.raises(WeightsError, match="belong to resnet34"):
        look_up("resnet18-stem1", "resnet34.a1_in1k", asked=True)
    with pytest.raises(RequestError, match="no model called resnet19-stem1") as caught:
        look_up("resnet19-stem1", "false", asked=False)
    assert "resnet18" in caught.value.next


def test_a_stem_takes_the_weights_of_its_network_and_sees_more(tmp_path):
    torch.manual_seed(0)
    plain, fine = create("resnet10t", num_classes=3), create("resnet10t-stem1", num_classes=3)
    save_file(plain.state_dict(), str(tmp_path / "w.safetensors"))
    report = load_weights(fine, tmp_path / "w.safetensors")
    assert report.initialised == ("fc.weight", "fc.bias") and not report.unused
    picture = torch.randn(1, 3, 32, 32)
    sides = [
        network.eval().forward_features(picture).shape[-1]
        for network in (plain, create("resnet10t-stem2", num_classes=3).eval(), fine)
    ]
    assert sides == [1, 2, 4]


def step(network, imgsz):
    """Two steps on one batch; returns both losses."""
    images, targets = torch.randn(4, 3, imgsz, imgsz), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.003
    )  # of a gradient of norm 1: small enough to fall for certain
    losses = []
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(network.train()(images), targets)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@over(CLASSIFY, lambda model: model.multiply_adds > CHEAP or not model.rung_for)
def test_every_network_builds_steps_saves_and_traces(model, tmp_path):
    imgsz = min(64, model.imgsz)
    torch.manual_seed(0)
    network = create_at_size(model.name, imgsz, num_classes=3)
    first, second = step(network, imgsz)
    assert np.isfinite([first, second]).all() and second < first
    save_file(network.state_dict(), str(tmp_path / "w.safetensors"))
    again = create_at_size(model.name, imgsz, num_classes=3)
    again.load_state_dict(load_file(str(tmp_path / "w.safetensors")))
    pixels = torch.randint(0, 256, (3, 3, imgsz, imgsz), dtype=torch.uint8)
    with torch.no_grad():
        images = pixels.float() / 255
        assert torch.equal(network.eval()(images), again.eval()(images))
    preprocessing = Preprocessing(size=imgsz, resize=imgsz, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert traced_difference(network, preprocessing, pixels) <= TOLERANCE


@over([m for m in CLASSIFY if m.rung_for], lambda model: model.name != "resnet10t-stem2")
def test_every_rung_is_exported_and_predicts_the_same_from_files(model, tmp_path):
    imgsz = min(64, model.imgsz)
    torch.manual_seed(0)
    network = create_at_size(model.name, imgsz, num_classes=3).eval()
    preprocessing = Preprocessing(size=imgsz, resize=imgsz, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    files = []
    for number in range(3):
        draw(number, number).save(tmp_path / f"{number}.png")
        files.append((tmp_path / f"{number}.png").read_bytes())
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    reference = draft_bundle(bundle, network, preprocessing, {"labels": ["a", "b", "c"]})
    assert check_parity(Predictor(bundle), reference, files, ["0", "1", "2"])["max_difference"] <= TOLERANCE


def test_the_table_lists_every_network_and_what_was_measured_here(tmp_path, monkeypatch, capsys):
    from goodfit.api import timings
    from goodfit.config.latency import LatencyCost

    monkeypatch.setenv("GOODFIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    rows = list_models()
    assert [row["name"] for row in rows] == [m.name for m in CLASSIFY] and not any(row["latency"] for row in rows)
    assert {row["weights"] for row in rows} <= {"hub", "cached", "none"}
    known = LatencyCost(model="resnet18.a1_in1k", imgsz=160, threads=1, p50=20.5, p95=22.0, preparing=2.0)
    timings.keep("a", known)
    assert timings.kept("a") == known and timings.kept("b") is None
    assert main(["models", "json=true"]) == 0
    value = json.loads(capsys.readouterr().out)
    (row,) = [row for row in value["models"] if row["name"] == "resnet18.a1_in1k"]
    assert value["status"] == "done" and row["latency"] == [
        {"imgsz": 160, "threads": 1, "p50_ms": 20.5, "p95_ms": 22.0}
    ]
    assert main(["models", "task=classify"]) == 0
    shown = capsys.readouterr().out
    assert (
        "20.5 ms at 160 (1 thread)" in shown
        and "11.7 M" in shown
        and "73.2 % at 288" in shown
        and "apache-2.0" in shown
    )
    assert table(value["models"]) == shown.splitlines()
    file = tmp_path / timings.FOLDER / "a.json"
    file.write_text(file.read_text("utf-8").replace('"num_cores": ', '"num_cores": 9'), "utf-8")
    assert timings.kept_here() == []  # of another machine
    file.write_text("{", "utf-8")
    assert timings.kept("a") is None and timings.kept_here() == []
    assert main(["models", "task=detect"]) == 2 and "no catalogue for task=detect" in capsys.readouterr().err


def test_measuring_fills_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("GOODFIT_CACHE_DIR", str(tmp_path))
    one = (next(m for m in CLASSIFY if m.name == "resnet10t"),)
    monkeypatch.setitem(CATALOGUE, "classify", one)
    (row,) = list_models(measure=True)
    (found,) = row["latency"]
    assert (found["imgsz"], found["threads"]) == (32, 1) and 0 < found["p50_ms"] <= found["p95_ms"]


def test_a_latency_limit_tries_networks_of_the_catalogue():
    names = {m.name for m in CLASSIFY}
    for pictures in ("tiny", "small", "photos"):
        order = candidates(32, model=None, fixed_size=True, pictures=pictures)
        assert {c.model for c in order} <= names and len(order) >= 3
    small = candidates(32, model=None, fixed_size=True, pictures="small")
    assert split_name(small[0].model).stem
