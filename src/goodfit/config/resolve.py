"""From what was asked and what is known to a plan: pure functions, and the only home of default values.

Where nothing is measured the defaults are the guides': AdamW at 1e-3, batch 64, weight decay 0.01, 300 epochs with
patience 50, split 70/15/15. Each deviation carries its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from goodfit.config.catalogue import SMALL_SIDE, Need, choose_model, usual_imgsz
from goodfit.config.chooser import Chooser
from goodfit.config.execution import choose_batch, choose_execution
from goodfit.config.facts import DataFacts, Facts, MachineFacts, ModelFacts
from goodfit.config.measured import Measured
from goodfit.config.monitor import check_monitor
from goodfit.config.plan import Decision, Plan
from goodfit.config.recipe import choose_recipe
from goodfit.config.request import TrainRequest
from goodfit.config.sizes import InputSizes, choose_sizes
from goodfit.config.time_rules import choose_rehearse
from goodfit.core.errors import RequestError

IMBALANCE = 5.0  # largest class over smallest, from which training is balanced
BALANCE = "sample"
BALANCE_REASON = "rare classes are drawn as often as the others"
CLOSE_AUGMENT = 0.1
FIGURES = ("accuracy", "macro_f1", "loss")  # that validation gives


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPlan:
    """The decisions that audit and split need before the rest of the plan can be made."""

    split: Decision[str]
    split_seed: Decision[int]
    fraction: Decision[float]
    max_bad: Decision[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """The decisions that say which network to look up before the rest of the plan can be made."""

    model: Decision[str]
    pretrained: Decision[str]  # "true", "false", a weight name or a file


def resolve_data(request: TrainRequest, base: Plan | None = None) -> DataPlan:
    """Decide what audit and split need."""
    choose = Chooser(request, base)
    return DataPlan(
        split=choose("split", "70/15/15", "the usual shares of train/val/test"),
        split_seed=choose("split_seed", 0, "apart from seed, so that runs share one test split"),
        fraction=choose("fraction", 1.0, "the whole training split"),
        max_bad=choose("max_bad", 0.01, "more than 1 % unusable images means that the data needs a person"),
    )


def resolve_model(
    request: TrainRequest, data: DataFacts, machine: MachineFacts, base: Plan | None = None, *, weights: bool = True
) -> ModelPlan:
    """Decide which network to look up, before anything is known about it.

    Weights without `model`, a file or a name, are left to the caller, who can look into them: the model is then "".

    Args:
        weights: Whether pretrained weights can be had, as far as is known.
    """
    choose = Chooser(request, base)
    small = data.median_side <= SMALL_SIDE
    if base is not None and request.pretrained is None:
        same = {"file": base.weights.value, "hub": "true"}.get(base.pretrained.value, "false")
        pretrained = Decision(same, base.pretrained.reason, base.pretrained.source)
    elif small:
        pretrained = choose("pretrained", "false",
                            f"pictures of {data.median_side} px share little with ImageNet photos")  # fmt: skip
    else:
        pretrained = choose("pretrained", "true", f"{data.num_train:,} photos, close to ImageNet")
    if request.model is None and request.pretrained not in (None, "true", "false"):
        return ModelPlan(model=Decision("", "the network that the weights belong to", "rule"), pretrained=pretrained)
    need = Need(num_train=data.num_train, num_classes=data.num_classes, side=data.median_side, imgsz=request.imgsz or 0,
                epochs=request.epochs or 0, seconds=request.time or 0.0, device=machine.device, num_cores=machine.num_cores,
                weights=weights and pretrained.value != "false")  # fmt: skip
    choice = choose_model(need)
    return ModelPlan(model=choose("model", choice.model.name, choice.reason), pretrained=pretrained)


def resolve(request: TrainRequest, facts: Facts, base: Plan | None = None) -> Plan:
    """Decide everything.

    Args:
        request: What was asked.
        facts: What is known about data, machine and model.
        base: An earlier plan to follow where nothing is asked.

    Raises:
        RequestError: asked values contradict each other or the facts.
    """
    choose = Chooser(request, base)
    data, machine, model = facts.data, facts.machine, facts.model
    for name in ("mosaic", "copy_paste", "max_det"):
        if getattr(request, name):
            raise RequestError(
                f"{name}= is for pictures with objects, and these have one class each.",
                where=f"{name}=",
                next="leave it out",
            )
    pretrained = model.weights_kind != "none"
    imgsz = _image_size(choose, data, machine, model, pretrained)
    if facts.fitted is not None and facts.fitted.chose_size:
        imgsz = Decision(facts.fitted.chosen.imgsz, facts.fitted.reason, "measured")
    batch, accumulate = choose_batch(choose, facts)
    recipe = choose_recipe(choose, facts, batch.value)
    epochs = recipe["epochs"].value
    sizes = choose_sizes(choose, model, imgsz.value, epochs)
    inputs = InputSizes(imgsz=imgsz.value, epochs=epochs, step=sizes["size_step"].value,
                        multi_scale=sizes["multi_scale"].value, progressive=sizes["progressive"].value)  # fmt: skip
    regularisation = _regularisation(choose, data, model, pretrained, varies=inputs.varies)
    return Plan(
        **data_decisions(request, data, base),
        **_model_decisions(request, facts, base),
        imgsz=imgsz,
        preprocessing=_preprocessing(imgsz.value, model, pretrained),
        detector=Decision({}, "one class per image", "rule"),
        mosaic=Decision(0.0, "one class per image", "rule"),
        copy_paste=Decision(0.0, "one class per image", "rule"),
        max_det=Decision(0, "one class per image", "rule"),
        batch=batch,
        accumulate=accumulate,
        **recipe,
        **regularisation,
        **sizes,
        **_balance(choose, data),
        **choose_execution(choose, facts, inputs, regularisation["scale"].value),
        latency=_latency(choose, facts),
        latency_threads=choose("latency_threads", machine.num_cores, f"{machine.num_cores} cores here"),
        seed=choose("seed", 0, "fixed, so that the run can be repeated"),
        deterministic=choose("deterministic", False, "the CPU repeats itself anyway; on a GPU it costs speed"),
        rehearse=choose_rehearse(choose, facts, batch.value, imgsz.value),
        measured=_figures(facts.measured, base),
        sample_seconds=facts.sample_seconds(imgsz.value) or (0.0 if base is None else base.sample_seconds),
    )


def _figures(measured: Measured | None, base: Plan | None) -> Measured | None:
    """The figures behind a plan: those of the plan that it follows, but for a learning rate that was to be found anew."""
    if base is None or measured is None or measured.lr_range is None:
        return measured if base is None else base.measured
    return replace(base.measured or measured, lr_range=measured.lr_range)


def data_decisions(request: TrainRequest, data: DataFacts, base: Plan | None) -> dict[str, Any]:
    """What was decided about the data, by the names in the plan."""
    plan = resolve_data(request, base)
    split = plan.split
    if data.given_splits:
        made = [s for s in ("val", "test") if s not in data.given_splits]
        reason = f"{', '.join(data.given_splits)} as given"
        if made:
            reason += f"; {' and '.join(made)} cut from train, stratified"
        split = Decision(split.value, reason, split.source)
    choose = Chooser(request, base)
    return {
        "task": choose("task", data.task, "images with one class each"),
        "format": choose("format", data.format, data.format_reason),
        "split": split,
        "split_seed": plan.split_seed,
        "fraction": plan.fraction,
        "max_bad": plan.max_bad,
    }


def _model_decisions(request: TrainRequest, facts: Facts, base: Plan | None) -> dict[str, Any]:
    model = facts.model
    plan = resolve_model(request, facts.data, facts.machine, base, weights=not model.weights_problem)
    name = Decision(model.name, plan.model.reason, plan.model.source)
    if facts.fitted is not None and facts.fitted.chose_model:
        name = Decision(model.name, facts.fitted.reason, "measured")
    if model.weights_kind == "none":
        reason, source = plan.pretrained.reason, plan.pretrained.source
        if plan.pretrained.value != "false":
            reason = (
                f"from scratch, because {model.weights_problem}; photos learn far better from pretrained weights: "
                "pass pretrained=FILE.safetensors"
            )
            source = "measured"
        return {"model": name, "pretrained": Decision("false", reason, source), "weights": Decision("", "none", "rule")}
    kind = Decision(model.weights_kind, plan.pretrained.reason, plan.pretrained.source)
    return {"model": name, "pretrained": kind, "weights": Decision(model.weights, f"licence: {model.licence}", "rule")}


def _image_size(
    choose: Chooser, data: DataFacts, machine: MachineFacts, model: ModelFacts, pretrained: bool
) -> Decision[int]:
    if model.bundle_imgsz:
        size, reason = model.bundle_imgsz, "as the bundle was trained"
    else:
        size, reason = usual_imgsz(data.median_side, machine.device, model.native_imgsz)
    own = "the size the weights were trained at" if pretrained else "the model's own size"
    decision = choose("imgsz", size, reason or own)
    rounded = max(model.stride, round(decision.value / model.stride) * model.stride)
    if rounded != decision.value:
        return Decision(rounded, f"{decision.value} {decision.reason}; {model.name} takes multiples of {model.stride}",
                        decision.source)  # fmt: skip
    return decision


def _latency(choose: Chooser, facts: Facts) -> Decision[float]:
    limit = choose("latency", 0.0, "no limit was asked for")
    return limit if facts.fitted is None else Decision(limit.value, f"asked for: {facts.fitted.reason}", limit.source)


def _preprocessing(imgsz: int, model: ModelFacts, pretrained: bool) -> Decision[dict[str, Any]]:
    value = {
        "size": imgsz,
        "resize": max(imgsz, round(imgsz / model.crop_share)) if pretrained else imgsz,
        "interpolation": model.interpolation,
        "mean": list(model.mean),
        "std": list(model.std),
    }
    reason = "as the weights were trained" if pretrained else "shorter side to the input size, centre cut out"
    return Decision(value, reason, "rule")


def _regularisation(
    choose: Chooser, data: DataFacts, model: ModelFacts, pretrained: bool, *, varies: bool
) -> dict[str, Any]:
    small = data.median_side <= SMALL_SIDE
    augment = choose(
        "augment",
        "light" if small else "standard",
        f"pictures of {data.median_side} px: shift and zoom a little" if small else "photos: crop, zoom and colour",
    )
    own = choose.unless_changed("augment", keep_asked=True)
    if augment.value == "off":
        flip = own("flip", 0.0, "augmentation is off")
    elif data.grey_share > 0.5:
        flip = own("flip", 0.0, "grey pictures: may be characters or scans, where a mirror image means something else")
    else:
        flip = own("flip", 0.5, "photos mean the same mirrored")
    drop_path = choose("drop_path", 0.0, "short training needs none")
    if drop_path.value > 0 and not model.has_drop_path:
        raise RequestError(f"{model.name} has no stochastic depth, so drop_path={drop_path.value:g} cannot be used.",
                           next="leave drop_path out, or use dropout=")  # fmt: skip
    return {
        "label_smoothing": choose("label_smoothing", 0.1 if pretrained else 0.0,
                                  "keeps fine-tuning from overconfidence" if pretrained else "none needed from scratch"),
        "dropout": choose("dropout", 0.2 if pretrained else 0.0,
                          "before the new head" if pretrained else "a small network from scratch needs none"),
        "drop_path": drop_path,
        "augment": augment,
        "flip": flip,
        **_policies(own, augment.value, varies=varies),
    }  # fmt: skip


def _policies(choose: Chooser, augment: str, *, varies: bool) -> dict[str, Any]:
    """`varies`: whether batches have several sizes, which end with the rest."""
    strong = augment == "strong"
    why = "part of the strong preset" if strong else "helps only long training"
    scale = choose("scale", 0.0, "as the preset")
    if scale.value > 0 and augment == "off":
        raise RequestError(f"scale={scale.value:g} is the zoom of the augmentation, and augment=off has none.",
                           where="scale=", next="use augment=light, or scale=0")  # fmt: skip
    policy = choose("policy", "trivial" if strong else "off", why)
    erase = choose("erase", 0.25 if strong else 0.0, why)
    mixup, cutmix = choose("mixup", 0.2 if strong else 0.0, why), choose("cutmix", 1.0 if strong else 0.0, why)
    mixes = erase.value + mixup.value + cutmix.value > 0
    distorts = augment != "off" or policy.value != "off" or mixes or varies
    close = choose("close_augment", CLOSE_AUGMENT if distorts else 0.0,
                   "the last tenth of the epochs on pictures as they will be served" if distorts else "nothing to switch off")  # fmt: skip
    return {"scale": scale, "policy": policy, "erase": erase, "mixup": mixup, "cutmix": cutmix, "close_augment": close}


def _balance(choose: Chooser, data: DataFacts) -> dict[str, Any]:
    ratio = data.largest_class / max(1, data.smallest_class)
    if ratio < IMBALANCE:
        balance = choose("balance", "off", f"the largest class has {ratio:.1f} times the images of the smallest")
    else:
        balance = choose("balance", BALANCE, f"the largest class has {ratio:.0f} times the images of the smallest, "
                         f"{IMBALANCE:g} or more: {BALANCE_REASON}")  # fmt: skip
    if balance.value == "off":
        monitor = choose("monitor", "accuracy", "what the test will report; ties are broken by the loss")
    else:
        monitor = choose("monitor", "macro_f1", "every class counts the same, as in balanced training")
    check_monitor(monitor.value, FIGURES)
    return {"balance": balance, "monitor": monitor}
