"""Bugs to plant around a sound run, and sound configurations: for the tests and benchmarks/planted_bugs.py."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import torch
from PIL import Image
from torch import nn

from goodfit.api.assemble import assemble, execution
from goodfit.api.decide import decide
from goodfit.api.prepare import read_and_audit
from goodfit.api.rehearse import rehearsal_material
from goodfit.config.parse import parse_request
from goodfit.core.journal import Journal
from goodfit.models.builder import build_network
from goodfit.planning.rehearsal import RehearsalError, rehearse
from pictures import draw

NAMES = (
    "labels", "normalisation", "outputs", "loss and evaluation agree", "evaluation mode", "samples apart", "loss sums",
    "gradients", "learning rate", "loss at start", "overfit a few samples", "better than blind", "save, load, predict",
    "export", "subset run",
)  # fmt: skip


def parts_of(data, **asked):
    """A run of resnet10t at 32 pixels, unless something else is asked."""
    given = {"data": str(data), "batch": 16, "model": "resnet10t", "imgsz": 32, "pretrained": "false", "epochs": 5}
    request = parse_request({**given, **asked})
    journal = Journal(None)
    audited = read_and_audit(request, journal)
    return assemble(decide(request, audited, journal), audited.index)


def run(
    parts, *, wrap=lambda model: model, build=None, schedule=None, export=lambda _: "", known_head=False, **context
):
    """Rehearse with a model, optimizer, schedule, task or transform that is wrapped."""
    with execution(parts.plan):
        model = wrap(parts.state.model)
        return rehearse(
            model, dataclasses.replace(parts.context, **context), schedule=schedule or parts.state.progress.schedule,
            build_optimizer=build or parts.optimizer_for, material=rehearsal_material(parts),
            rebuild=lambda: wrap(build_network(parts.plan, parts.index.class_names)[0]), export=export,
            known_head=known_head,
        )  # fmt: skip


def alarms(parts, **planted):
    """The names of the checks that fail, and the error; none where all pass."""
    try:
        run(parts, **planted)
    except RehearsalError as error:
        return {check.name for check in error.checks if not check.passed}, error
    return set(), None


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


class Deciding(Wrapped):
    def forward(self, image):
        return self.net(image) if image.mean() > -100 else self.net(-image)


def collated_otherwise(parts, change):
    """The same parts with a training loader that collates what `change` makes of images and targets."""
    train = object.__new__(type(parts.train))
    train.__dict__.update(parts.train.__dict__)
    train.samples = dataclasses.replace(train.samples, collate=lambda *both: parts.task.collate(*change(*both)))
    return dataclasses.replace(parts, train=train)


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


def frozen(model):
    """A copy of a model of which nothing is trained."""
    return Wrapped(copy.deepcopy(model)).requires_grad_(False)


def zeroed(parts):
    """What builds the run's optimizer, with a learning rate of zero."""

    def build(model):
        optimizer = parts.optimizer_for(model)
        for group in optimizer.param_groups:
            group.update(dict.fromkeys(("lr", "peak_lr"), 0.0))
        return optimizer

    return build


def normalised_for_bytes(parts):
    """The run's transform with mean and spread of ImageNet in units of 0 to 255, for pixels of 0 to 1."""
    transform = parts.context.transform
    wrong = dataclasses.replace(transform.preprocessing, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
    return dataclasses.replace(transform, preprocessing=wrong)


def shifted(parts):
    """The run with the labels of every batch shifted by one sample."""
    return collated_otherwise(parts, lambda images, targets: (images, np.roll(targets, 1)))


BUGS = {  # what is planted: the run and what is changed in it, and the check that has to name it
    "labels shifted by one": (lambda parts: (shifted(parts), {}), "labels"),
    "softmax twice": (lambda parts: (parts, {"wrap": Softmaxed}), "outputs"),
    "frozen everything": (lambda parts: (parts, {"wrap": frozen}), "gradients"),
    "eval in train mode": (lambda parts: (parts, {"wrap": DropsOut}), "evaluation mode"),
    "learning rate 0": (lambda parts: (parts, {"build": zeroed(parts)}), "learning rate"),
    "wrong normalisation": (lambda parts: (parts, {"transform": normalised_for_bytes(parts)}), "normalisation"),
    "loss averaged wrongly": (lambda parts: (parts, {"task": MeanNotSum(parts.task)}), "loss sums"),
}
