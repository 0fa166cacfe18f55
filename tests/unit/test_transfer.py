"""Transfer: layers and their rates, what is frozen and when it thaws, the head kept by class names, weights from a bundle."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import timm.optim
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import goodfit
from goodfit.api.assemble import assemble, execution
from goodfit.api.transfer import transfer_stage
from goodfit.core.errors import RequestError, Stopped, WeightsError
from goodfit.core.journal import Journal
from goodfit.engine.checkpoint import Checkpoints, restore, take_snapshot, tensors_sha256
from goodfit.engine.device import DevicePolicy
from goodfit.engine.ema import Ema
from goodfit.engine.freezing import Freezing, plan_freezing
from goodfit.engine.loop import fit
from goodfit.engine.optimizer import build_optimizer
from goodfit.engine.ranks import Ranks
from goodfit.engine.schedule import Schedule
from goodfit.engine.state import LossScale, Progress, TrainState, copy_buffers
from goodfit.engine.step import StepContext, train_step
from goodfit.models.builder import build_network, create
from goodfit.models.groups import ParameterGroup, layers_of, parameter_groups
from goodfit.models.weights import load_weights, match_labels
from micros import Identity, Micro
from pictures import draw
from plans import plan_of
from plants import alarms, parts_of

# The distance of each layer from the head, written by hand from the networks' definitions.
RESNET = {"conv1": 5, "bn1": 5, "layer1.0": 4, "layer2.0": 3, "layer3.0": 2, "layer4.0": 1, "fc": 0}
MOBILENET = {
    "conv_stem": 18, "bn1": 18, "blocks.0.0": 17, "blocks.1.0": 16, "blocks.1.1": 15, "blocks.2.0": 14, "blocks.2.1": 13,
    "blocks.2.2": 12, "blocks.3.0": 11, "blocks.3.1": 10, "blocks.3.2": 9, "blocks.3.3": 8, "blocks.4.0": 7,
    "blocks.4.1": 6, "blocks.4.2": 5, "blocks.5.0": 4, "blocks.5.1": 3, "blocks.5.2": 2, "blocks.6.0": 1, "conv_head": 1,
    "bn2": 1, "classifier": 0,
}  # fmt: skip
VIT = {
    "cls_token": 13, "pos_embed": 13, "patch_embed": 13, "blocks.0": 12, "blocks.1": 11, "blocks.2": 10, "blocks.3": 9,
    "blocks.4": 8, "blocks.5": 7, "blocks.6": 6, "blocks.7": 5, "blocks.8": 4, "blocks.9": 3, "blocks.10": 2,
    "blocks.11": 1, "norm": 1, "head": 0,
}  # fmt: skip


def on_paper(name: str) -> nn.Module:
    """A timm network without any numbers in it."""
    with torch.device("meta"):
        return create(name, num_classes=3)


@pytest.mark.parametrize(
    ("model", "table", "undecayed"),
    [
        ("resnet10t", RESNET, ()),
        ("mobilenetv2_100", MOBILENET, ()),
        ("vit_tiny_patch16_224", VIT, ("cls_token", "pos_embed")),
    ],
)
def test_layer_decay_is_as_written_by_hand(model, table, undecayed):
    network = on_paper(model)
    groups = parameter_groups(network, plan_of(layer_decay=0.75, lr=1e-3, head_lr=1e-2, weight_decay=0.05))
    held = [(name, group) for group in groups for name in group.names]
    sizes = dict(network.named_parameters())
    assert sorted(name for name, _ in held) == sorted(sizes)
    for name, group in held:
        (distance,) = {d for prefix, d in table.items() if name == prefix or name.startswith(f"{prefix}.")}
        rate = 1e-2 if distance == 0 else 1e-3 * 0.75**distance
        assert group.lr == pytest.approx(rate, rel=1e-12), name
        assert group.head is (distance == 0), name
        assert group.weight_decay == (0.0 if sizes[name].ndim == 1 or name in undecayed else 0.05), name
    assert groups[-1].head and groups[0].lr == max(group.lr for group in groups if not group.head)


@pytest.mark.parametrize("model", ["convnext_atto", "regnety_004", "efficientnet_b0", "deit_tiny_patch16_224"])
def test_layer_decay_of_the_backbone_is_that_of_timm(model):
    """Also where a norm lies beside the classifier (convnext), which has its own rate here."""
    network = on_paper(model)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    exempt = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    theirs = timm.optim.param_groups_layer_decay(network, 0.05, no_weight_decay_list=exempt, layer_decay=0.7)
    expected = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in theirs for p in g["params"]}
    groups = parameter_groups(network, plan_of(layer_decay=0.7, lr=1.0, head_lr=5.0, weight_decay=0.05))
    for group in groups:
        for name in group.names:
            assert (1.0 if group.head else group.lr, group.weight_decay) == pytest.approx(expected[name]), name


def test_without_layer_decay_there_are_backbone_and_head():
    groups = parameter_groups(on_paper("resnet10t"), plan_of(lr=1e-3, head_lr=1e-2))
    assert [g.name for g in groups] == [
        "backbone",
        "backbone without weight decay",
        "head",
        "head without weight decay",
    ]
    assert [(g.lr, g.head) for g in groups] == [(1e-3, False), (1e-3, False), (1e-2, True), (1e-2, True)]
    assert all((g.weight_decay == 0) is g.name.endswith("decay") for g in groups)


def test_a_network_without_a_record_is_cut_at_its_children():
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    found = [(layer.title, layer.distance, layer.head) for layer in layers_of(network)]
    assert found == [("0", 2, False), ("2", 1, False), ("3", 0, True)]


STEM, FIRST = ("conv1.", "bn1."), ("conv1.", "bn1.", "layer1.")


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        ("1", STEM),
        ("2", FIRST),
        ("5", (*FIRST, "layer2.", "layer3.", "layer4.")),
        ("all-but-head", (*FIRST, "layer2.", "layer3.", "layer4.")),
        ("layer1", ("layer1.",)),
        ("layer1.*, bn?.*", ("layer1.", "bn1.")),
        ("*.conv2.weight", ("layer1.0.conv2.", "layer2.0.conv2.", "layer3.0.conv2.", "layer4.0.conv2.")),
        ("", ()),
    ],
)
def test_every_way_to_say_what_is_frozen(freeze, frozen):
    network = on_paper("resnet10t")
    found = plan_freezing(network, freeze=freeze, unfreeze="never", steps_per_epoch=7)
    assert found.starts == (0,)
    assert found.frozen[0] == {name for name, _ in network.named_parameters() if name.startswith(frozen)}


@pytest.mark.parametrize(
    ("freeze", "said"),
    [("6", "5 layers before the head"), ("layer9*", "matches no parameter"), ("conv1.*,layer9", "layer9 matches"),
     ("*", "nothing to train")],
)  # fmt: skip
def test_what_cannot_be_frozen_names_what_can(freeze, said):
    with pytest.raises(RequestError, match=said) as caught:
        plan_freezing(on_paper("resnet10t"), freeze=freeze, unfreeze="never", steps_per_epoch=7)
    assert "1 conv1, bn1, 2 layer1.0" in caught.value.next and "the head is fc" in caught.value.next


def test_gradual_thaws_from_the_head_down_one_layer_an_epoch():
    network = on_paper("resnet10t")
    found = plan_freezing(network, freeze="all-but-head", unfreeze="gradual", steps_per_epoch=10)
    assert found.starts == (0, 10, 20, 30, 40, 50)
    thawed = [before - after for before, after in zip(found.frozen, found.frozen[1:], strict=False)]
    for names, prefix in zip(thawed, ("layer4.", "layer3.", "layer2.", "layer1.", STEM), strict=True):
        assert names == {name for name, _ in network.named_parameters() if name.startswith(prefix)}
    assert found.frozen[-1] == frozenset()
    assert [found.stage(step) for step in (0, 9, 10, 49, 50, 10**6)] == [0, 0, 1, 4, 5, 5]
    some = plan_freezing(network, freeze="layer1,layer3", unfreeze="gradual", steps_per_epoch=10)
    assert [len(names) for names in some.frozen][1:] == [len({n for n in some.frozen[0] if n.startswith("layer1.")}), 0]


def test_what_is_asked_of_freezing_is_decided_or_refused():
    def decided(**asked):
        plan = plan_of(epochs=10, **asked)
        return plan.freeze.value, plan.unfreeze.value

    assert decided() == ("", "never")
    assert decided(freeze="off") == ("", "never")
    assert decided(freeze="3") == ("3", "never")
    assert decided(unfreeze="gradual") == ("all-but-head", "gradual")
    assert decided(unfreeze="20%") == ("all-but-head", "2")
    assert decided(freeze="layer1", unfreeze="3epochs") == ("layer1", "3")
    assert "nothing is pretrained" in plan_of(epochs=10, layer_decay=0.5).layer_decay.reason
    for bad, said in (({"freeze": "off", "unfreeze": "1"}, "contradicts"), ({"unfreeze": "10"}, "not within the run"),
                      ({"unfreeze": "0"}, "not within"), ({"unfreeze": "later"}, "must be a length")):  # fmt: skip
        with pytest.raises(RequestError, match=said):
            decided(**bad)


class Plain:
    def loss(self, model, batch):
        return {"loss": (nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), len(batch["y"]))}


BLOCKS = ("first", "second", "head")


def small_network() -> nn.Module:
    """Two blocks with batch norm and dropout, and a head."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
    second = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
    made = nn.Sequential()
    for name, module in zip(BLOCKS, (first, second, nn.Linear(8, 3)), strict=True):
        made.add_module(name, module)
    return made


def small_run(unfreeze: str, freeze: str = "all-but-head", kind: str = "adamw") -> tuple[TrainState, StepContext]:
    """A state before its first step, with four steps an epoch."""
    model = small_network()
    groups = [ParameterGroup("all", tuple(n for n, _ in model.named_parameters()), 0.05, 0.01)]
    flat = Schedule(kind="wsd", warmup_steps=0, stable_until=10**6, total_steps=10**6, lrf=0.0)
    state = TrainState(model, build_optimizer(model, groups, kind=kind, momentum=0.9), Ema(model, 0.9),
                       LossScale(torch.device("cpu"), active=False), Progress(flat))  # fmt: skip
    freezing = plan_freezing(model, freeze=freeze, unfreeze=unfreeze, steps_per_epoch=4)
    device = DevicePolicy(kind="cpu", precision="fp32", channels_last=False)
    return state, StepContext(Plain(), Identity(), device, Ranks(), 0, 1.0, freezing=freezing)


def take_steps(state: TrainState, context: StepContext, until: int) -> None:
    """Steps on batches that depend on their number alone, with evaluation after every epoch, as a run has it."""
    while state.step < until:
        made = torch.Generator().manual_seed(state.step)
        data = {"x": torch.randn(6, 5, generator=made) + 1.0, "y": torch.randint(0, 3, (6,), generator=made)}
        train_step(state, context, [Micro(np.arange(6), data)], 1.0, copy_buffers(state.model))
        if state.step % 4 == 0:
            state.model.eval()


def test_a_snapshot_that_was_restored_does_not_move_with_the_training_that_follows():
    """torch keeps the step counts that it is given: the best state, held in memory, would count on."""
    state, context = small_run("never", freeze="")
    take_steps(state, context, 3)
    held = take_snapshot(state)
    digest = tensors_sha256(held.files)
    restore(state, held)
    take_steps(state, context, 6)
    assert tensors_sha256(held.files) == digest


def tensors_by_block(state: TrainState) -> dict[str, list[torch.Tensor]]:
    return {b: [t.clone() for n, t in state.model.state_dict().items() if n.startswith(b)] for b in BLOCKS}


def moved(before: dict[str, list[torch.Tensor]], state: TrainState) -> dict[str, bool]:
    """Whether all tensors of a block, batch-norm statistics among them, have moved; none may have moved alone."""
    after, found = tensors_by_block(state), {}
    for block in BLOCKS:
        same = [torch.equal(a, b) for a, b in zip(before[block], after[block], strict=True)]
        assert all(same) or not any(same), block
        found[block] = not all(same)
    return found


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_what_is_frozen_does_not_move_by_a_bit_and_thaws_in_order(kind):
    state, context = small_run("gradual", kind=kind)
    averages = [t.clone() for n, t in state.ema.model.state_dict().items() if n.startswith("first")]
    for epoch, expected in enumerate(((False, False, True), (False, True, True), (True, True, True)), start=1):
        before = tensors_by_block(state)
        take_steps(state, context, 4 * epoch)
        assert moved(before, state) == dict(zip(BLOCKS, expected, strict=True)), epoch
        if not expected[0]:  # moments are zeros as at the start, no average of what did not move
            first = [p for n, p in state.model.named_parameters() if n.startswith("first")]
            entries = [e for p in first for e in state.optimizer.state.get(p, {}).values()]
            assert entries and all(not e.any() for e in entries)
            now = [t for n, t in state.ema.model.state_dict().items() if n.startswith("first")]
            assert all(torch.equal(a, b) for a, b in zip(averages, now, strict=True))


def test_a_frozen_batch_norm_evaluates_and_dropout_stays_in_training_mode():
    state, context = small_run("never", freeze="first")
    take_steps(state, context, 1)
    modes = {name: module.training for name, module in state.model.named_modules()}
    assert [name for name, training in modes.items() if not training] == ["first.1"]
    assert modes["first.3"] and modes["second.1"]


def test_a_phase_with_only_the_head_ends_where_it_was_asked_to():
    state, context = small_run("1.5")
    before = tensors_by_block(state)
    take_steps(state, context, 6)
    assert moved(before, state) == {"first": False, "second": False, "head": True}
    take_steps(state, context, 7)
    assert moved(before, state) == {"first": True, "second": True, "head": True}


def test_what_its_owner_froze_stays_frozen():
    model = small_network()
    model.second[0].weight.requires_grad_(False)
    found = plan_freezing(model, freeze="all-but-head", unfreeze="1", steps_per_epoch=4)
    found.apply(model, 1)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["second.0.weight"]


@pytest.mark.parametrize("cut", [2, 5, 9])
def test_going_on_from_a_checkpoint_is_exact_across_thawing(cut):
    """Also in the state that went on: rolled back, what had thawed is frozen again."""
    whole, context = small_run("gradual")
    take_steps(whole, context, cut)
    held = take_snapshot(whole)
    take_steps(whole, context, 12)
    expected = tensors_sha256(take_snapshot(whole).files)
    fresh, _ = small_run("gradual")
    for state in (fresh, whole):
        restore(state, held)
        take_steps(state, context, 12)
        assert tensors_sha256(take_snapshot(state).files) == expected


class StopAfter:
    """A stop flag that is raised at its n-th question."""

    exit_code = 130

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_run_stopped_before_thawing_goes_on_to_the_same_bits(make_images, tmp_path):
    """With the run's own loop, loader, checkpoints and network: three epochs, the head alone in the first one."""
    first = parts_of(make_images(), epochs=3, unfreeze="1", ema=True, suspects=False)
    checkpoints = {name: Checkpoints(tmp_path / name, first.hashes) for name in ("whole", "cut")}
    found = {}
    for name, questions in (("whole", [10**9]), ("cut", [1, 4, 10**9])):
        for number in questions:
            parts = assemble(first.plan, first.index)
            held = checkpoints[name].latest()
            if held is not None:
                restore(parts.state, held)
            with execution(parts.plan):
                try:
                    fit(parts.state, parts.context, parts.train, parts.val, settings=parts.settings,
                        checkpoints=checkpoints[name], journal=Journal(None), stop=StopAfter(number))  # fmt: skip
                except Stopped:
                    assert number < 10**9
        found[name] = tensors_sha256(checkpoints[name].latest().files)
    assert found["whole"] == found["cut"]


@pytest.mark.parametrize("asked", [{"unfreeze": "1"}, {"freeze": "all-but-head"}])
def test_the_rehearsal_knows_what_is_frozen_on_purpose(make_images, asked):
    parts = parts_of(make_images(), suspects=False, **asked)
    assert alarms(parts)[0] == set()
    names = frozenset(name for name, _ in parts.state.model.named_parameters())
    failed, error = alarms(parts, freezing=Freezing((0,), (names,)))
    assert "gradients" in failed and "parameter tensors are frozen" in str(error)


def test_names_are_compared_without_regard_to_case_and_spaces():
    known = ["Red_Bottle", "can", "glass  jar", "CAN", "Paper"]
    assert match_labels(known, ["paper", "red bottle", "Glass_Jar", "can", "new"]) == {0: 4, 1: 0, 2: 2, 3: 1}
    assert match_labels(known, ["Can"]) == {}  # it may be either
    assert match_labels(["paper"], ["Paper", "PAPER"]) == {}


def save_head(path, network: nn.Module, labels: list[str] | None) -> None:
    save_file(
        dict(network.state_dict()), str(path), metadata=None if labels is None else {"labels": json.dumps(labels)}
    )


@pytest.mark.parametrize("names", [["c", "a", "b"], ["B", "new", "other"], ["x", "y", "z"], ["a", "b", "c", "d", "e"]])
def test_the_head_keeps_the_rows_of_the_classes_that_it_knows(tmp_path, names):
    labels = ["a", "b", "c"]
    torch.manual_seed(1)
    save_head(tmp_path / "w.safetensors", create("resnet10t", num_classes=3), labels)
    torch.manual_seed(2)
    network = create("resnet10t", num_classes=len(names))
    made = {k: v.clone() for k, v in network.state_dict().items()}
    report = load_weights(network, tmp_path / "w.safetensors", names)
    source, now = load_file(tmp_path / "w.safetensors"), network.state_dict()
    known = {number: labels.index(n.lower()) for number, n in enumerate(names) if n.lower() in labels}
    for tensor in ("fc.weight", "fc.bias"):
        for number in range(len(names)):
            row = source[tensor][known[number]] if number in known else made[tensor][number]
            assert torch.equal(now[tensor][number], row), (tensor, number)
    assert report.known == tuple(names[number] for number in known)
    assert report.initialised == (() if len(known) == len(names) else ("fc.weight", "fc.bias"))
    assert report.loaded == len(now) - len(report.initialised) and report.unused == ()
    assert ("keeps" in report.head) is bool(known)


def test_a_head_without_labels_is_new_also_where_it_has_as_many_classes(tmp_path):
    torch.manual_seed(1)
    save_head(tmp_path / "w.safetensors", create("resnet10t", num_classes=3), None)
    network = create("resnet10t", num_classes=3)
    before = network.fc.weight.clone()
    report = load_weights(network, tmp_path / "w.safetensors", ["a", "b", "c"])
    assert torch.equal(network.fc.weight, before) and report.known == ()
    assert report.initialised == ("fc.weight", "fc.bias") and "does not say which classes" in report.describe()


def test_the_rows_of_a_head_that_is_a_convolution(tmp_path):
    def made(num: int) -> nn.Module:
        network = nn.Sequential()
        network.add_module("body", nn.Conv2d(3, 4, 3))
        network.add_module("head", nn.Conv2d(4, num, 1))
        return network

    source, network = made(3), made(2)
    save_head(tmp_path / "w.safetensors", source, ["a", "b", "c"])
    before = network.head.weight[1].clone()
    load_weights(network, tmp_path / "w.safetensors", ["c", "new"])
    assert torch.equal(network.head.weight[0], source.head.weight[2])
    assert torch.equal(network.head.bias[0], source.head.bias[2])
    assert torch.equal(network.head.weight[1], before)


CLASSES = ["class0", "class1", "class2"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A run of one epoch on three classes of tiny pictures at 48 pixels, and the folder of its data."""
    folder = tmp_path_factory.mktemp("bundle")
    for kind in range(3):
        (folder / "data" / CLASSES[kind]).mkdir(parents=True)
        for number in range(20):
            draw(1000 * kind + number, kind).save(folder / "data" / CLASSES[kind] / f"{number:03d}.png")
    run = goodfit.train(folder / "data", model="resnet10t", epochs=1, batch=16, imgsz=48, rehearse=False, suspects=False,
                        project=str(folder / "runs"), name="first")  # fmt: skip
    return run, folder / "data"


def test_a_bundle_gives_model_size_preprocessing_and_head(bundle, tmp_path):
    """From the folder of the run; what comes of it is a bundle that serves again."""
    first, data = bundle
    run = goodfit.train(data, pretrained=str(first.path), epochs=1, batch=16, suspects=False, rehearse=False,
                        project=str(tmp_path))  # fmt: skip
    plan, before = run.plan, first.plan
    assert plan.model.value == "resnet10t" and plan.pretrained.value == "file"
    assert plan.imgsz.value == 48 and plan.preprocessing.value == before.preprocessing.value
    assert plan.head_lr.value == plan.lr.value and "knows all the classes" in plan.head_lr.reason
    (told,) = [e for e in run.events if e["event"] == "stage" and e["name"] == "transfer"]
    assert told["known_classes"] == CLASSES and "the head keeps 3 of 3 classes by name" in told["text"]
    network, report = build_network(plan, CLASSES)
    held = load_file(first.bundle / "model.safetensors")
    assert all(torch.equal(value, held[name]) for name, value in network.state_dict().items())
    assert report.initialised == () and report.loaded == len(held)
    again = goodfit.plan(data, pretrained=str(run.bundle / "model.safetensors"), suspects=False)
    assert again.plan.imgsz.value == 48 and again.plan.head_lr.reason == plan.head_lr.reason


@pytest.mark.soak
def test_a_head_that_knows_its_classes_raises_no_alarm_in_the_rehearsal(bundle):
    """Its loss starts far below chance, and can hardly fall."""
    first, data = bundle
    parts = parts_of(data, pretrained=str(first.bundle), imgsz=48, suspects=False, augment="off", lr=1e-3)
    with execution(parts.plan):
        micro = parts.train.group(0, 0, 1)[0]
        take = Micro(micro.samples, micro.data)
        for _ in range(60):
            train_step(parts.state, parts.context, [take], 1.0, copy_buffers(parts.state.model))
    assert "loss at start" in alarms(parts)[0]
    parts.state.stage = -1
    assert alarms(parts, known_head=True)[0] == set()


def test_a_bundle_meets_data_with_other_classes(bundle, make_images):
    """One class is known under another spelling, one is gone, one is new."""
    first, _ = bundle
    data = make_images()
    (data / "class0").rename(data / "Class1x")
    (data / "class1").rename(data / "CLASS1")
    parts = parts_of(data, pretrained=str(first.bundle), imgsz=48, suspects=False, freeze="all-but-head")
    events: list[dict[str, Any]] = []
    transfer_stage(parts, Journal(None, (events.append,)))
    (told,) = events
    assert told["known_classes"] == ["CLASS1", "class2"]
    assert "new classes: Class1x" in told["text"] and "classes left in the file: class0" in told["text"]
    assert "1,539 of 4,9" in told["text"] and told["phases"] == [{"epoch": 0.0, "trained": 512 * 3 + 3}]
    assert parts.plan.head_lr.value > parts.plan.lr.value


def test_weights_that_cannot_be_used_are_refused(bundle, tmp_path):
    first, data = bundle
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "plan.json").write_text("{}")
    for name, change in (("other", {"labels": 3}), ("nameless", {"model": None}), ("blind", {"preprocessing": {}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes((first.bundle / "model.safetensors").read_bytes())
        card = json.loads((first.bundle / "bundle.json").read_text())
        (tmp_path / name / "bundle.json").write_text(json.dumps(card | change))
    said = {"missing/run": "no such weight file, bundle or run", "empty": "neither a bundle nor a run",
            "unfinished": "has no bundle", "other": "incomplete", "nameless": "incomplete", "blind": "cannot be used"}  # fmt: skip
    for name, text in said.items():
        with pytest.raises(WeightsError, match=text):
            goodfit.plan(data, pretrained=str(tmp_path / name), suspects=False)
    with pytest.raises(WeightsError, match="holds resnet10t, not resnet18"):
        goodfit.plan(data, model="resnet18", pretrained=str(first.bundle), suspects=False)
    with pytest.raises(RequestError, match="matches no parameter"):
        goodfit.plan(data, pretrained=str(first.bundle), freeze="stages.*", suspects=False)
