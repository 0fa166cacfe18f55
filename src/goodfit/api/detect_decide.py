"""Stage `plan` for a detector."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from goodfit.api.detect_parts import assemble_detector
from goodfit.api.prepare import Audited, data_facts, stage
from goodfit.config.detect import NEUTRAL, STEP, resolve_detect, resolve_detector, split_model
from goodfit.config.execution import ways_to_execute
from goodfit.config.facts import DataFacts, Facts, MachineFacts, ModelFacts
from goodfit.config.measured import Measured
from goodfit.config.plan import Decision, Plan
from goodfit.config.request import TrainRequest
from goodfit.config.resolve import data_decisions
from goodfit.core.errors import RequestError
from goodfit.core.journal import Journal
from goodfit.engine.device import find_machine
from goodfit.engine.freezing import plan_freezing
from goodfit.models.catalog import look_up
from goodfit.models.detection.build import make_network
from goodfit.models.detection.detr_source import CONFIG, find_detr
from goodfit.models.detection.transfer import DetectorCard, read_detector_card
from goodfit.planning.inprocess import measure_ways_here

MEASURE_PAYS = 120.0  # projected seconds of a run from which ways to execute the step are compared ...
MEASURE_SECONDS = 8.0  # ... for about as long


def decide_detector(request: TrainRequest, audited: Audited, journal: Journal, base: Plan | None) -> Plan:
    """Decide everything, and measure ways to execute the training step where that pays.

    Raises:
        RequestError: something that was asked cannot be done.
        WeightsError: weights that were asked for cannot be had.
    """
    with stage(journal, "plan") as note:
        data, machine = data_facts(request, audited, base), find_machine(request.device)
        described = bool(request.pretrained) and (Path(str(request.pretrained)) / CONFIG).is_file()  # for transformers
        card = read_detector_card(request.pretrained) if request.pretrained and not described else None
        if request.model is None and (card is not None or described):
            request = replace(request, model=card.model if card is not None else f"detr/{request.pretrained}")
        name, pretrained = resolve_detector(request, data, machine, base)
        if split_model(name.value)[0] == "detr":
            model, detector = _of_transformers(name, pretrained, card, base, masks=data.task == "segment")
        else:
            name, model = _over_pyramid(request, data, machine, base, card)
            detector = {} if card is None else {"detector": Decision(card.detector, "as the weights have it", "rule")}
        facts = Facts(data=data, machine=machine, model=model)
        decided = {
            **data_decisions(request, data, base),
            **_weights(facts, replace(name, value=model.name), pretrained),
            **detector,
        }
        task = audited.index.task
        decided["task"] = Decision(
            task, "the data has masks" if task == "segment" else "the data has boxes", decided["task"].source
        )
        plan = resolve_detect(request, facts, decided, base)
        _check_freezing(plan)
        if base is None and request.measure is not False and not plan.deterministic.value:
            facts = _measured(request, facts, plan, audited)
            plan = resolve_detect(request, facts, decided, base)
        if plan.measured is not None and plan.measured.steps:
            journal.emit("measured", table=plan.measured.table(), **plan.measured.to_dict())
        for key, decision in shown_decisions(plan).items():
            journal.emit("decision", name=key, value=decision.value, reason=decision.reason, source=decision.source)
        licence = plan.weights.reason if plan.weights.value else "no pretrained weights"
        note.text = f"{plan.model.value}, backbone of {model.num_parameters / 1e6:.1f} M parameters; {licence}; on {machine.device_name}"
    return plan


def _over_pyramid(
    request: TrainRequest, data: DataFacts, machine: MachineFacts, base: Plan | None, card: DetectorCard | None
) -> tuple[Decision[str], ModelFacts]:
    """A family over a timm backbone: its name with the reason, and the facts of the backbone."""
    name, pretrained = resolve_detector(request, data, machine, base)
    family, backbone = split_model(name.value)
    if card is not None and (family, backbone or split_model(card.model)[1]) != split_model(card.model):
        raise RequestError(f"The weights are those of {card.model}, not of {name.value.rstrip('/')}.", where="pretrained=",
                           next=f"leave model out, or use model={card.model}")  # fmt: skip
    found = (
        _of_card(card) if card is not None else look_up(backbone, pretrained.value, asked=pretrained.source == "asked")
    )
    if found.weights_problem and card is None:  # the rule may take another backbone where there are no weights
        name, _ = resolve_detector(request, data, machine, base, weights=False)
        found = replace(
            look_up(split_model(name.value)[1], "false", asked=False), weights_problem=found.weights_problem
        )
    return name, replace(found, name=f"{family}/{found.name}", stride=STEP, size_step=STEP)


def _of_transformers(
    name: Decision[str], pretrained: Decision[str], card: DetectorCard | None, base: Plan | None, *, masks: bool
) -> tuple[ModelFacts, dict[str, Decision[Any]]]:
    """The facts of a detector of the transformers library, and its configuration as a decision."""
    source, config, colours = split_model(name.value)[1], None, None
    if card is not None and card.model != name.value:
        raise RequestError(f"The weights are those of {card.model}, not of {name.value}.", where="pretrained=",
                           next=f"leave model out, or use model={card.model}")  # fmt: skip
    if card is not None:
        config, colours = card.detector["config"], (card.letterbox.mean, card.letterbox.std)
    elif base is not None and base.model.value == name.value:
        made = base.preprocessing.value
        config, colours = base.detector.value["config"], (tuple(made["mean"]), tuple(made["std"]))
    found, config = find_detr(source, "false" if card is not None else pretrained.value, asked=pretrained.source == "asked",
                              masks=masks, config=config)  # fmt: skip
    if card is not None:
        found = replace(found, weights=str(card.file), weights_kind="file", licence=card.licence, labels=card.labels)
    if colours is not None:  # as those weights, or that plan, had them, also where the description is gone
        found = replace(found, mean=colours[0], std=colours[1])
    decision = Decision({"config": config}, f"{config['model_type']}, as its {CONFIG} describes it", "rule")
    return replace(found, name=f"detr/{found.name}"), {"detector": decision}


def _check_freezing(plan: Plan) -> None:
    """Refuse what the network cannot freeze, before anything is made."""
    if plan.freeze.value:
        whole = split_model(plan.model.value)[0] == "detr"  # the library changes weights while it builds
        with torch.device("cpu" if whole else "meta"):
            network = make_network(
                *split_model(plan.model.value), num_classes=1, masks=plan.task.value == "segment", **plan.detector.value
            )
        plan_freezing(network, freeze=plan.freeze.value, unfreeze=plan.unfreeze.value, steps_per_epoch=1)


def _of_card(card: DetectorCard) -> ModelFacts:
    """The facts of a detector that goes on from another one's weights."""
    found = look_up(split_model(card.model)[1], "false", asked=False)
    return replace(found, weights=str(card.file), weights_kind="file", licence=card.licence, labels=card.labels, mean=card.letterbox.mean,
                   std=card.letterbox.std)  # fmt: skip


def shown_decisions(plan: Plan) -> dict[str, Decision[object]]:
    """The decisions that mean something for a detector."""
    shown = {name: decision for name, decision in plan.decisions().items() if name not in NEUTRAL}
    if "config" in plan.detector.value:  # hundreds of settings, which plan.json keeps
        shown["detector"] = replace(plan.detector, value=plan.detector.value["config"]["model_type"])
    return shown


def _weights(facts: Facts, name: Decision[str], pretrained: Decision[str]) -> dict[str, Decision[str]]:
    model = facts.model
    if model.weights_kind != "none":
        return {"model": name, "pretrained": Decision(model.weights_kind, pretrained.reason, pretrained.source),
                "weights": Decision(model.weights, f"licence: {model.licence}", "rule")}  # fmt: skip
    reason, source = pretrained.reason, pretrained.source
    if pretrained.value != "false":
        reason, source = (f"from scratch, because {model.weights_problem}; a backbone that has seen photos learns far better: pass "
                          "pretrained=FILE.safetensors"), "measured"  # fmt: skip
    return {"model": name, "pretrained": Decision("false", reason, source), "weights": Decision("", "none", "rule")}


def _measured(request: TrainRequest, facts: Facts, plan: Plan, audited: Audited) -> Facts:
    """The facts with ways to execute the step compared on copies in this process."""
    parts = assemble_detector(plan.changed(compile="off", cache="off", workers=0), audited.index)
    group = parts.train.group(0, 0, plan.accumulate.value)
    costs = measure_ways_here(parts.state.model, parts.context, parts.optimizer_for, group, [(plan.precision.value, plan.channels_last.value)],
                              seconds=0.0, ema=plan.ema.value)  # fmt: skip
    run = plan.epochs.value * parts.train.steps_per_epoch * sum(cost.seconds for cost in costs)
    run = min(run, plan.time.value or run)
    if not request.measure and run < MEASURE_PAYS:
        return facts
    start = time.monotonic()
    costs = measure_ways_here(parts.state.model, parts.context, parts.optimizer_for, group, ways_to_execute(plan, facts.machine),
                              seconds=MEASURE_SECONDS, ema=plan.ema.value)  # fmt: skip
    return replace(
        facts, measured=Measured(batch=plan.batch.value, steps=tuple(costs), seconds=time.monotonic() - start)
    )
