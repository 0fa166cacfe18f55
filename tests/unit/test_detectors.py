"""Detectors: losses and decoding equal the library's, sums add up over parts, objects are chosen alike in torch and in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models.detection.image_list import ImageList

from boxes import SHAPE, scene_batch, targets
from goodfit.config.detector import FAMILIES as ALL_FAMILIES
from goodfit.models.detection.build import make_family, make_network
from goodfit.models.detection.choose import choose_objects
from goodfit.models.detection.fcos import Fcos
from goodfit.models.detection.rcnn import _centred
from goodfit.models.detection.retinanet import level_anchors
from goodfit.outcome.detector_export import export_detector, traced_problem
from goodfit.runtime.detections import Selection, box_iou, select_objects, suppress_doubles
from goodfit.runtime.letterbox import Letterbox
from goodfit.runtime.masks import paste_mask
from goodfit.tasks.detect import DetectTask

FAMILIES = [name for name in ALL_FAMILIES if name != "detr"]  # those over a pyramid; test_detr.py has the others


def network(levels=5, seed=0, classes=3, family="fcos"):
    torch.manual_seed(seed)
    made = make_network(family, "resnet10t", num_classes=classes, channels=32, convs=1, levels=levels)
    made.pyramid.prune()
    if family != "fcos":
        return made.eval()
    torch.nn.init.normal_(made.head.regression_head.bbox_reg.weight, std=0.2)
    torch.nn.init.constant_(made.head.regression_head.bbox_reg.bias, 2.0)
    return made.eval()


class Backbone(torch.nn.Module):
    """The pyramid of a network as torchvision takes one; the network stays what it is, in its own mode."""

    out_channels = 32

    def __init__(self, net):
        super().__init__()
        self._pyramid = [net.pyramid]

    def forward(self, images):
        return {str(k): m for k, m in enumerate(self._pyramid[0](images))}


def as_lists(boxes, labels, *, first=0):
    return [{"boxes": b[c >= 0], "labels": c[c >= 0] + first} for b, c in zip(boxes, labels, strict=True)]


def library(net, levels=5):
    """torchvision's own FCOS around the same head."""
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    sizes = tuple((8 * 2**k,) for k in range(levels))
    return FCOS(Backbone(net), num_classes=3, head=net.head, anchor_generator=AnchorGenerator(sizes, ((1.0,),) * levels),
                min_size=min(SHAPE), max_size=max(SHAPE), image_mean=[0, 0, 0], image_std=[1, 1, 1], size_divisible=1,
                score_thresh=0.05, nms_thresh=0.6, detections_per_img=100, topk_candidates=10_000)  # fmt: skip


@pytest.mark.parametrize("levels", [3, 4, 5])
@torch.no_grad()
def test_fcos_losses_equal_the_library(levels):
    net, images = network(levels), torch.rand(4, 3, *SHAPE)
    boxes, labels = targets(1)
    family = Fcos(strides=tuple(8 * 2**k for k in range(levels)), thin=False)
    made = family.terms(net, net(images), boxes, labels, SHAPE)
    theirs = library(net, levels).train()
    net.pyramid.eval()
    wanted = theirs(list(images), as_lists(boxes, labels))
    for mine, name in (("classes", "classification"), ("boxes", "bbox_regression"), ("centre", "bbox_ctrness")):
        total, count = made[mine]
        assert int(count) > 0
        assert float(total / count) == pytest.approx(float(wanted[name]), rel=1e-5), name


def test_long_thin_objects_are_answered_for_wherever_they_lie():
    """Of 16 to 1, at every height; what has places of its own level keeps them alone."""
    shape = (256, 320)
    boxes = torch.stack([torch.tensor([20.0, y, 300.0, y + 17.5]) for y in torch.linspace(0, 200, 41)])
    square = torch.tensor([[40.0, 40.0, 140.0, 140.0]])

    def answers(family, boxes):
        places = family.places(shape, boxes.device)
        return torch.stack(
            [family._match(*places, b[None], torch.zeros(1, dtype=torch.int64)) >= 0 for b in boxes]
        ), places[2]

    found, levels = answers(Fcos(), boxes)
    theirs, _ = answers(Fcos(thin=False), boxes)
    lost = ~theirs.any(1)
    assert found.any(1).all() and 10 < int(lost.sum()) < 35
    assert torch.equal(found[~lost], theirs[~lost]) and (levels[found[lost].any(0)] >= 1).all()
    assert torch.equal(answers(Fcos(), square)[0], answers(Fcos(thin=False), square)[0])


@torch.no_grad()
def test_fcos_decoding_equals_the_library():
    net, images = network(), torch.rand(3, 3, *SHAPE)
    torch.nn.init.normal_(net.head.classification_head.cls_logits.weight, std=0.5)
    boxes, scores = Fcos().decode(net, net(images), SHAPE)
    wanted = library(net).eval()(list(images))
    for n in range(3):
        found = choose_objects(boxes[n], scores[n], Selection(threshold=0.05, candidates=100_000))
        assert len(found.scores) == len(wanted[n]["scores"]) > 3
        assert torch.allclose(found.scores, wanted[n]["scores"], atol=1e-5)
        assert torch.allclose(found.boxes, wanted[n]["boxes"], atol=1e-3)
        assert torch.equal(found.classes, wanted[n]["labels"])


@torch.no_grad()
def test_sums_and_counts_of_a_batch_are_those_of_its_parts():
    net, images = network(), torch.rand(4, 3, *SHAPE)
    boxes, labels = targets(2)
    family = Fcos()
    whole = family.terms(net, net(images), boxes, labels, SHAPE)
    parts = [family.terms(net, net(images[p]), boxes[p], labels[p], SHAPE) for p in (slice(0, 1), slice(1, 4))]
    assert int(parts[0]["boxes"][1]) == 0  # the image without an object
    for name, (total, count) in whole.items():
        assert float(sum(p[name][0] for p in parts)) == pytest.approx(float(total), rel=1e-5)
        assert int(sum(p[name][1] for p in parts)) == int(count)


@pytest.mark.parametrize("name", ["retinanet", "ssdlite", "fasterrcnn"])
@torch.no_grad()
def test_every_family_learns_from_two_thousand_boxes_in_an_image(name):
    family, net = make_family(name, 3), network(3, family=name).train()
    low = torch.rand(1, 2000, 2) * 90
    batch = {"image": torch.rand(1, 3, *SHAPE), "boxes": torch.cat([low, low + 4 + 20 * torch.rand(1, 2000, 2)], dim=2),
             "classes": (torch.arange(2000) % 3)[None]}  # fmt: skip
    assert all(bool(torch.isfinite(total)) for total, _ in family.loss(net, batch).values())


@torch.no_grad()
def test_an_image_without_objects_and_one_with_two_thousand():
    net, images = network(), torch.rand(2, 3, *SHAPE)
    boxes = torch.zeros(2, 2000, 4)
    low = torch.rand(2000, 2) * 100
    boxes[1] = torch.cat([low, low + 4 + 20 * torch.rand(2000, 2)], dim=1)
    labels = torch.full((2, 2000), -1)
    labels[1] = torch.arange(2000) % 3
    made = Fcos().terms(net, net(images), boxes, labels, SHAPE)
    assert all(bool(torch.isfinite(total)) for total, _ in made.values())
    none = Fcos().terms(net, net(images), boxes[:, :0], labels[:, :0], SHAPE)
    assert float(none["boxes"][0]) == 0.0 and bool(torch.isfinite(none["classes"][0]))


@pytest.mark.parametrize("seed", range(3))
def test_objects_are_chosen_alike_in_torch_and_in_numpy(seed):
    draw = np.random.default_rng(seed)
    low = draw.uniform(0, 100, (400, 2))
    boxes = np.concatenate([low, low + draw.uniform(5, 40, (400, 2))], axis=1).astype(np.float32)
    scores = (draw.random((400, 3)) ** 3).astype(np.float32)
    how = Selection(threshold=0.1, iou=0.5, candidates=300, most=50)
    mine = select_objects(boxes, scores, how)
    theirs = choose_objects(torch.from_numpy(boxes), torch.from_numpy(scores), how)
    assert len(mine[1]) == 50
    for ours, other in zip(mine, (theirs.boxes, theirs.scores, theirs.classes), strict=False):
        assert np.array_equal(ours, other.numpy())


def test_doubles_are_of_one_class():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [50, 50, 60, 60]], np.float32)
    assert suppress_doubles(boxes, np.array([0, 0, 1, 0]), 0.5).tolist() == [0, 2, 3]
    assert box_iou(boxes[:1], boxes)[0].tolist() == pytest.approx([1.0, 0.9, 0.9, 0.0])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_one_class_by_heart_and_comes_back_from_disk(name, tmp_path):
    """The contract: a finite first step, a loss that falls, AP of 0.95 and more, the same after saving and loading. One class
    guards its numbering: with a background class, or counting from 1, nothing of class 0 would be found."""
    family = make_family(name, 3)
    net, task, batch = (
        network(3, classes=1, family=name).train(),
        DetectTask(["thing"], family),
        scene_batch(masks=family.has_masks),
    )
    figures, losses, steps = {"ap": 0.0}, [], 120
    while (
        figures["ap"] < 0.95 and len(losses) < 3 * steps
    ):  # on another processor, which rounds otherwise, more than one cycle
        optimizer = torch.optim.AdamW(net.train().parameters(), lr=2e-3)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, 2 * (1 - step / steps))
            optimizer.zero_grad()
            loss = sum(t / max(1, int(c)) for t, c in task.loss(net, batch).values())
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        with torch.no_grad():
            for _ in range(30):  # the running statistics catch up with the weights
                net(batch["image"]) if family.exports else net(batch["image"], find=family.selection)
            meter, outputs = task.meter(), task.predict(net.eval(), batch)
        meter.update(outputs, batch)
        figures = meter.compute()
    assert np.isfinite(losses).all() and np.mean(losses[-10:]) < 0.5 * losses[0]
    with torch.no_grad():
        save_file(net.state_dict(), str(tmp_path / "model.safetensors"))
        other = network(3, seed=5, classes=1, family=name)
        other.load_state_dict(load_file(str(tmp_path / "model.safetensors")))
        again = task.predict(other.eval(), batch)
    assert figures["ap"] >= 0.95, figures
    assert not family.has_masks or figures["mask_ap"] >= 0.95, figures
    for key in ("boxes", "scores", "classes"):
        assert torch.equal(outputs[key], again[key])


@pytest.mark.parametrize("name", ["fasterrcnn", "maskrcnn"])
@torch.no_grad()
def test_an_evaluation_of_two_stages_is_a_function_of_the_weights(name):
    """The library draws the samples that its terms look at; so a run that is stopped in a validation and resumed would differ."""
    family = make_family(name, 3)
    net, task, batch = (
        network(3, classes=1, family=name),
        DetectTask(["thing"], family),
        scene_batch(masks=family.has_masks),
    )
    before = torch.random.get_rng_state()
    told = [{k: float(v[0]) for k, v in task.predict(net, batch)["terms"].items()} for _ in range(3)]
    assert told[0] == told[1] == told[2] and torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(1)
    drawn = [{k: float(v[0]) for k, v in task.loss(net, batch).items()} for _ in range(3)]
    assert drawn[0] != drawn[1] or drawn[1] != drawn[2]  # without it they do differ


@pytest.mark.parametrize("most", [3, 250])
@torch.no_grad()
def test_two_stages_report_as_many_objects_as_are_asked_for(most):
    family = make_family("fasterrcnn", 3)
    net, how = network(3, classes=1, family="fasterrcnn"), Selection(threshold=0.0, iou=1.0, most=most)
    (found, _) = family.predict(net, {"image": torch.rand(1, 3, *SHAPE)}, how)
    assert len(found[0].scores) == most


def test_an_image_without_objects_teaches_ssdlite_background_and_changes_nothing_else():
    family, net = make_family("ssdlite", 3), network(3, family="ssdlite").eval()
    boxes, labels = targets(1, num=3)
    images = torch.rand(3, 3, *SHAPE)
    whole = family.terms(net, net(images), boxes, labels, SHAPE)
    rest = family.terms(net, net(images[1:]), boxes[1:], labels[1:], SHAPE)
    alone = family.terms(net, net(images[:1]), boxes[:1], labels[:1], SHAPE)
    assert int(alone["classes"][1]) == 0 and int(whole["classes"][1]) == int(rest["classes"][1]) > 0
    assert float(alone["classes"][0].detach()) > 0 and float(alone["boxes"][0].detach()) == 0
    assert float((whole["classes"][0] - rest["classes"][0] - alone["classes"][0]).detach()) == pytest.approx(
        0, abs=1e-3
    )
    learned = torch.autograd.grad(
        alone["classes"][0], list(net.head.classification_head.parameters()), allow_unused=True
    )
    assert any(g is not None and float(g.abs().max()) > 0 for g in learned)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_without_objects_teaches_every_family(name):
    family = make_family(name, 3)
    net, batch = network(3, classes=1, family=name).train(), scene_batch(masks=family.has_masks)
    for key in ("boxes", "classes", "masks"):
        if key in batch:
            batch[key] = batch[key][:, :0]
    terms = family.loss(net, batch)
    sum(t for t, _ in terms.values()).backward()
    assert all(bool(torch.isfinite(t)) for t, _ in terms.values())
    assert any(
        p.grad is not None and float(p.grad.abs().max()) > 0 for p in net.pyramid.parameters()
    )  # of background, in every one


@torch.no_grad()
def test_retinanet_losses_equal_the_library():
    from torchvision.models.detection import RetinaNet

    net, images = network(5, family="retinanet"), torch.rand(4, 3, *SHAPE)
    boxes, labels = targets(1)
    made = make_family("retinanet", 5).terms(net, net(images), boxes, labels, SHAPE)

    theirs = RetinaNet(Backbone(net), num_classes=3, head=net.head, anchor_generator=net.anchors, min_size=min(SHAPE), max_size=max(SHAPE),
                       image_mean=[0, 0, 0], image_std=[1, 1, 1], size_divisible=1).train()  # fmt: skip
    net.pyramid.eval()
    wanted = theirs(list(images), as_lists(boxes, labels))
    assert float(made["classes"][0]) / 4 == pytest.approx(float(wanted["classification"]), rel=1e-5)
    assert float(made["boxes"][0]) / 4 == pytest.approx(float(wanted["bbox_regression"]), rel=1e-5)


@torch.no_grad()
def test_ssdlite_losses_equal_the_library():
    """Also its background class, which the classes of the data come after."""
    from torchvision.models.detection.ssd import SSD

    net, images = network(5, family="ssdlite"), torch.rand(3, 3, *SHAPE)
    boxes, labels = (t[1:] for t in targets(1))  # in the library a picture without objects teaches nothing
    made = make_family("ssdlite", 5).terms(net, net(images), boxes, labels, SHAPE)

    theirs = SSD(
        Backbone(net), net.anchors, SHAPE[::-1], 4, image_mean=[0, 0, 0], image_std=[1, 1, 1], head=net.head
    ).train()
    net.eval()
    wanted = theirs(list(images), as_lists(boxes, labels, first=1))
    for mine, name in (("classes", "classification"), ("boxes", "bbox_regression")):
        total, count = made[mine]
        assert int(count) > 0 and float(total / count) == pytest.approx(float(wanted[name]), rel=1e-5), name


@pytest.mark.parametrize("name", [n for n in FAMILIES if make_family(n, 3).exports])
def test_every_one_stage_family_can_be_exported_for_any_number_of_images(name):
    box = Letterbox(width=96, height=64, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    pixels = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    assert traced_problem(network(3, family=name), box, make_family(name, 3), pixels) == ""


@pytest.mark.parametrize("name", [n for n in FAMILIES if make_family(n, 3).exports])
def test_onnx_runtime_computes_what_every_one_stage_family_does(name, tmp_path):
    """One image, and three; the file is that of a bundle, from bytes to candidates."""
    import onnxruntime

    box = Letterbox(width=96, height=64, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    path = tmp_path / "model.onnx"
    served = export_detector(network(3, family=name), box, make_family(name, 3), path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for num in (1, 3):
        with torch.inference_mode():
            wanted = served(pixels[:num])
        found = session.run(["boxes", "scores"], {"image": pixels[:num].numpy()})
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine.shape == theirs.shape and np.abs(mine - theirs.numpy()).max() < 1e-3 * max(
                1.0, float(theirs.abs().max())
            )


# what the library does otherwise


def disc(centre, radius, side=48):
    y, x = np.mgrid[:side, :side] + 0.5
    return np.hypot(x - centre[0], y - centre[1]) < radius


def shift_of(masks, box, wanted):
    """How far off, pixels, a mask lies that was learned without a mistake from what torchvision's loss projects into a box, and how much of it
    overlaps once it is pasted."""
    from torchvision.models.detection.roi_heads import project_masks_on_boxes

    boxes = torch.tensor([box])
    target = project_masks_on_boxes(masks, boxes, torch.tensor([0]), 28)
    found = paste_mask(target[0].numpy(), box, (48, 48)).whole((48, 48))
    soft, cells = target[0].numpy(), (np.arange(28) + 0.5) / 28
    middle = [
        low + (high - low) * float(soft.sum(axis) @ cells) / soft.sum()
        for axis, low, high in ((1, box[1], box[3]), (0, box[0], box[2]))
    ]
    return np.abs(middle - (np.argwhere(wanted).mean(axis=0) + 0.5)).max(), (found & wanted).sum() / (
        found | wanted
    ).sum()


@pytest.mark.parametrize("radius", [3.0, 5.0, 9.0])
@pytest.mark.parametrize("centre", [(20.0, 24.0), (20.5, 24.5), (23.3, 19.8)])
def test_masks_are_learned_where_they_lie(radius, centre):
    """A small disc in a box of half as much again: the library's reading alone puts it half a pixel to the left and up."""
    wanted = disc(centre, radius)
    box = [centre[0] - 1.6 * radius, centre[1] - 1.4 * radius, centre[0] + 1.4 * radius, centre[1] + 1.6 * radius]
    masks = torch.from_numpy(wanted[None].astype(np.uint8))
    apart, overlap = shift_of(_centred(masks), box, wanted)
    theirs, less = shift_of(masks.float(), box, wanted)
    assert apart < 0.1 and overlap >= less and overlap > (0.85 if radius < 4 else 0.93)
    assert theirs == pytest.approx(0.5, abs=0.1)
    assert _centred(torch.zeros(0, 48, 48, dtype=torch.uint8)).shape == (0, 48, 48)


@pytest.mark.parametrize("family", ["fcos", "retinanet", "ssdlite", "fasterrcnn"])
def test_places_are_a_stride_apart_also_where_it_does_not_divide_the_input(family):
    """480 pixels are seven and a half strides of 64: convolutions stand at 0, 64, ..., 448, torchvision's anchors at 0, 60, ..., 420."""
    shape, strides = (480, 640), (8, 16, 32, 64, 128)
    net = network(levels=5, family=family)
    if family == "fcos":
        middles = Fcos(strides=strides).places(shape, torch.device("cpu"))[0]
        each = 1
    elif family == "fasterrcnn":
        maps = [torch.zeros(1, 8, -(-shape[0] // s), -(-shape[1] // s)) for s in strides]
        (anchors,) = net.rpn.anchor_generator(ImageList(torch.zeros(1, 3, *shape), [shape]), maps)
        middles, each = (
            (anchors[:, :2] + anchors[:, 2:]) / 2,
            net.rpn.anchor_generator.generator.num_anchors_per_location()[0],
        )
    else:
        anchors = level_anchors(net.anchors, strides, shape, torch.device("cpu"))
        middles, each = (anchors[:, :2] + anchors[:, 2:]) / 2, net.anchors.num_anchors_per_location()[0]
    start = 0
    for stride in strides:
        rows, columns = -(-shape[0] // stride), -(-shape[1] // stride)
        part = middles[start : start + rows * columns * each]
        assert part[:, 1].max() == (rows - 1) * stride and part[:, 0].max() == (columns - 1) * stride, stride
        start += len(part)
    assert start == len(middles)
