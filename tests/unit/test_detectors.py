"""Detectors: losses and decoding equal the library's, sums add up over parts, objects are chosen alike in torch and in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from goodfit.models.detection.fcos import Fcos, build_fcos
from goodfit.runtime.detections import Selection, box_iou, select_objects, suppress_doubles
from goodfit.tasks.detect import DetectTask, select

SHAPE = (128, 192)


def targets(seed, num=4, most=6, classes=3):
    """Padded boxes and classes; the first image has none."""
    draw = torch.Generator().manual_seed(seed)
    low = torch.rand(num, most, 2, generator=draw) * torch.tensor([SHAPE[1] - 30, SHAPE[0] - 30])
    size = 6 + torch.rand(num, most, 2, generator=draw) ** 2 * 120
    boxes = torch.cat([low, torch.minimum(low + size, torch.tensor([SHAPE[1], SHAPE[0]]).float())], dim=2)
    labels = torch.randint(0, classes, (num, most), generator=draw)
    for n in range(num):
        labels[n, n * 2 :] = -1
    return boxes, labels


def network(levels=5, seed=0, classes=3):
    torch.manual_seed(seed)
    made = build_fcos("resnet10t", num_classes=classes, channels=32, num_convs=1, num_levels=levels)
    made.pyramid.prune()
    torch.nn.init.normal_(made.head.regression_head.bbox_reg.weight, std=0.2)
    torch.nn.init.constant_(made.head.regression_head.bbox_reg.bias, 2.0)
    return made.eval()


def library(net, levels=5):
    """torchvision's own FCOS around the same head."""
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    class Backbone(torch.nn.Module):
        out_channels = 32

        def forward(self, images):
            return {str(k): m for k, m in enumerate(net.pyramid(images))}

    sizes = tuple((8 * 2**k,) for k in range(levels))
    return FCOS(Backbone(), num_classes=3, head=net.head, anchor_generator=AnchorGenerator(sizes, ((1.0,),) * levels),
                min_size=min(SHAPE), max_size=max(SHAPE), image_mean=[0, 0, 0], image_std=[1, 1, 1], size_divisible=1,
                score_thresh=0.05, nms_thresh=0.6, detections_per_img=100, topk_candidates=10_000)  # fmt: skip


@pytest.mark.parametrize("levels", [3, 4, 5])
@torch.no_grad()
def test_fcos_losses_equal_the_library(levels):
    net, images = network(levels), torch.rand(4, 3, *SHAPE)
    boxes, labels = targets(1)
    family = Fcos(strides=tuple(8 * 2**k for k in range(levels)))
    made = family.loss(net(images), boxes, labels, SHAPE)
    theirs = library(net, levels).train()
    net.pyramid.eval()
    lists = [{"boxes": b[c >= 0], "labels": c[c >= 0]} for b, c in zip(boxes, labels, strict=True)]
    wanted = theirs(list(images), lists)
    for mine, name in (("classes", "classification"), ("boxes", "bbox_regression"), ("centre", "bbox_ctrness")):
        total, count = made[mine]
        assert int(count) > 0
        assert float(total / count) == pytest.approx(float(wanted[name]), rel=1e-5), name


@torch.no_grad()
def test_fcos_decoding_equals_the_library():
    net, images = network(), torch.rand(3, 3, *SHAPE)
    torch.nn.init.normal_(net.head.classification_head.cls_logits.weight, std=0.5)
    boxes, scores = Fcos().decode(net(images), SHAPE)
    wanted = library(net).eval()(list(images))
    for n in range(3):
        b, s, c = select(boxes[n], scores[n], Selection(threshold=0.05, candidates=100_000))
        assert len(s) == len(wanted[n]["scores"]) > 3
        assert torch.allclose(s, wanted[n]["scores"], atol=1e-5)
        assert torch.allclose(b, wanted[n]["boxes"], atol=1e-3)
        assert torch.equal(c, wanted[n]["labels"])


@torch.no_grad()
def test_sums_and_counts_of_a_batch_are_those_of_its_parts():
    net, images = network(), torch.rand(4, 3, *SHAPE)
    boxes, labels = targets(2)
    family = Fcos()
    whole = family.loss(net(images), boxes, labels, SHAPE)
    parts = [family.loss(net(images[p]), boxes[p], labels[p], SHAPE) for p in (slice(0, 1), slice(1, 4))]
    assert int(parts[0]["boxes"][1]) == 0  # the image without an object
    for name, (total, count) in whole.items():
        assert float(sum(p[name][0] for p in parts)) == pytest.approx(float(total), rel=1e-5)
        assert int(sum(p[name][1] for p in parts)) == int(count)


@torch.no_grad()
def test_an_image_without_objects_and_one_with_two_thousand():
    net, images = network(), torch.rand(2, 3, *SHAPE)
    boxes = torch.zeros(2, 2000, 4)
    low = torch.rand(2000, 2) * 100
    boxes[1] = torch.cat([low, low + 4 + 20 * torch.rand(2000, 2)], dim=1)
    labels = torch.full((2, 2000), -1)
    labels[1] = torch.arange(2000) % 3
    made = Fcos().loss(net(images), boxes, labels, SHAPE)
    assert all(bool(torch.isfinite(total)) for total, _ in made.values())
    none = Fcos().loss(net(images), boxes[:, :0], labels[:, :0], SHAPE)
    assert float(none["boxes"][0]) == 0.0 and bool(torch.isfinite(none["classes"][0]))


@pytest.mark.parametrize("seed", range(3))
def test_objects_are_chosen_alike_in_torch_and_in_numpy(seed):
    draw = np.random.default_rng(seed)
    low = draw.uniform(0, 100, (400, 2))
    boxes = np.concatenate([low, low + draw.uniform(5, 40, (400, 2))], axis=1).astype(np.float32)
    scores = (draw.random((400, 3)) ** 3).astype(np.float32)
    how = Selection(threshold=0.1, iou=0.5, candidates=300, most=50)
    mine = select_objects(boxes, scores, how)
    theirs = select(torch.from_numpy(boxes), torch.from_numpy(scores), how)
    assert len(mine[1]) == 50
    for ours, other in zip(mine, theirs, strict=False):
        assert np.array_equal(ours, other.numpy())


def test_doubles_are_of_one_class():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [50, 50, 60, 60]], np.float32)
    assert suppress_doubles(boxes, np.array([0, 0, 1, 0]), 0.5).tolist() == [0, 2, 3]
    assert box_iou(boxes[:1], boxes)[0].tolist() == pytest.approx([1.0, 0.9, 0.9, 0.0])


def test_one_class_can_be_learned_by_heart():
    """Guards the numbering of classes: with a background class or counting from 1, nothing of class 0 is ever found."""
    net = network(levels=3, classes=1).train()
    images = torch.zeros(2, 3, 96, 96)
    boxes = torch.tensor([[[20.0, 24.0, 52.0, 56.0]], [[40.0, 30.0, 80.0, 66.0]]])
    for n in range(2):
        left, top, right, bottom = boxes[n, 0].int().tolist()
        images[n, :, top:bottom, left:right] = 1.0
    task = DetectTask(["thing"], Fcos(strides=(8, 16, 32)))
    batch = {"image": images, "boxes": boxes, "classes": torch.zeros(2, 1, dtype=torch.int64),
             "true_boxes": boxes.double(), "true_classes": torch.zeros(2, 1, dtype=torch.int64),
             "crowd": torch.zeros(2, 1, dtype=torch.bool), "place": torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 2),
             "size": torch.tensor([[96.0, 96.0]] * 2)}  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(120):
        optimizer.zero_grad()
        sum(t / max(1, int(c)) for t, c in task.loss(net, batch).values()).backward()
        optimizer.step()
    meter = task.meter()
    with torch.no_grad():
        meter.update(task.predict(net, batch), batch)  # in training mode: the running statistics are of other weights
    assert meter.compute()["ap50"] == 1.0
