"""Stage `plan` for a detector."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from goodfit.api.assemble import execution
from goodfit.api.detect_parts import DetectParts, assemble_detector
from goodfit.api.prepare import Audited, data_facts, stage
from goodfit.config.detect import (
    NEUTRAL,
    STEP,
    detector_batches,
    resolve_detect,
    usual_detector_batch,
)
from goodfit.config.detector import coco_detector, resolve_detector, split_model
from goodfit.config.execution import matching, ways_to_execute
from goodfit.config.facts import DataFacts, Facts, FirstStep, MachineFacts, ModelFacts
from goodfit.config.measured import MEMORY_SHARE, BatchCost, Measured, best_execution
from goodfit.config.plan import Decision, Plan
from goodfit.config.request import TrainRequest
from goodfit.config.resolve import data_decisions
from goodfit.config.time_rules import WAY_STEPS, few_passes, is_worth
from goodfit.core.errors import GoodfitError, RequestError
from goodfit.core.journal import Journal
from goodfit.data.loader import MicroBatch
from goodfit.engine.device import find_machine
from goodfit.engine.freezing import plan_freezing
from goodfit.models.catalog import look_up
from goodfit.models.detection.build import make_network
from goodfit.models.detection.detr_source import CONFIG, find_detr
from goodfit.models.detection.transfer import DetectorCard, read_detector_card
from goodfit.planning.inprocess import measure_batches_here, measure_ways_here, step_seconds_here

MEASURE_PAYS = 120.0  # projected seconds of a run from which ways to execute the step are compared ...
MEASURE_SECONDS = 8.0  # ... for about as long, each for some steps at least, which must be no large share of the run
BATCHES_PAY = 1800.0  # projected seconds from which batch sizes are timed too


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
        found = _find_model(request, data, machine, base, card)
        try:
            facts, decided, plan = _first_plan(request, audited, base, data, machine, found)
        except RequestError as error:
            if not found.offered:  # a person asked for something that cannot be
                raise
            found = _find_model(request, data, machine, base, card, refused=error.message)
            facts, decided, plan = _first_plan(request, audited, base, data, machine, found)
        measuring = base is None and request.measure is not False and not plan.deterministic.value
        if request.memory and not measuring:
            raise RequestError(f"batch={request.memory:g}, a share of the memory, needs the batch to be measured, which is off here.", where="batch=",
                               kept="nothing was started", next=f"say how many pictures, as batch={plan.batch.value}")  # fmt: skip
        if measuring:
            with execution(plan):
                facts, plan = _measured(request, facts, decided, plan, audited)
        if plan.measured is not None and plan.measured.steps:
            journal.emit("measured", table=plan.measured.table(), **plan.measured.to_dict())
        for key, decision in shown_decisions(plan).items():
            journal.emit("decision", name=key, value=decision.value, reason=decision.reason, source=decision.source)
        if text := few_passes(plan, facts):
            journal.emit("warning", text=text)
        licence = plan.weights.reason if plan.weights.value else "no pretrained weights"
        note.text = f"{plan.model.value}, backbone of {facts.model.num_parameters / 1e6:.1f} M parameters; {licence}; on {machine.device_name}"
    return plan


@dataclass(frozen=True, slots=True)
class _Found:
    """A detector: its name with the reason, its facts, its architecture where that is known already, whether it is pretrained, and whether
    it is a transformer that nobody asked for, in whose place the rule's may come."""

    name: Decision[str]
    facts: ModelFacts
    detector: dict[str, Decision[Any]]
    pretrained: Decision[str]
    offered: bool = False


def _first_plan(
    request: TrainRequest, audited: Audited, base: Plan | None, data: DataFacts, machine: MachineFacts, found: _Found
) -> tuple[Facts, dict[str, Decision[Any]], Plan]:
    """The plan by rule; with it the facts that it stands on and what was decided before."""
    task, facts = audited.index.task, Facts(data=data, machine=machine, model=found.facts)
    decided = {
        **data_decisions(request, data, base),
        **_weights(facts, replace(found.name, value=found.facts.name), found.pretrained),
        **found.detector,
    }
    reason = "the data has masks" if task == "segment" else "the data has boxes"
    decided["task"] = Decision(task, reason, decided["task"].source)
    plan = resolve_detect(request, facts, decided, base)
    _check_freezing(plan)
    return facts, decided, plan


def _find_model(
    request: TrainRequest, data: DataFacts, machine: MachineFacts, base: Plan | None, card: DetectorCard | None, *, refused: str = ""
) -> _Found:  # fmt: skip
    """The model. A transformer that was not asked for and cannot be had (no network, or the library is not installed), or was `refused`,
    leaves its place to the rule."""
    name, pretrained = resolve_detector(request, data, machine, base)
    masks = data.task == "segment"
    if split_model(name.value)[0] == "detr":
        return _Found(name, *_of_transformers(name, pretrained, card, base, masks=masks), pretrained)
    repository, note = coco_detector(request, data, machine) if base is None and card is None else ("", "")
    if repository and not refused:
        tried: Decision[str] = Decision(f"detr/{repository}", note, "rule")
        try:
            facts, detector = _of_transformers(tried, replace(pretrained, source="asked"), None, None, masks=masks)
            return _Found(tried, facts, detector, pretrained, offered=True)
        except GoodfitError as error:
            refused = error.message
    if refused:
        note = f"{repository}, which COCO's objects have taught, cannot be had: {refused}"
    detector = {} if card is None else {"detector": Decision(card.detector, "as the weights have it", "rule")}
    return _Found(*_over_pyramid(request, data, machine, base, card, note), detector, pretrained)


def _over_pyramid(
    request: TrainRequest,
    data: DataFacts,
    machine: MachineFacts,
    base: Plan | None,
    card: DetectorCard | None,
    note: str,
) -> tuple[Decision[str], ModelFacts]:
    """A family over a timm backbone: its name with the reason and a note, and the facts of the backbone."""
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
    if note and name.source == "rule":
        name = replace(name, reason=f"{name.reason}; {note}")
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
        found = replace(found, weights=str(card.file), weights_kind="file", licence=card.licence, labels=card.labels,
                        bundle_imgsz=max(card.letterbox.width, card.letterbox.height))  # fmt: skip
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
                   std=card.letterbox.std, bundle_imgsz=max(card.letterbox.width, card.letterbox.height))  # fmt: skip


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


def _measured(
    request: TrainRequest, facts: Facts, decided: dict[str, Decision[Any]], plan: Plan, audited: Audited
) -> tuple[Facts, Plan]:
    """The facts with the plan that follows from them: a step timed, and with that, where it pays, ways to execute it and batch sizes
    compared, on copies in this process."""
    parts, group = _trial_parts(plan, audited)
    first = step_seconds_here(parts.state.model, parts.context, parts.optimizer_for, group, ema=plan.ema.value)
    if request.time and first:
        timed = FirstStep(plan.imgsz.value, first / plan.batch.value)
        facts = replace(facts, first_step=timed)
        plan = resolve_detect(request, facts, decided, None)
        first = timed.at(plan.imgsz.value) * plan.batch.value
    run = plan.epochs.value * parts.train.steps_per_epoch * first
    run = min(run, plan.time.value or run)
    del parts, group  # before others take their memory
    ways = ways_to_execute(plan, facts.machine)
    takes = max(MEASURE_SECONDS, WAY_STEPS * len(ways) * first)
    if not (request.measure or request.memory) and (run < MEASURE_PAYS or not is_worth(takes, run)):
        return facts, plan
    facts = _compared(request, facts, plan, audited, ways, run)
    return facts, resolve_detect(request, facts, decided, None)


def _trial_parts(plan: Plan, audited: Audited) -> tuple[DetectParts, list[MicroBatch]]:
    """All that a step takes, and the first batch."""
    parts = assemble_detector(plan.changed(compile="off", cache="off", workers=0), audited.index)
    return parts, parts.train.group(0, 0, plan.accumulate.value, size=plan.imgsz.value)


def _compared(
    request: TrainRequest, facts: Facts, plan: Plan, audited: Audited, ways: Sequence[tuple[str, bool]], run: float
) -> Facts:
    """The facts with ways to execute a step compared, and batch sizes where that was asked for or pays in a run of so many seconds."""
    start = time.monotonic()
    parts, group = _trial_parts(plan, audited)
    costs = measure_ways_here(parts.state.model, parts.context, parts.optimizer_for, group, ways, seconds=MEASURE_SECONDS,
                              ema=plan.ema.value)  # fmt: skip
    batches: list[BatchCost] = []
    memory = int((request.memory or MEMORY_SHARE) * facts.machine.free_memory)
    best = best_execution(matching(costs, plan.precision, plan.channels_last))
    if best is not None and (
        request.memory or request.measure or (plan.batch.source != "asked" and run >= BATCHES_PAY)
    ):
        del parts
        way = plan.changed(
            precision=best.precision, channels_last=best.channels_last, compile="off", cache="off", workers=0
        )
        parts = assemble_detector(way, audited.index)
        sizes = detector_batches(facts.data, usual_detector_batch(facts.data, facts.machine))
        batches = measure_batches_here(parts.state.model, parts.context, parts.optimizer_for, partial(_largest_group, parts), sizes,
                                       memory=memory, seconds=MEASURE_SECONDS, ema=plan.ema.value)  # fmt: skip
    return replace(facts, measured=Measured(batch=plan.batch.value, steps=tuple(costs), batches=tuple(batches),
                                            memory=memory if batches else 0, seconds=time.monotonic() - start))  # fmt: skip


def _largest_group(parts: DetectParts, size: int) -> list[MicroBatch]:
    """A batch of so many pictures at the largest input of the run, at once."""
    loader = parts.train.evenly()
    loader.batch = size
    return loader.group(0, 0, 1)
