"""The loss against hand formulas in numpy: smoothing, class weights, logit adjustment, and mixtures of two samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from goodfit.data.batch_transform import ImageBatchTransform
from goodfit.engine.optimizer import build_optimizer
from goodfit.models.groups import ParameterGroup
from goodfit.runtime.images import Preprocessing
from goodfit.tasks.classify import ClassifyTask

CLASSES = 4
WEIGHTS = [0.5, 1.0, 2.0, 0.25]
PRIOR = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
WAYS: dict[str, dict[str, Any]] = {
    "plain": {}, "smoothed": {"label_smoothing": 0.1}, "weighted": {"class_weights": WEIGHTS},
    "adjusted": {"log_prior": PRIOR}, "smoothed and weighted": {"label_smoothing": 0.2, "class_weights": WEIGHTS},
    "smoothed and adjusted": {"label_smoothing": 0.2, "log_prior": PRIOR},
}  # fmt: skip


def cross_entropy(logits, target, *, label_smoothing=0.0, log_prior=None):
    """Of one sample and one class, by hand: (1 - e) (-log p_target) + e / classes * sum of all -log p."""
    adjusted = logits.astype(np.float64) + (0 if log_prior is None else np.array(log_prior))
    losses = np.log(np.exp(adjusted).sum()) - adjusted
    return (1 - label_smoothing) * losses[target] + label_smoothing * losses.mean()


def expected(logits, pairs, *, class_weights=None, **keys):
    """Sum and count over samples, each a share of one class and the rest of another."""
    total = count = 0.0
    for row, (share, first, second) in zip(logits, pairs, strict=True):
        for part, target in ((share, first), (1 - share, second)):
            weight = part * (1.0 if class_weights is None else class_weights[target])
            total, count = total + weight * cross_entropy(row, target, **keys), count + weight
    return total, count


def transform(**how):
    serving = Preprocessing(size=16, resize=16, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    keys = {"mixup": 0.0, "cutmix": 0.0} | how
    return ImageBatchTransform(preprocessing=serving, num_classes=CLASSES, colour=0.0, erase=0.0, seed=3,
                               channels_last=False, **keys)  # fmt: skip


def mixed_batch(how, step):
    """Samples 1 to 12, each of one grey value that no other has, mixed; and from the pixels what each consists of."""
    num = 12
    values = np.arange(1, num + 1) * 20
    images = torch.from_numpy(np.broadcast_to(values[:, None, None, None], (num, 3, 16, 16)).astype(np.uint8).copy())
    target = torch.from_numpy(np.random.default_rng(step).integers(0, CLASSES, num))
    made = transform(**how).train({"image": images, "target": target}, epoch=0, step=step, rank=0, micro=0,
                                  samples=np.arange(num))  # fmt: skip
    return target.numpy(), values, made


@pytest.mark.parametrize("step", range(3))
def test_cutmix_shares_are_the_pasted_area(step):
    target, values, made = mixed_batch({"cutmix": 1.0}, step)
    pixels = np.rint(made["image"].numpy() * 255).astype(int)[:, 0]
    pasted = 0
    for number in range(len(values)):
        kinds, counts = np.unique(pixels[number], return_counts=True)
        shares = np.zeros(CLASSES)
        for kind, count in zip(kinds, counts, strict=True):
            shares[target[kind // 20 - 1]] += count / 256
        assert np.allclose(made["target"][number].numpy(), shares, atol=1e-6), number
        pasted += len(kinds) > 1
    assert pasted >= 8, "hardly anything was mixed"


@pytest.mark.parametrize("step", range(3))
def test_mixup_shares_are_those_of_the_pixels(step):
    target, values, made = mixed_batch({"mixup": 1.0}, step)
    pixels = made["image"].numpy()[:, 0, 0, 0] * 255
    one_hot = np.eye(CLASSES)[target]
    fits = [
        [(a, b) for a in np.linspace(0, 1, 2001) for b in range(12)
         if abs(a * values[n] + (1 - a) * values[b] - pixels[n]) < 0.06
         and np.allclose(a * one_hot[n] + (1 - a) * one_hot[b], made["target"][n], atol=1e-3)] for n in range(12)
    ]  # fmt: skip
    assert all(fits) and float((made["target"].max(1).values < 1).float().mean()) > 0.3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_the_loss_of_a_mixture_is_that_of_its_parts_by_their_shares(way, how):
    target, _, made = mixed_batch(how, 1)
    logits = torch.tensor(np.random.default_rng(0).normal(size=(12, CLASSES)) * 3, dtype=torch.float32)
    total, count = ClassifyTask(tuple("abcd"), **WAYS[way]).loss(lambda _: logits, made)["loss"]
    pairs = []
    for number, shares in enumerate(made["target"].numpy()):
        own = int(target[number])
        others = [c for c in range(CLASSES) if c != own and shares[c] > 0]
        pairs.append((float(shares[own]), own, others[0] if others else own))
    hand, hand_count = expected(logits.numpy(), pairs, **WAYS[way])
    assert float(total) == pytest.approx(hand, rel=1e-6) and float(count) == pytest.approx(hand_count, rel=1e-6)
    assert any(0.02 < share < 0.98 for share, *_ in pairs)


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_of_single_classes_is_the_hand_formula(way):
    random = np.random.default_rng(1)
    logits = torch.tensor(random.normal(size=(9, CLASSES)) * 3, dtype=torch.float32)
    target = random.integers(0, CLASSES, 9)
    batch = {"image": None, "target": torch.from_numpy(target)}
    total, count = ClassifyTask(tuple("abcd"), **WAYS[way]).loss(lambda _: logits, batch)["loss"]
    hand, hand_count = expected(logits.numpy(), [(1.0, int(t), 0) for t in target], **WAYS[way])
    assert float(total) == pytest.approx(hand, rel=1e-6) and float(count) == pytest.approx(hand_count, rel=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_weight_decay_is_decoupled_for_adamw(fused):
    """w <- (1 - lr decay) w - lr m / (sqrt(v) + eps): the decay neither enters the moments nor is scaled by them."""
    lr, decay, betas = 0.03, 0.2, (0.9, 0.999)
    model = nn.Linear(3, 2).to(torch.float32 if fused else torch.float64)
    optimizer = build_optimizer(model, [ParameterGroup("w", ("weight",), lr, decay), ParameterGroup("b", ("bias",), lr, 0.0)],
                                kind="adamw", momentum=betas[0])  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = lr
    hand = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    first, second = ({n: torch.zeros_like(p) for n, p in hand.items()} for _ in range(2))
    for step in range(1, 6):
        for name, parameter in model.named_parameters():
            gradient = torch.full_like(parameter, 0.1 * step if name == "bias" else -0.2)
            parameter.grad = gradient
            first[name] = betas[0] * first[name] + (1 - betas[0]) * gradient
            second[name] = betas[1] * second[name] + (1 - betas[1]) * gradient**2
            move = first[name] / (1 - betas[0] ** step) / ((second[name] / (1 - betas[1] ** step)).sqrt() + 1e-8)
            hand[name] = hand[name] * (1 - lr * (decay if name == "weight" else 0)) - lr * move
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert float((parameter.detach().double() - hand[name]).abs().max()) < (1e-6 if fused else 1e-12), name
