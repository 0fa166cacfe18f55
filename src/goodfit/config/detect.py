"""The plan of a detector: which family over which backbone, the shape of its input, and what else differs from one class per image.

Pure functions, and the only home of these defaults.
"""

from __future__ import annotations

import math
from typing import Any

from goodfit.config.chooser import Chooser
from goodfit.config.execution import choose_execution
from goodfit.config.facts import DataFacts, Facts, MachineFacts, ModelFacts
from goodfit.config.monitor import check_monitor
from goodfit.config.plan import Decision, Plan
from goodfit.config.recipe import choose_recipe
from goodfit.config.request import TrainRequest
from goodfit.config.sizes import InputSizes, choose_sizes
from goodfit.core.errors import RequestError

FAMILIES = ("fcos", "retinanet", "ssdlite", "fasterrcnn", "maskrcnn", "detr")
BOX_FAMILIES = ("fcos", "retinanet", "ssdlite", "fasterrcnn", "detr")
MASK_FAMILIES = ("maskrcnn", "detr")
TWO_STAGES = ("fasterrcnn", "maskrcnn")
STEP = 32  # pixels: both sides of the input are multiples of it
FIGURES = ("ap", "ap50", "ap75", "loss")  # that validation gives ...
MASK_FIGURES = ("mask_ap", "mask_ap50", "mask_ap75")  # ... and of masks
TASKS = ("detect", "segment")
OBJECT_SIDE = 14.0  # pixels of the input that the smaller objects should have: two places of the finest map
BATCH = {"cpu": 8, "cuda": 16}
MASK_BATCH = 4  # on a processor: dense masks of every object take memory
CLOSE = 0.1
SAMPLED = 64  # proposals of an image that a second stage learns from on a processor: an eighth of the published number
_ONE_CLASS = "this is for images with one class each"
_NOT_YET = "this is not done for detectors yet"
WHY_NOT = {  # options that detection refuses, and why
    **dict.fromkeys(("label_smoothing", "mixup", "cutmix", "policy", "erase", "balance", "dropout"), _ONE_CLASS),
    **dict.fromkeys(("lr_find", "batch_study", "latency", "latency_threads", "drop_path", "memory"), _NOT_YET),
}
NEUTRAL: dict[str, Any] = {  # decisions that mean nothing here
    "label_smoothing": 0.0, "dropout": 0.0, "drop_path": 0.0, "balance": "off", "policy": "off", "erase": 0.0, "mixup": 0.0,
    "cutmix": 0.0, "latency": 0.0, "latency_threads": 1,
}  # fmt: skip
SCRATCH = ("resnet10t", "small pictures, which share little with the photos that weights were trained on")
SMALL_SIDE = 160  # pixels
BACKBONES = {
    "cpu": ("mobilenetv2_100", "few multiply-adds and good maps: a processor"),
    "cuda": ("resnet50", "this GPU has room for it"),
}


def split_model(name: str | None) -> tuple[str, str]:
    """Family and backbone of a name as `fcos/resnet18`, `fcos` or `resnet18`; "" where it says nothing.

    Raises:
        RequestError: there is no such family.
    """
    if not name:
        return "", ""
    first, slash, rest = name.partition("/")
    if first == "detr" and not rest:
        raise RequestError("model=detr says no detector of transformers.", where="model=",
                           next="model=detr/FOLDER, or model=detr/ORG/NAME of the hub, as in detr/ustc-community/dfine-nano-coco")  # fmt: skip
    if first in FAMILIES:
        return first, rest
    if slash:
        raise RequestError(f"There is no family of detectors called {first}.", where="model=",
                           next=f"{', '.join(FAMILIES)}, as in model={FAMILIES[0]}/resnet18")  # fmt: skip
    return "", first


def resolve_detector(
    request: TrainRequest, data: DataFacts, machine: MachineFacts, base: Plan | None = None, *, weights: bool = True
) -> tuple[Decision[str], Decision[str]]:
    """The model, as family/backbone, and where its pretrained weights come from.

    The backbone is "" where it is to be found by the tensors of a weight file.

    Args:
        weights: Whether pretrained weights can be had, as far as is known.

    Raises:
        RequestError: there is no such family, or it does not fit the task.
    """
    choose = Chooser(request, base)
    masks, small = data.task == "segment", data.median_side <= SMALL_SIDE
    if base is not None and base.task.value != data.task:
        raise RequestError(
            f"plan={request.plan}: this is a plan for the task {base.task.value}.",
            next=f"give one for the task {data.task}",
        )
    family, backbone = split_model(request.model if base is None or request.model else base.model.value)
    if base is not None and request.pretrained is None:
        same = {"file": base.weights.value, "hub": "true"}.get(base.pretrained.value, "false")
        pretrained = Decision(same, base.pretrained.reason, base.pretrained.source)
    else:
        pretrained = choose("pretrained", "false" if small else "true", f"pictures of {data.median_side} px share little with photos" if small else
                            f"{data.num_train:,} pictures: a backbone that has seen photos learns far faster")  # fmt: skip
    file = pretrained.value not in ("true", "false")
    usual, why = BACKBONES["cuda" if machine.device == "cuda" else "cpu"]
    if small or not weights:
        usual, why = SCRATCH[0], SCRATCH[1] if small else "no pretrained weights: the smallest that learns from scratch"
    family = family or ("maskrcnn" if masks else FAMILIES[0])
    if family not in (MASK_FAMILIES if masks else BOX_FAMILIES):
        raise RequestError(f"model={family}: this family gives {'no masks' if masks else 'masks'}, and the data {'has some' if masks else 'has none'}.",
                           where="model=", next=f"use model={MASK_FAMILIES[0] if masks else FAMILIES[0]}, or task=detect to learn the boxes alone")  # fmt: skip
    kind = "two stages, of which the second gives masks" if masks else "one stage without anchors to choose"
    if family == "detr":
        kind = "a transformer that gives one answer for an object"
    reason = f"{family}, {kind}; {why}" if not backbone else "asked for"
    if not backbone and not (file and pretrained.source == "asked"):
        backbone = usual
    source = "asked" if request.model is not None else "rule" if base is None else base.model.source
    return Decision(f"{family}/{backbone}", reason, source), pretrained


def resolve_detect(
    request: TrainRequest, facts: Facts, decided: dict[str, Decision[Any]], base: Plan | None = None
) -> Plan:
    """Decide everything for a detector.

    Args:
        request: What was asked.
        facts: About the data, the machine and the backbone, which is `facts.model`.
        decided: What was decided about the data, and the model with its weights.
        base: An earlier plan to follow where nothing is asked.

    Raises:
        RequestError: asked values contradict each other or the facts, or mean nothing for a detector.
    """
    refused = [f"{name}: {why}" for name, why in WHY_NOT.items() if getattr(request, name) is not None]
    if refused:
        raise RequestError("Detection does not take this:\n" + "\n".join(f"  {line}" for line in refused), kept="nothing was started",
                           next="leave it out")  # fmt: skip
    task = decided["task"].value
    choose = Chooser(request, base)
    step = facts.model.size_step
    imgsz = _image_size(choose, facts.data, facts.machine, step)
    batch, accumulate = _batch(choose, facts)
    recipe = choose_recipe(choose, facts, batch.value)
    if split_model(decided["model"].value)[0] == "detr":
        recipe |= _attentive(choose.unless_changed("optimizer"), facts, batch.value, recipe)
    epochs = recipe["epochs"].value
    sizes = choose_sizes(choose, facts.model, imgsz.value, epochs)
    inputs = InputSizes(imgsz=imgsz.value, epochs=epochs, step=step, multi_scale=sizes["multi_scale"].value,
                        progressive=sizes["progressive"].value)  # fmt: skip
    augmentation = _augmentation(choose, facts.data)
    masks = task == "segment"
    monitor = choose(
        "monitor",
        "mask_ap" if masks else "ap",
        f"average precision{' of the masks' if masks else ''} over IoU 0.5 to 0.95; ties are broken by the loss",
    )
    check_monitor(monitor.value, (*FIGURES, *(MASK_FIGURES if masks else ())))
    letterbox = _letterbox(imgsz.value, facts)
    _check_places(facts.model, inputs, letterbox.value)
    detector = decided.get("detector") or _architecture(choose.unless_changed("model"), facts.machine, inputs.smallest * min(facts.data.shape),
                                                                 split_model(decided["model"].value)[0])  # fmt: skip
    settled: dict[str, Any] = {**decided, "detector": detector}
    return Plan(
        **settled,
        imgsz=imgsz,
        preprocessing=letterbox,
        batch=batch,
        accumulate=accumulate,
        **recipe,
        **sizes,
        **augmentation,
        **choose_execution(choose, facts, inputs, augmentation["scale"].value),
        monitor=monitor,
        seed=choose("seed", 0, "fixed, so that the run can be repeated"),
        deterministic=choose("deterministic", False, "the CPU repeats itself anyway; on a GPU it costs speed"),
        rehearse=choose("rehearse", True, "a minute now against a night lost"),
        **{name: Decision(value, "means nothing for a detector", "rule") for name, value in NEUTRAL.items()},
        measured=facts.measured if base is None else base.measured,
    )


def _refuse_layers(recipe: dict[str, Decision[Any]]) -> None:
    """The library does not say which layer of its networks comes after which."""
    asked = [f"layer_decay={recipe['layer_decay'].value:g}"] if recipe["layer_decay"].value < 1 else []
    asked += [f"freeze={recipe['freeze'].value}"] if recipe["freeze"].value.isdigit() else []
    asked += ["unfreeze=gradual"] if recipe["unfreeze"].value == "gradual" else []
    if asked:
        raise RequestError(f"{' and '.join(asked)}: this is not done for detectors of transformers, whose layers have no known order.",
                           where=f"{asked[0].partition('=')[0]}=", next="leave it out; freeze=all-but-head and patterns of names are done")  # fmt: skip


def _attentive(choose: Chooser, facts: Facts, batch: int, recipe: dict[str, Decision[Any]]) -> dict[str, Decision[Any]]:
    """Rates, decay and clipping of detectors of transformers, as their authors have them (RT-DETR: 1e-4 and a tenth of it for the
    backbone at batch 16, decay 1e-4, gradients' norm at most 0.1), by the square-root rule; of other optimizers than AdamW nothing."""
    _refuse_layers(recipe)
    if recipe["optimizer"].value != "adamw":
        return {}
    peak = float(f"{1e-4 * math.sqrt(batch / 16):.3g}")
    new = facts.model.weights_kind == "none"
    rule = "1e-4 at batch 16, square-root rule, as the authors of RT-DETR have it"
    return {
        "lr": choose("lr", peak if new else float(f"{peak / 10:.3g}"), rule if new else f"a tenth of {rule}: the backbone is pretrained"),
        "head_lr": choose("head_lr", peak, rule),
        "weight_decay": choose("weight_decay", 1e-4, "as its authors have it; none on norms and biases"),
        "clip": recipe["clip"] if recipe["clip_value"].value else
        choose("clip", 0.1, "as its authors have it: attention has rare large gradients"),
    }  # fmt: skip


def _image_size(choose: Chooser, data: DataFacts, machine: MachineFacts, step: int) -> Decision[int]:
    """The longer side of the input: what the smaller objects need to be seen, within what the pictures have and the machine can do."""
    low, high = (step * math.ceil(side / step) for side in ((640, 1280) if machine.device == "cuda" else (320, 640)))
    own = max(step, step * math.ceil(data.median_side / step))
    low, high = min(low, own), min(high, own)
    needed = OBJECT_SIDE / data.object_side if data.object_side else low
    size = int(min(high, max(low, step * math.ceil(needed / step))))
    reason = (f"the smaller objects take {100 * data.object_side:.1f} % of a picture's longer side, {size * data.object_side:.0f} pixels of the "
              f"input; pictures of {data.median_side} px")  # fmt: skip
    decision = choose("imgsz", size, reason)
    rounded = max(step, round(decision.value / step) * step)
    if rounded == decision.value:
        return decision
    return Decision(
        rounded, f"{decision.value} {decision.reason}; this detector takes multiples of {step}", decision.source
    )


def _letterbox(imgsz: int, facts: Facts) -> Decision[dict[str, Any]]:
    model = facts.model
    wide, high = (1.0, 1.0) if model.square else facts.data.shape
    step = model.size_step
    width, height = (max(step, min(imgsz, step * math.ceil(imgsz * share / step - 0.25))) for share in (wide, high))
    value = {
        "fit": "letterbox",
        "width": width,
        "height": height,
        "interpolation": "bilinear",
        "mean": list(model.mean),
        "std": list(model.std),
    }
    why = "as this detector takes square inputs only" if model.square else "the shape that they have"
    return Decision(value, f"pictures are scaled into {width} × {height} pixels, {why}; the rest is grey", "rule")


def _check_places(model: ModelFacts, inputs: InputSizes, letterbox: dict[str, Any]) -> None:
    """Refuse inputs with fewer places than the detector chooses."""
    shares = [letterbox[side] / max(letterbox["width"], letterbox["height"]) for side in ("width", "height")]
    places = sum(math.prod(int(inputs.smallest * share) // stride for share in shares) for stride in model.strides)
    if model.strides and places < model.most_places:
        raise RequestError(f"{model.name} chooses {model.most_places} places of an input, and the smallest of {inputs.smallest} pixels has "
                           f"{places}.", where="imgsz=", next=f"use imgsz={math.ceil(inputs.imgsz * (model.most_places / places) ** 0.5 / STEP + 1) * STEP} "
                           "or more, or another model")  # fmt: skip


def _architecture(choose: Chooser, machine: MachineFacts, side: float, family: str) -> Decision[dict[str, Any]]:
    """Width, depth and levels of the head; of two stages also what the second learns from.

    The coarsest level has two places each way at least: one alone sees nothing that the next finer does not, and torch 2.14's
    gradient of a convolution over a single pixel differs from run to run on two threads.

    Args:
        side: The shorter side of the smallest input, pixels.
    """
    large = machine.device == "cuda"
    value = {"channels": 256, "convs": 4, "levels": 5} if large else {"channels": 128, "convs": 2, "levels": 4}
    if family == "maskrcnn" and not large:
        value["channels"] = 64
    if family in TWO_STAGES:
        # RoIAlign runs on one core of a processor; torchvision reads each cell at 2 × 2 points, of up to 1,000 proposals
        value |= (
            {"sampled": 512, "points": 2, "proposals": 1000}
            if large
            else {"sampled": SAMPLED, "points": 1, "proposals": 500}
        )
    value["levels"] = max(3, min(value["levels"], int(math.log2(max(8.0, side / 2) / 8)) + 1))
    reason = (
        "as published"
        if large
        else "half the width and depth of the published head, which takes four fifths of the time on a processor"
    )
    return choose("detector", value, reason)


def _batch(choose: Chooser, facts: Facts) -> tuple[Decision[int], Decision[int]]:
    large = facts.machine.device == "cuda"
    usual = min(
        MASK_BATCH if facts.data.task == "segment" and not large else BATCH["cuda" if large else "cpu"],
        facts.data.num_train,
    )
    batch = choose("batch", usual, "the usual size for detectors, whose pictures hold many samples each")
    accumulate = choose("accumulate", 1, "the batch fits at once")
    if accumulate.value > batch.value or batch.value > facts.data.num_train:
        most = facts.data.num_train
        raise RequestError(f"batch={batch.value} with accumulate={accumulate.value} does not fit: the training split has {most} pictures.",
                           next=f"use batch={min(usual, most)} and accumulate=1")  # fmt: skip
    return batch, accumulate


def _augmentation(choose: Chooser, data: DataFacts) -> dict[str, Decision[Any]]:
    augment = choose("augment", "standard", "zoom and colour")
    off = augment.value == "off"
    grey = data.grey_share > 0.5
    flip = choose("flip", 0.0 if off or grey else 0.5, "augmentation is off" if off else
                  "grey pictures: may be characters or scans, where a mirror image means something else" if grey else
                  "pictures mean the same mirrored")  # fmt: skip
    scale = choose("scale", 0.0, "as the preset")
    mosaic = choose(
        "mosaic",
        0.5 if augment.value == "strong" else 0.0,
        "part of the strong preset" if augment.value == "strong" else "helps only long training",
    )
    masks = data.task == "segment"
    if choose.request.copy_paste and not masks:
        raise RequestError(
            "copy_paste= needs masks, and the data has boxes only.", where="copy_paste=", next="leave it out"
        )
    copies = choose("copy_paste", 0.5 if masks and augment.value == "strong" else 0.0, "there are no masks" if not masks else
                    "part of the strong preset" if augment.value == "strong" else "helps only long training")  # fmt: skip
    nothing = off and not mosaic.value and not copies.value
    close = choose("close_augment", 0.0 if nothing else CLOSE, "nothing to switch off" if nothing else
                   "the last tenth of the epochs on whole pictures, with a third of the zoom")  # fmt: skip
    return {
        "augment": augment,
        "flip": flip,
        "scale": scale,
        "mosaic": mosaic,
        "copy_paste": copies,
        "close_augment": close,
    }
