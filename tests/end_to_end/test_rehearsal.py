"""The rehearsal: each planted bug is named by its own check, and sound configurations raise no alarm."""

from __future__ import annotations

import dataclasses
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from goodfit.api.assemble import assemble, execution
from goodfit.api.train import export_problem, rehearsal_material, rehearsal_stage
from goodfit.core.errors import TrainingError
from goodfit.core.journal import Journal, read_lines
from goodfit.engine.checkpoint import tensors_sha256
from goodfit.engine.optimizer import optimizer_tensors
from goodfit.models.builder import build_network
from goodfit.planning.rehearsal import rehearse
from pictures import draw

NAMES = (
    "labels", "normalisation", "outputs", "loss and evaluation agree", "evaluation mode", "samples apart", "loss sums",
    "gradients", "learning rate", "loss at start", "overfit a few samples", "better than blind", "save, load, predict",
    "export", "subset run",
)  # fmt: skip


def parts_of(data, **asked):
    from goodfit.api.prepare import decide, read_and_audit
    from goodfit.config.parse import parse_request

    given = {"data": str(data), "batch": 16, "model": "resnet10t", "imgsz": 32, "pretrained": "false", "epochs": 5}
    request = parse_request({**given, **asked})
    journal = Journal(None)
    audited = read_and_audit(request, journal)
    return assemble(decide(request, audited, journal), audited.index)


def run(parts, *, wrap=lambda model: model, build=None, schedule=None, export=lambda _: "", **context):
    """Rehearse with a model, optimizer, schedule, task or transform that is wrapped."""
    with execution(parts.plan):
        model = wrap(parts.state.model)
        return rehearse(
            model, dataclasses.replace(parts.context, **context), schedule=schedule or parts.state.progress.schedule,
            build_optimizer=build or parts.optimizer_for, material=rehearsal_material(parts),
            rebuild=lambda: wrap(build_network(parts.plan, len(parts.index.class_names))[0]), export=export,
        )  # fmt: skip


def alarms(parts, **planted):
    """The names of the checks that fail, and the whole message."""
    with pytest.raises(TrainingError) as caught:
        run(parts, **planted)
    error = caught.value
    assert "rehearse=false" in error.next and error.kept == "nothing was trained"
    return {name for name in NAMES if re.search(rf"(: |; ){re.escape(name)}: ", error.message)}, str(error)


# Planted bugs ---------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A network with something wrong around it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, image):
        return self.net(image)


class Softmaxed(Wrapped):
    def forward(self, image):
        return self.net(image).softmax(dim=1)


class Detached(Wrapped):
    def forward(self, image):
        return self.net.forward_head(self.net.forward_features(image).detach())


class NeverEvaluating(Wrapped):
    def eval(self):
        return self


class DropsOut(NeverEvaluating):
    def forward(self, image):
        return nn.functional.dropout(self.net(image), 0.5, self.training)


class MeanOfBatch(Wrapped):
    def forward(self, image):
        return self.net(image - image.mean(dim=0, keepdim=True))


class SeesNothing(Wrapped):
    def forward(self, image):
        return self.net(0 * image)


class Forgetful(Wrapped):
    """Keeps a tensor that training changes outside of its state."""

    def __init__(self, net):
        super().__init__(net)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, image):
        if self.training:
            self.calls += 1
        return self.net(image) + self.calls


class Around:
    """Something else with one method replaced."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)


class MeanNotSum(Around):
    def loss(self, model, batch):
        return {k: (total / count, count) for k, (total, count) in self._inner.loss(model, batch).items()}


class CountOfOne(Around):
    def loss(self, model, batch):
        return {k: (total / count, 1) for k, (total, count) in self._inner.loss(model, batch).items()}


class CountOfBatch(Around):
    def loss(self, model, batch):
        return {k: (total, 16) for k, (total, _) in self._inner.loss(model, batch).items()}


class SoftmaxInLoss(Around):
    def loss(self, model, batch):
        return self._inner.loss(Softmaxed(model), batch)


class ShiftedInLoss(Around):
    def loss(self, model, batch):
        return self._inner.loss(model, {**batch, "target": batch["target"].roll(1, 0)})


class ShiftedTransform(Around):
    def train(self, batch, **keys):
        made = self._inner.train(batch, **keys)
        return {**made, "target": made["target"].roll(1, 0)}


class DividedTwice(Around):
    def train(self, batch, **keys):
        return self._inner.train({**batch, "image": (batch["image"] / 255).to(torch.uint8)}, **keys)


class OtherLabelsEveryStep(Around):
    def train(self, batch, *, step, **keys):
        made = self._inner.train(batch, step=step, **keys)
        if step > 0:
            made["target"] = (made["target"] + step) % 3
        return made


@pytest.fixture(scope="module")
def sound(bars):
    """A sound run of resnet10t, to plant bugs around; nothing in it is changed."""
    return parts_of(bars)


def collated_otherwise(parts, change):
    """The same parts with a training loader that collates what `change` makes of images and targets."""
    train = object.__new__(type(parts.train))
    train.__dict__.update(parts.train.__dict__)
    train.samples = dataclasses.replace(train.samples, collate=lambda *both: parts.task.collate(*change(*both)))
    return dataclasses.replace(parts, train=train)


@pytest.mark.parametrize("shift", [1, -1])
def test_labels_shifted_by_one_are_named(sound, shift):
    parts = collated_otherwise(sound, lambda images, targets: (images, np.roll(targets, shift)))
    found, text = alarms(parts)
    assert found == {"labels"} and "shifted by one" in text and "`target`" in text


def test_pictures_shifted_by_one_are_named(sound):
    parts = collated_otherwise(sound, lambda images, targets: (np.roll(images, 1, axis=0), targets))
    found, text = alarms(parts)
    assert found == {"labels"} and "pictures are shifted by one" in text


def test_labels_shifted_in_the_transform_or_the_loss_are_named(sound):
    found, text = alarms(sound, transform=ShiftedTransform(sound.context.transform))
    assert found == {"labels"} and "after the training transform" in text
    assert alarms(sound, task=ShiftedInLoss(sound.task))[0] >= {"loss and evaluation agree"}


def test_softmax_twice_is_named(sound):
    found, text = alarms(sound, wrap=Softmaxed)
    assert found == {"outputs"} and "already probabilities" in text
    found, text = alarms(sound, task=SoftmaxInLoss(sound.task))
    assert found == {"outputs"} and "twice" in text


def test_frozen_layers_are_named(sound):
    found, text = alarms(sound, wrap=lambda model: Wrapped(model).requires_grad_(False))
    assert found == {"gradients"} and "are frozen" in text
    sound.state.model.requires_grad_(True)
    found, text = alarms(sound, wrap=Detached)
    assert found == {"gradients"} and "none for net.conv1" in text


def test_parameters_that_the_optimizer_was_not_given_are_named(sound):
    def forgetful(model):
        optimizer = sound.optimizer_for(model)
        del optimizer.param_groups[0]["params"][0]
        return optimizer

    found, text = alarms(sound, build=forgetful)
    assert found == {"gradients"} and "not in the optimizer: conv1" in text


@pytest.mark.parametrize("wrong", [NeverEvaluating, DropsOut])
def test_evaluation_in_training_mode_is_named(sound, wrong):
    found, text = alarms(sound, wrap=wrong)
    assert found == {"evaluation mode"} and "stay in training mode" in text


def test_a_learning_rate_of_zero_is_named(bars, sound):
    found, text = alarms(parts_of(bars, lr=0.0, head_lr=0.0))
    assert found == {"learning rate"} and "is 0 at its peak" in text

    def idle(model):
        optimizer = sound.optimizer_for(model)
        optimizer.step = lambda: None
        return optimizer

    found, text = alarms(sound, build=idle)
    assert found == {"learning rate"} and "0 of" in text


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4), "nearly the same"),  # figures for 0..255, pixels of 0..1
        ((0.485, 0.456, 0.406), (58.4, 57.1, 57.4), "nearly the same"),
        ((0.0019, 0.0018, 0.0016), (0.0009, 0.0009, 0.0009), "too large"),  # not divided by 255
        ((123.7, 116.3, 103.5), (0.229, 0.224, 0.225), "lies outside"),
    ],
)
def test_a_wrong_normalisation_is_named(sound, mean, std, said):
    transform = sound.context.transform
    wrong = dataclasses.replace(transform.preprocessing, mean=mean, std=std)
    found, text = alarms(sound, transform=dataclasses.replace(transform, preprocessing=wrong))
    assert "normalisation" in found and found <= {"normalisation", "loss at start"}
    assert said in text and "spread" in text


def test_a_training_transform_that_normalises_otherwise_is_named(sound):
    found, text = alarms(sound, transform=DividedTwice(sound.context.transform))
    assert found == {"normalisation"} and "lose their contrast" in text


@pytest.mark.parametrize(("wrong", "what"), [(MeanNotSum, "sum"), (CountOfOne, "sum"), (CountOfBatch, "count")])
def test_a_loss_averaged_wrongly_is_named(sound, wrong, what):
    found, text = alarms(sound, task=wrong(sound.task))
    assert "loss sums" in found and found <= {"loss sums", "loss at start"} and f"the {what} of the term" in text


def test_samples_that_see_each_other_are_named(sound):
    found, text = alarms(sound, wrap=MeanOfBatch)
    assert "samples apart" in found and found <= {"samples apart", "loss sums"}
    assert "gradient on other samples' inputs" in text


def test_a_model_that_does_not_see_its_input_is_named(sound):
    found, _ = alarms(sound, wrap=SeesNothing)
    assert "better than blind" in found and found <= {"better than blind", "overfit a few samples"}


def test_state_that_is_not_saved_is_named(sound):
    assert alarms(sound, wrap=Forgetful)[0] == {"save, load, predict"}


def test_a_subset_that_does_not_train_is_named(sound):
    found, text = alarms(sound, transform=OtherLabelsEveryStep(sound.context.transform))
    assert found == {"subset run"} and "72 steps" in text


class Deciding(Wrapped):
    def forward(self, image):
        return self.net(image) if image.mean() > -100 else self.net(-image)


def test_a_network_that_cannot_be_exported_is_named(sound):
    found, text = alarms(sound, wrap=Deciding, export=lambda model: export_problem(sound, model))
    assert found == {"export"} and "cannot be traced" in text


# Sound configurations -------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A small network without batch norm, with dropout, part of it frozen on purpose, and with a parameter unused."""

    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 2)
        self.more = nn.Conv2d(16, 32, 3, 2)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(32 * 7 * 7, classes)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.empty = nn.Parameter(torch.zeros(0))
        self.conv.requires_grad_(False)
        nn.init.zeros_(self.fc.weight)

    def forward(self, image):
        hidden = self.more(self.conv(image).relu()).relu()
        return self.fc(self.drop(hidden.flatten(1)))


def paint(kind, number, classes):
    """A picture of a class: bars, digits, black marks on white paper, or shades of grey."""
    if kind == "bars":
        return draw(1000 * (number % classes) + number, number % classes)
    randomness = np.random.default_rng(number)
    at = 2 + 2 * (number % classes)
    if kind == "paper":
        pixels = np.full((28, 28, 3), 255, np.uint8)
        pixels[at : at + 2, 8 + int(randomness.integers(4)) :][:, :3] = 0
    elif kind == "night":
        pixels = randomness.integers(0, 6, (28, 28, 3)).astype(np.uint8)
        pixels[:, at : at + 2] += 20
    else:
        pixels = randomness.integers(100, 110, (28, 28)).astype(np.uint8)
        pixels[at : at + 2] += 90
    return Image.fromarray(pixels)


def folders(root, kind, classes, counts):
    for target in range(classes):
        folder = root / f"class{target}"
        folder.mkdir(parents=True)
        for k in range(counts[target % len(counts)]):
            paint(kind, k * classes + target, classes).save(folder / f"{k}.png")
    return root


SOUND = {
    "as decided": ("bars", 3, (40,), {}),
    "sample": ("bars", 2, (60, 12), {"balance": "sample", "precision": "fp32"}),
    "weights": ("bars", 2, (60, 12), {"balance": "loss", "precision": "fp32"}),
    "logits adjusted": ("bars", 2, (80, 8), {"balance": "logit"}),
    "smoothing and dropout": ("bars", 3, (40,), {"label_smoothing": 0.2, "dropout": 0.5, "drop_path": 0.1}),
    "mixed": ("bars", 3, (40,), {"mixup": 0.4, "cutmix": 1.0, "precision": "fp32", "accumulate": 2}),
    "sgd": ("bars", 3, (40,), {"optimizer": "sgd", "schedule": "cosine", "warmup": 2.0, "clip": 1.0}),
    "ten greys": ("grey", 10, (16,), {"augment": "strong"}),
    "white paper": ("paper", 8, (16,), {"precision": "fp32", "augment": "light"}),
    "night": ("night", 5, (20,), {"optimizer": "sgd", "precision": "bf16", "erase": 0.3}),
    "many batch norms": ("bars", 3, (20,), {"model": "mobilenetv2_050", "imgsz": 64}),
    "fine-tuning rate": ("bars", 3, (40,), {"lr": 1e-5, "head_lr": 1e-3}),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_configurations_raise_no_alarm(tmp_path, name):
    kind, classes, counts, asked = SOUND[name]
    found = run(parts_of(folders(tmp_path / "data", kind, classes, counts), **asked))
    assert [c.name for c in found.checks] == list(NAMES) and all(c.passed for c in found.checks)
    assert found.describe().endswith(f"{len(NAMES)} checks") and found.describe().count(" · ") == 3
    assert found.bare_rate > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_without_batch_norm_and_partly_frozen_is_sound(sound, precision):
    torch.manual_seed(0)
    made = Plain(3)
    device = dataclasses.replace(sound.context.device, precision=precision)
    found = run(sound, wrap=lambda _: made, device=device)
    (gradients,) = [c for c in found.checks if c.name == "gradients"]
    assert "none for token" in gradients.evidence and "2 frozen" in gradients.evidence


def test_tiny_digits_are_sound(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    images, targets = datasets.load_digits(return_X_y=True)
    for number in range(200):
        (tmp_path / "digits" / str(targets[number])).mkdir(parents=True, exist_ok=True)
        pixels = (images[number].reshape(8, 8) * 15.9).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "digits" / str(targets[number]) / f"{number}.png")
    assert run(parts_of(tmp_path / "digits")).checks


# What it leaves behind ------------------------------------------------------------------------------------------------


def test_the_rehearsal_changes_nothing_of_the_run(sound, tmp_path):
    def everything():
        state = sound.state
        noise = {"torch": torch.get_rng_state()}
        tensors = {"model": dict(state.model.state_dict()), "optimizer": optimizer_tensors(state.optimizer)}
        modes = [module.training for module in state.model.modules()]
        rates = [group["lr"] for group in state.optimizer.param_groups]
        return (tensors_sha256({**tensors, "noise": noise}), modes, rates, state.progress.to_dict(),
                repr(np.random.get_state()), random.getstate(), [p.grad for p in state.model.parameters()])  # fmt: skip

    with execution(sound.plan):
        before = everything()
        journal = Journal(tmp_path / "events.jsonl")
        rehearsal_stage(sound, journal)
        assert everything() == before
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert [c["name"] for c in event["checks"]] == list(NAMES)
    assert all(c["passed"] is True and c["evidence"] and c["meaning"] for c in event["checks"])
    assert event["bare_rate"] > 0 and "\n" not in event["text"] and f"{len(NAMES)} checks" in event["text"]
