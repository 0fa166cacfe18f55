"""transformers' detectors behind the contract of a family: numbering of classes, heads, precision, denoising, parity, refusals."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the extra detr is not installed")
pytest.importorskip("scipy", reason="the extra detr is not installed")

from boxes import scene_batch, targets  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_detr import TINY, write_tiny  # noqa: E402

from goodfit.core.errors import RequestError, WeightsError  # noqa: E402
from goodfit.engine.ema import Ema  # noqa: E402
from goodfit.models.detection import detr  # noqa: E402
from goodfit.models.detection.build import make_family  # noqa: E402
from goodfit.models.detection.detr import DetrNetwork, settings  # noqa: E402
from goodfit.models.detection.detr_source import find_detr  # noqa: E402
from goodfit.models.detection.transfer import take_tensors  # noqa: E402
from goodfit.outcome.detector_export import export_detector, traced_problem  # noqa: E402
from goodfit.runtime.letterbox import Letterbox  # noqa: E402
from goodfit.tasks.detect import DetectTask  # noqa: E402

KINDS = tuple(TINY)
BOX = Letterbox(width=96, height=96, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def network(kind, *, classes=1, seed=0, masks=False, **more):
    torch.manual_seed(seed)
    return DetrNetwork({"model_type": kind, **TINY[kind], **more}, num_classes=classes, masks=masks)


def learned(net, task, batch, steps, lr=2e-3):
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-4)
    losses = []
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        (total, count), = task.loss(net, batch).values()
        loss = total / max(1, int(count))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", [*KINDS, "masks"])
def test_one_class_is_learned_by_heart_and_comes_back_from_disk(kind, tmp_path):
    masks = kind == "masks"
    family = make_family("detr", 0, masks=masks)
    kind = "rf_detr" if masks else kind
    net, task, batch = network(kind, masks=masks).train(), DetectTask(["thing"], family), scene_batch(masks=masks)
    losses = learned(net, task, batch, 250)
    assert np.isfinite(losses).all() and np.mean(losses[-10:]) < 0.5 * losses[0]
    with torch.no_grad():
        for _ in range(30):  # the running statistics catch up with the weights
            net(batch["image"])
        meter, outputs = task.meter(), task.predict(net.eval(), batch)
        meter.update(outputs, batch)
        save_file({k: v.clone() for k, v in net.state_dict().items()}, str(tmp_path / "model.safetensors"))
        other = network(kind, seed=5, masks=masks)
        other.load_state_dict(load_file(str(tmp_path / "model.safetensors")))
        again = task.predict(other.eval(), batch)
    figures = meter.compute()
    assert figures["ap50"] >= 0.95, figures
    assert figures["ap"] >= 0.8, figures
    assert not masks or figures["mask_ap50"] >= 0.95, figures
    for key in ("boxes", "scores", "classes"):
        assert torch.equal(outputs[key], again[key])


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_that_knows_classes_is_named(kind):
    """The trap: a head of the first stage, or the embedding of noisy labels, keeps the rows of other classes."""
    few, more = network(kind, classes=3).state_dict(), network(kind, classes=7).state_dict()
    differ = {name for name, tensor in few.items() if tensor.shape != more[name].shape}
    named = {f"{layer.name}.{part}" for layer in network(kind, classes=3).class_layers for part in ("weight", "bias")}
    assert differ and differ == named & set(few)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_keep_their_rows_by_name_also_where_their_number_is_the_same(kind):
    old, new = network(kind, classes=3), network(kind, classes=3, seed=9)
    before = {k: v.clone() for k, v in new.state_dict().items()}
    report = take_tensors(new, old.state_dict(), ["cat", "dog", "cow"], ["dog", "bird", "cat"], where="here", next="")
    assert report.known == ("dog", "cat")
    theirs, mine = old.state_dict(), new.state_dict()
    for layer in new.class_layers:
        name = f"{layer.name}.weight"
        assert torch.equal(mine[name][0], theirs[name][1]) and torch.equal(mine[name][2], theirs[name][0])
        assert torch.equal(mine[name][1], before[name][1])  # a bird was never seen
        if layer.padding:
            assert torch.equal(mine[name][-1], theirs[name][-1])
    layers = {layer.name for layer in new.class_layers}
    assert all(torch.equal(mine[k], v) for k, v in theirs.items() if k.rpartition(".")[0] not in layers)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_attention_are_in_float32_under_autocast(kind):
    net, batch = network(kind, classes=3).train(), scene_batch()
    seen = []

    def watch(function):
        return lambda logits, *more, **named: seen.append(logits.dtype) or function(logits, *more, **named)

    net.network.loss_function = detr._Loss(watch(net.network.loss_function.function))
    attention = [m for m in net.modules() if type(m).__name__.endswith("MultiscaleDeformableAttention")]
    assert attention
    inside = []
    for module in attention:
        for child in module.children():
            child.register_forward_hook(lambda _m, _i, made: inside.append(made.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        (total, _), = make_family("detr", 0).loss(net, batch).values()
    assert seen == [torch.float32] and total.dtype == torch.float32
    assert inside and set(inside) == {torch.float32}


def test_an_average_of_the_weights_computes_with_its_own():
    """Copies must not call the methods of what they were copied from."""
    net = network("d_fine").eval()
    average = Ema(net, 0.9)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        image = torch.rand(1, 3, 96, 96)
        other = network("d_fine", seed=3)
        other.load_state_dict(average.model.state_dict())
        assert torch.equal(average.model(image).pred_boxes, other.eval()(image).pred_boxes)
        assert not torch.equal(average.model(image).pred_boxes, net(image).pred_boxes)


def test_old_versions_learn_without_denoising(monkeypatch):
    assert settings({"model_type": "d_fine", **TINY["d_fine"]}, 3).num_denoising == 10
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    assert settings({"model_type": "d_fine", **TINY["d_fine"]}, 3).num_denoising == 0


def test_what_belongs_to_one_size_is_left_away():
    made = settings({"model_type": "d_fine", **TINY["d_fine"], "anchor_image_size": [640, 640], "eval_size": [640, 640]}, 3)
    assert made.anchor_image_size is None and made.eval_size is None


@pytest.mark.parametrize("kind", ["rt_detr_v2", "rf_detr"])  # the others leave layers away in evaluation
def test_validation_loss_is_that_of_training_where_nothing_is_random(kind):
    more = {"group_detr": 1} if kind == "rf_detr" else {"num_denoising": 0}
    net, batch, family = network(kind, classes=3, **more), scene_batch(), make_family("detr", 0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        net.eval()
        (evaluated, _), = family.predict(net, batch, family.selection)[1].values()
        net.train()
        for module in net.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm | torch.nn.Dropout):
                module.eval()
        (trained, _), = family.loss(net, batch).values()
    assert float(evaluated) == pytest.approx(float(trained), rel=1e-4)


def test_groups_of_training_are_not_counted_in_evaluation():
    net, batch, family = network("rf_detr", classes=3).eval(), scene_batch(), make_family("detr", 0)
    with torch.no_grad():
        (mine, count), = family.predict(net, batch, family.selection)[1].values()
        other = network("rf_detr", classes=3, group_detr=1).eval()
        own, found = other.state_dict(), net.state_dict()
        other.load_state_dict({k: found[k][: len(v)] if v.ndim and len(v) else found[k] for k, v in own.items()})
        (wanted, _), = family.predict(other, batch, family.selection)[1].values()
    assert int(count) == 2 and float(mine) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_many_objects_and_none(kind):
    net, family = network(kind, classes=3).train(), make_family("detr", 0)
    boxes, labels = targets(3, num=2, most=30)
    labels[0] = -1
    batch = {"image": torch.rand(2, 3, 96, 192), "boxes": boxes.clamp(max=90), "classes": labels}
    for which in (slice(0, 2), slice(0, 1)):
        (total, count), = family.loss(net, {k: v[which] for k, v in batch.items()}).values()
        total.backward()
        assert bool(torch.isfinite(total))
    assert int(count) == 0


@pytest.mark.alone
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_gives_the_same_as_a_set(kind, tmp_path):
    import onnxruntime

    from goodfit.outcome.detector_export import _difference

    net, family = network(kind, classes=3).train(), make_family("detr", 0)
    learned(net, DetectTask(["a", "b", "c"], family), scene_batch(), 60)  # a new one rates all places alike: rounding would choose
    net.eval()
    pixels = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert traced_problem(net, BOX, family, pixels) == ""
        served = export_detector(net, BOX, family, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession((tmp_path / "model.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    for one in pixels.split(1):
        with torch.no_grad():
            wanted = [t.numpy() for t in served(one)]
        found = session.run(["boxes", "scores"], {"image": one.numpy()})
        assert _difference(found, wanted, 0.0) <= 1e-3
        shuffled = [f[:, ::-1] for f in found]
        assert _difference(shuffled, wanted, 0.0) <= 1e-3 < _difference(shuffled, wanted, None)
        moved = [found[0] + 5.0, found[1]]
        assert _difference(moved, wanted, 0.0) > 1e-2


def test_a_folder_says_what_it_is(tmp_path):
    folder = write_tiny(tmp_path / "tiny", "d_fine", labels=["cat", "dog"])
    facts, config = find_detr(str(folder), "true", asked=True, masks=False)
    assert facts.weights == str(folder / "model.safetensors") and facts.labels == ("cat", "dog") and facts.size_step == 32
    assert config["model_type"] == "d_fine" and facts.mean == (0.0, 0.0, 0.0)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.2] * 3}))
    assert find_detr(str(folder), "false", asked=False, masks=False)[0].mean == (0.5, 0.5, 0.5)


def test_sides_hold_whole_windows_of_patches(tmp_path):
    folder = write_tiny(tmp_path / "tiny", "rf_detr", labels=["cat"])
    facts, _ = find_detr(str(folder), "true", asked=True, masks=False)
    assert facts.size_step == 16 and facts.mean[0] == pytest.approx(0.485)


def test_from_scratch_the_norms_of_the_backbone_learn(tmp_path):
    folder = write_tiny(tmp_path / "tiny", "d_fine", labels=["cat"], freeze_backbone_batch_norms=True)
    assert find_detr(str(folder), "true", asked=True, masks=False)[1]["freeze_backbone_batch_norms"]
    assert not find_detr(str(folder), "false", asked=True, masks=False)[1]["freeze_backbone_batch_norms"]


def test_what_cannot_be_used_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        find_detr("some/detector", "true", asked=False, masks=False)
    with pytest.raises(RequestError, match="neither a folder"):
        find_detr("nowhere", "true", asked=False, masks=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(RequestError, match="none of the detectors"):
        find_detr(str(tmp_path), "true", asked=False, masks=False)
    folder = write_tiny(tmp_path / "tiny", "d_fine", labels=["cat"])
    with pytest.raises(RequestError, match="no masks"):
        find_detr(str(folder), "true", asked=False, masks=True)
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in find_detr(str(folder), "true", asked=False, masks=False)[0].weights_problem
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        find_detr(str(folder), "true", asked=True, masks=False)
    (folder / "config.json").write_text(json.dumps({"model_type": "d_fine", "d_model": "wide"}))
    with pytest.raises(RequestError, match="cannot build|can build"):
        find_detr(str(folder), "false", asked=False, masks=False)
