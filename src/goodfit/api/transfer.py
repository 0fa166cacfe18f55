"""What a run takes over from pretrained weights, what is frozen, and how fast each layer learns: checked, then said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from goodfit.api.assemble import ImageParts
from goodfit.config.facts import ModelFacts
from goodfit.config.plan import Plan
from goodfit.core.errors import RequestError
from goodfit.core.journal import Journal
from goodfit.engine.freezing import plan_freezing
from goodfit.models.builder import create
from goodfit.models.weights import match_labels


def count_known(model: ModelFacts, class_names: Sequence[str]) -> ModelFacts:
    """The facts of a model with how many classes of the data its weights know."""
    return replace(model, known_classes=len(match_labels(model.labels, class_names)))


def check_freezing(plan: Plan) -> None:
    """Refuse what the plan's network cannot freeze, before anything is made.

    Raises:
        RequestError: there are fewer layers, a pattern names nothing, or nothing would be left to train; or every layer
            that thaws would be compiled for, and torch gives up after eight times.
    """
    if plan.unfreeze.value == "gradual" and plan.compile.value != "off":
        raise RequestError(f"compile={plan.compile.value} would compile anew for every layer that thaws.", where="unfreeze=",
                           next="compile=off, or unfreeze=EPOCHS, which thaws all at once")  # fmt: skip
    if plan.freeze.value:
        with torch.device("meta"):
            network = create(plan.model.value, num_classes=1)
        plan_freezing(network, freeze=plan.freeze.value, unfreeze=plan.unfreeze.value, steps_per_epoch=1)


def transfer_stage(parts: ImageParts, journal: Journal) -> None:
    """Stage `transfer`: say what the weights brought, what trains and what is frozen, and the rates of the layers."""
    plan, freezing, report = parts.plan, parts.context.freezing, parts.weights
    sizes = {name: parameter.numel() for name, parameter in parts.state.model.named_parameters()}
    total = sum(sizes.values())
    stages = [
        {"epoch": start / parts.train.steps_per_epoch, "trained": total - sum(sizes[name] for name in frozen)}
        for start, frozen in zip(freezing.starts, freezing.frozen, strict=True)
    ]
    texts = [] if report is None else [report.describe()]
    if freezing.frozen[0]:
        texts.append(_describe_stages(stages, total, plan.epochs.value))
    rates = [g["peak_lr"] for g in parts.state.optimizer.param_groups]
    if plan.layer_decay.value < 1:
        texts.append(f"learning rates of the layers {min(rates):.1e} to {rates[0]:.1e}, of the head {rates[-1]:.1e}")
    if not texts:
        return
    fields = {} if report is None else {"loaded": report.loaded, "initialised": list(report.initialised),
                                        "unused": list(report.unused), "known_classes": list(report.known)}  # fmt: skip
    journal.emit("stage", name="transfer", text=" · ".join(texts), parameters=total, phases=stages, **fields)


def _describe_stages(stages: Sequence[dict[str, float]], total: int, epochs: int) -> str:
    first, last = stages[0], stages[-1]
    text = f"{first['trained']:,} of {total:,} parameters train, the others are frozen"
    if len(stages) == 1:
        return f"{text} to the end"
    if len(stages) > 2:
        text += f"; one more layer thaws every epoch, the last after {last['epoch']:g}"
    else:
        text += f"; all train after {last['epoch']:g} epochs"
    return text + (f", which this run of {epochs} does not reach" if last["epoch"] >= epochs else "")
