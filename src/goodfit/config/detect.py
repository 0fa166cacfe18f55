"""The plan of a detector: the shape of its input, and what else differs from one class per image.

Pure functions, and the only home of these defaults.
"""

from __future__ import annotations

import math
from typing import Any

from goodfit.config.chooser import Chooser
from goodfit.config.detector import split_model
from goodfit.config.execution import MIN_STEPS_PER_EPOCH, choose_execution, told_if_slow
from goodfit.config.facts import DataFacts, Facts, MachineFacts, ModelFacts
from goodfit.config.measured import best_batch, explain_batch
from goodfit.config.monitor import check_monitor
from goodfit.config.plan import Decision, Plan, Source
from goodfit.config.recipe import choose_recipe
from goodfit.config.request import TrainRequest
from goodfit.config.sizes import InputSizes, choose_sizes
from goodfit.config.time_rules import PASSES, choose_rehearse, passes_in
from goodfit.core.errors import RequestError

TWO_STAGES = ("fasterrcnn", "maskrcnn")
STEP = 32  # pixels: both sides of the input are multiples of it
FIGURES = ("ap", "ap50", "ap75", "loss")  # that validation gives ...
MASK_FIGURES = ("mask_ap", "mask_ap50", "mask_ap75")  # ... and of masks
TASKS = ("detect", "segment")
ENLARGED = 2  # times a picture's own side that the input may have
OBJECT_SIDE = 14.0  # pixels of the input that the smaller objects should have: two places of the finest map
BATCH = {"cpu": 8, "cuda": 16}
MASK_BATCH = 4  # on a processor: dense masks of every object take memory
CLOSE = 0.1
MOST = 100  # objects of a picture, as COCO counts them
MOST_DOUBLINGS = 3  # of the usual batch
SAMPLED = 64  # proposals of an image that a second stage learns from on a processor: an eighth of the published number
_ONE_CLASS = "this is for images with one class each"
_NOT_YET = "this is not done for detectors yet"
WHY_NOT = {  # options that detection refuses, and why
    **dict.fromkeys(("label_smoothing", "mixup", "cutmix", "policy", "erase", "dropout"), _ONE_CLASS),
    **dict.fromkeys(("lr_find", "batch_study", "drop_path"), _NOT_YET),
}
NEUTRAL: dict[str, Any] = {  # decisions that mean nothing here
    "label_smoothing": 0.0, "dropout": 0.0, "drop_path": 0.0, "policy": "off", "erase": 0.0, "mixup": 0.0,
    "cutmix": 0.0,
}  # fmt: skip


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
    imgsz = _image_size(choose, facts, step)
    batch, accumulate = _batch(choose, facts)
    recipe = choose_recipe(choose, facts, batch.value)
    if split_model(decided["model"].value)[0] == "detr":
        recipe |= _attentive(choose.unless_changed("optimizer"), facts, batch.value, recipe)
    epochs = recipe["epochs"].value
    sizes = choose_sizes(choose, facts.model, imgsz.value, epochs)
    inputs = InputSizes(imgsz=imgsz.value, epochs=epochs, step=step, multi_scale=sizes["multi_scale"].value,
                        progressive=sizes["progressive"].value)  # fmt: skip
    augmentation = _augmentation(choose, facts.data, varies=inputs.varies)
    monitor = _monitor(choose, masks=task == "segment")
    letterbox, most = _letterbox(imgsz.value, facts), _most(choose, facts.data, facts.model.most_places)
    _check_places(facts.model, inputs, letterbox.value)
    detector = decided.get("detector") or _architecture(choose.unless_changed("model"), facts.machine, inputs.smallest * min(facts.data.shape),
                                                           split_model(decided["model"].value)[0], most.value)  # fmt: skip
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
        max_det=most,
        latency=choose("latency", 0.0, "no limit was asked for"),
        latency_threads=choose("latency_threads", 1, "as a server has that answers one picture on each core"),
        monitor=monitor,
        seed=choose("seed", 0, "fixed, so that the run can be repeated"),
        deterministic=choose("deterministic", False, "the CPU repeats itself anyway; on a GPU it costs speed"),
        rehearse=choose_rehearse(choose, facts, batch.value, imgsz.value),
        **{name: Decision(value, "means nothing for a detector", "rule") for name, value in NEUTRAL.items()},
        measured=facts.measured if base is None else base.measured,
        sample_seconds=facts.sample_seconds(imgsz.value) or (0.0 if base is None else base.sample_seconds),
    )


def _balance(choose: Chooser, data: DataFacts) -> Decision[str]:
    """Whether pictures of rare classes come more often."""
    ratio = data.largest_class / max(1, data.smallest_class)
    balance = choose("balance", "off", f"the largest class has {ratio:.1f} times the objects of the smallest; sample repeats pictures of rare classes, "
                     "whose gain was not shown here")  # fmt: skip
    if balance.value not in ("off", "sample"):
        raise RequestError(f"balance={balance.value} is for images with one class each; detectors know off and sample.", where="balance=",
                           next="balance=sample")  # fmt: skip
    return balance


def _monitor(choose: Chooser, *, masks: bool) -> Decision[str]:
    """The figure of validation that is watched."""
    kind = " of the masks" if masks else ""
    monitor = choose(
        "monitor",
        "mask_ap" if masks else "ap",
        f"average precision{kind} over IoU 0.5 to 0.95; ties are broken by the loss",
    )
    check_monitor(monitor.value, (*FIGURES, *(MASK_FIGURES if masks else ())))
    return monitor


def usual_most(fullest: int) -> int:
    """How many objects of a picture are reported, at most, where the fullest training picture has so many."""
    return max(MOST, 3 * fullest // 2)


def _most(choose: Chooser, data: DataFacts, places: int) -> Decision[int]:
    """How many objects of a picture are reported, at most; of a transformer, its answers for a picture (`places`)."""
    most = usual_most(data.most_objects)
    if choose.base is not None and not choose.base.max_det.value:  # an earlier version's plan
        choose = Chooser(choose.request, None)
    decision = choose("max_det", most, f"half as many again as the fullest training picture, with {data.most_objects:,}" if most > MOST
                      else f"as COCO counts; the fullest training picture has {data.most_objects:,}")  # fmt: skip
    if not 0 < places < decision.value:
        return decision
    return Decision(
        places,
        f"{decision.value:,} {decision.reason}; this detector gives {places} answers for a picture",
        decision.source,
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


def _image_size(choose: Chooser, facts: Facts, step: int) -> Decision[int]:
    """The longer side of the input: that of the detector which training goes on from, or what the smaller objects need to be seen, within
    what the pictures have and the machine can do."""
    data, machine = facts.data, facts.machine
    low, high = (step * math.ceil(side / step) for side in ((640, 1280) if machine.device == "cuda" else (320, 640)))
    own = max(step, step * math.ceil(data.median_side / step))
    needed = OBJECT_SIDE / data.object_side if data.object_side else low
    # Larger than the pictures only where their objects are smaller than the places that answer for them.
    low, high = min(low, own), min(high, own if needed <= own else ENLARGED * own)
    size = int(min(high, max(low, step * math.ceil(needed / step))))
    reason = (f"the smaller objects take {100 * data.object_side:.1f} % of a picture's longer side, {size * data.object_side:.0f} pixels of the "
              f"input; pictures of {data.median_side} px{', enlarged' if size > own else ''}")  # fmt: skip
    first, time = facts.first_step, choose.request.time
    source: Source = "rule"
    if first is not None and time and size > low:
        passes = passes_in(time, first, size, data.num_train)
        smaller = max(low, step * math.ceil(size * min(1.0, passes / PASSES) ** 0.5 / step))
        if smaller < size:
            reason = f"{time:.0f} s hold about {passes:.2g} passes over the training pictures at {size} pixels, {passes * (size / smaller) ** 2:.2g} at {smaller}"  # fmt: skip
            size, source = smaller, "measured"
    if facts.model.bundle_imgsz:
        size, reason, source = facts.model.bundle_imgsz, "as the bundle was trained", "rule"
    decision = choose("imgsz", size, reason, source)
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


def _architecture(
    choose: Chooser, machine: MachineFacts, side: float, family: str, most: int
) -> Decision[dict[str, Any]]:
    """Width, depth and levels of the head; of two stages also what the second learns from.

    The coarsest level has two places each way at least: one alone sees nothing that the next finer does not, and torch 2.14's
    gradient of a convolution over a single pixel differs from run to run on two threads.

    Args:
        side: The shorter side of the smallest input, pixels.
        most: Objects of a picture that are to be found.
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
        value["proposals"] = max(value["proposals"], 2 * most)
    value["levels"] = max(3, min(value["levels"], int(math.log2(max(8.0, side / 2) / 8)) + 1))
    reason = (
        (
            "as published, over a pyramid from stride 8 on, its second stage a quarter as wide"
            if family in TWO_STAGES
            else "as published"
        )
        if large
        else "half the width and depth of the published head, which takes four fifths of the time on a processor"
    )
    return choose("detector", value, reason)


def usual_detector_batch(data: DataFacts, machine: MachineFacts) -> int:
    """Pictures per update where nothing was measured."""
    large = machine.device == "cuda"
    return min(
        MASK_BATCH if data.task == "segment" and not large else BATCH["cuda" if large else "cpu"], data.num_train
    )


def detector_batches(data: DataFacts, usual: int) -> tuple[int, ...]:
    """Sizes to measure, upwards: a quarter of the usual one, for a memory that is small, up to what leaves 20 updates an epoch."""
    most = max(usual, data.num_train // MIN_STEPS_PER_EPOCH)
    doubled = (usual << k for k in range(MOST_DOUBLINGS + 1))
    return tuple(sorted({max(1, usual // 4), max(1, usual // 2), *(size for size in doubled if size <= most)}))


def _batch(choose: Chooser, facts: Facts) -> tuple[Decision[int], Decision[int]]:
    """The usual size; a larger one where that was measured and pays, and in parts where it does not fit at once."""
    usual, measured = usual_detector_batch(facts.data, facts.machine), facts.measured
    batch = choose("batch", usual, "the usual size for detectors, whose pictures hold many samples each")
    accumulate = choose("accumulate", 1, "the batch fits at once")
    if measured is not None and measured.batches:
        found = best_batch([b for b in measured.batches if b.batch >= usual], measured.memory)
        fitting = [b for b in measured.batches if not b.problem and b.memory <= measured.memory]
        if found is not None:
            batch = choose("batch", found.batch, explain_batch(measured.batches, found, measured.memory), "measured")
        too_large = any(
            b.memory > measured.memory or "memory" in b.problem or "GB" in b.problem for b in measured.batches
        )
        largest = max((b.batch for b in fitting), default=1)
        if batch.value > largest and too_large:
            reason = f"{largest} picture{'s' if largest > 1 else ''} at once fit{'' if largest > 1 else 's'} into {measured.memory / 1e9:.1f} GB"
            accumulate = choose("accumulate", min(batch.value, math.ceil(batch.value / largest)), reason, "measured")
        if batch.source == "asked":
            batch = told_if_slow(batch, measured)
    if accumulate.value > batch.value or batch.value > facts.data.num_train:
        most = facts.data.num_train
        raise RequestError(f"batch={batch.value} with accumulate={accumulate.value} does not fit: the training split has {most} pictures.",
                           next=f"use batch={min(usual, most)} and accumulate=1")  # fmt: skip
    return batch, accumulate


def _augmentation(choose: Chooser, data: DataFacts, *, varies: bool) -> dict[str, Decision[Any]]:
    """`varies`: whether batches have several sizes, which end with the rest."""
    augment = choose("augment", "standard", "zoom and colour")
    own = choose.unless_changed("augment", keep_asked=True)
    off = augment.value == "off"
    grey = data.grey_share > 0.5 and data.num_classes > 1  # of one class a mirror image is of the same
    flip = own("flip", 0.0 if off or grey else 0.5, "augmentation is off" if off else
                  "grey pictures: may be characters or scans, where a mirror image means something else" if grey else
                  "pictures mean the same mirrored" if data.num_classes > 1 else "of one class a mirror image is of the same")  # fmt: skip
    scale = own("scale", 0.0, "as the preset")
    mosaic = own(
        "mosaic",
        0.5 if augment.value == "strong" else 0.0,
        "part of the strong preset" if augment.value == "strong" else "helps only long training",
    )
    masks = data.task == "segment"
    if choose.request.copy_paste and not masks:
        raise RequestError(
            "copy_paste= needs masks, and the data has boxes only.", where="copy_paste=", next="leave it out"
        )
    copies = own("copy_paste", 0.5 if masks and augment.value == "strong" else 0.0, "there are no masks" if not masks else
                    "part of the strong preset" if augment.value == "strong" else "helps only long training")  # fmt: skip
    nothing = off and not (mosaic.value or copies.value or scale.value or varies)
    close = own("close_augment", 0.0 if nothing else CLOSE, "nothing to switch off" if nothing else
                   "the last tenth of the epochs without mosaic, copies and colour, and with a third of the zoom")  # fmt: skip
    return {
        "augment": augment,
        "balance": _balance(choose, data),
        "flip": flip,
        "scale": scale,
        "mosaic": mosaic,
        "copy_paste": copies,
        "close_augment": close,
    }
