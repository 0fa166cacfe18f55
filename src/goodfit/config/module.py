"""The plan of a run that trains a module which was handed over in Python: what is about images or classes says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from goodfit.config.chooser import Chooser
from goodfit.config.execution import choose_batch, choose_execution
from goodfit.config.facts import DataFacts, Facts, MachineFacts, ModelFacts
from goodfit.config.parse import read_request
from goodfit.config.plan import Decision, Plan
from goodfit.config.recipe import choose_recipe
from goodfit.config.request import TrainRequest, options, spellings
from goodfit.config.sizes import InputSizes
from goodfit.core.errors import RequestError

_OWN_DATA = "the data is handed over as train=, val= and test="
_DATASET = "the dataset makes its own samples: do it in __getitem__"
_MODULE = "it is up to the module that is handed over"
_GROUPS = "all parameters train at one rate; leave some as they are by requires_grad_(False) before"
_NOT_YET = "this is not done for modules yet"
_MEMORY = "the batch is not measured for modules: pass a number"
WHY_NOT = {  # options that goodfit.fit refuses, and why
    **dict.fromkeys(("data", "task", "format", "split", "split_seed", "fraction", "max_bad", "suspects"), _OWN_DATA),
    **{name: _OWN_DATA for name, option in options().items() if option.group == "Data" and name not in ("workers", "prefetch")},
    **{name: _DATASET for name, option in options().items() if option.group == "Augmentation"},
    **dict.fromkeys(("imgsz", "cache"), _DATASET),
    **dict.fromkeys(("model", "pretrained", "dropout", "drop_path"), _MODULE),
    **dict.fromkeys(("head_lr", "layer_decay", "freeze", "unfreeze"), _GROUPS),
    **dict.fromkeys(("lr_find", "batch_study", "latency", "latency_threads"), _NOT_YET),
    "memory": _MEMORY,
    **dict.fromkeys(("label_smoothing", "balance"), "it is up to the loss, as in nn.CrossEntropyLoss(label_smoothing=0.1, weight=...)"),
}  # fmt: skip
NEUTRAL: dict[str, Any] = {  # decisions that mean nothing here
    "split": "", "split_seed": 0, "fraction": 1.0, "max_bad": 0.0, "pretrained": "false", "weights": "", "imgsz": 0,
    "preprocessing": {}, "label_smoothing": 0.0, "dropout": 0.0, "drop_path": 0.0, "balance": "off", "augment": "off",
    "scale": 0.0, "multi_scale": 0.0, "progressive": 1.0, "size_step": 0, "policy": "off", "erase": 0.0, "close_augment": 0.0,
    "flip": 0.0, "mixup": 0.0, "cutmix": 0.0, "layer_decay": 1.0, "freeze": "", "unfreeze": "never", "cache": "off", "latency": 0.0,
    "latency_threads": 1, "detector": {}, "mosaic": 0.0, "copy_paste": 0.0, "max_det": 0,
}  # fmt: skip
NEUTRAL_REASON = "up to the module, its loss and its dataset"


def read_module_request(asked: Mapping[str, Any]) -> TrainRequest:
    """What was asked of goodfit.fit.

    Raises:
        RequestError: an option is unknown, has a bad value, or makes no sense for a module; every reason is given.
    """
    request = read_request(asked)
    names = spellings()
    wanted = {name: names.get(name, name) for name in asked}
    refused = [f"{written}: {WHY_NOT[name]}" for written, name in wanted.items() if name in WHY_NOT]
    refused += [f"{name}: {WHY_NOT[name]}" for name in WHY_NOT
                if name not in wanted.values() and getattr(request, name) is not None]  # fmt: skip
    if refused:
        raise RequestError("goodfit.fit does not take this:\n" + "\n".join(f"  {line}" for line in refused),
                           kept="nothing was started", next="leave it out")  # fmt: skip
    return request


def module_facts(
    machine: MachineFacts, *, name: str, num_parameters: int, format: str, num_train: int, num_val: int, num_test: int,
    sample_seconds: float,
) -> Facts:  # fmt: skip
    """The facts about a module and its data, under the names that the rules for image runs know.

    Args:
        sample_seconds: To get one sample, on one thread.
    """
    data = DataFacts(
        format=format, format_reason="as it was handed over", num_train=num_train, num_val=num_val, num_test=num_test,
        num_classes=0, smallest_class=0, largest_class=0, median_side=0, grey_share=0.0,
        given_splits=("train", "val", "test") if num_test else ("train", "val"), pixel_bytes_at=0.0,
        decode_seconds=sample_seconds, task="module",
    )  # fmt: skip
    model = ModelFacts(name=name, num_parameters=num_parameters, native_imgsz=0, stride=1, mean=(0, 0, 0), std=(1, 1, 1),
                       interpolation="", crop_share=1.0, weights="", weights_kind="none", weights_problem="", licence="",
                       has_drop_path=False)  # fmt: skip
    return Facts(data=data, machine=machine, model=model)


def resolve_module(request: TrainRequest, facts: Facts, base: Plan | None = None) -> Plan:
    """Decide everything for a module.

    Args:
        request: What was asked, as `read_module_request` gives it.
        facts: Of `module_facts`, with what was measured.
        base: An earlier plan to follow where nothing is asked.

    Raises:
        RequestError: asked values contradict each other or the facts.
    """
    if base is not None and base.task.value != "module":
        raise RequestError(
            f"plan={request.plan}: this is the plan of an image run.", next="give the plan of an earlier goodfit.fit"
        )
    choose = Chooser(request, base)
    batch, accumulate = choose_batch(choose, facts)
    recipe = choose_recipe(choose, facts, batch.value)
    made = {
        "task": Decision("module", "a module was handed over", "rule"),
        "format": Decision(facts.data.format, facts.data.format_reason, "rule"),
        "model": Decision(facts.model.name, "the module that was handed over", "rule"),
        "batch": batch,
        "accumulate": accumulate,
        **recipe,
        "monitor": choose("monitor", "loss", "every loss has it; monitor= takes any metric"),
        **choose_execution(choose, facts, InputSizes(imgsz=0, step=0, epochs=recipe["epochs"].value), 0.0),
        "seed": choose("seed", 0, "fixed, so that the run can be repeated"),
        "deterministic": choose("deterministic", False, "the CPU repeats itself anyway; on a GPU it costs speed"),
        "rehearse": choose("rehearse", True, "seconds now against a night lost"),
    }
    neutral = {name: Decision(value, NEUTRAL_REASON, "rule") for name, value in NEUTRAL.items()}
    return Plan(**(made | neutral), measured=facts.measured if base is None else base.measured)


def decided(plan: Plan) -> dict[str, Decision[Any]]:
    """The decisions that mean something for a module."""
    return {name: decision for name, decision in plan.decisions().items() if name not in (*NEUTRAL, "head_lr")}
