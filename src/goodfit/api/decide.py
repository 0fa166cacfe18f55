"""Stage `plan`: look at the machine and the model, measure where it pays, then resolve."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from goodfit.api.assemble import assemble, execution
from goodfit.api.batch_study import check_request, study_batches
from goodfit.api.detect_decide import decide_detector
from goodfit.api.find_lr import find_lr
from goodfit.api.latency import fit_latency
from goodfit.api.prepare import Audited, data_facts, stage
from goodfit.api.probe import measure, wants_measuring
from goodfit.api.transfer import check_freezing, count_known
from goodfit.config.catalogue import pictures_of
from goodfit.config.detect import TASKS
from goodfit.config.execution import unwise
from goodfit.config.facts import Facts, FirstStep
from goodfit.config.measured import Measured
from goodfit.config.plan import Plan
from goodfit.config.request import TrainRequest
from goodfit.config.resolve import resolve, resolve_model
from goodfit.config.time_rules import few_passes
from goodfit.core.errors import RequestError
from goodfit.core.journal import Journal
from goodfit.data.index import DatasetIndex
from goodfit.data.split import subset
from goodfit.engine.device import find_machine
from goodfit.models.catalog import look_up
from goodfit.planning.inprocess import step_seconds_here


def decide(
    request: TrainRequest, audited: Audited, journal: Journal, base: Plan | None = None, *, measuring: bool = True
) -> Plan:
    """Decide everything.

    Raises:
        RequestError: something that was asked cannot be done.
        WeightsError: weights that were asked for cannot be had.
    """
    index = audited.index
    if index.task in TASKS:
        return decide_detector(request, audited, journal, base)
    if index.task != "classify":
        raise RequestError(
            f"goodfit does not train this task yet: {index.task}.", where=str(request.data),
            next=f"goodfit audit {request.data} checks the data; task=classify needs one class per image",
        )  # fmt: skip
    check_request(request)
    with stage(journal, "plan") as note:
        facts = _facts(request, audited, base, measuring=measuring)
        check_freezing(resolve(request, facts, base))
        if measuring:
            facts = _measured(request, facts, index, base, journal)
        plan = resolve(request, facts, base)
        if facts.fitted is not None:
            plan = plan.with_latencies(facts.fitted.costs)
        if plan.measured is not None and (facts.measured is not None or facts.fitted is not None):
            journal.emit("measured", table=plan.measured.table(), **plan.measured.to_dict())
        for name, decision in plan.decisions().items():
            journal.emit("decision", name=name, value=decision.value, reason=decision.reason, source=decision.source)
        for text in [*unwise(plan), few_passes(plan, facts)]:
            if text:
                journal.emit("warning", text=text)
        licence = plan.weights.reason if plan.weights.value else "no pretrained weights"
        note.text = f"{facts.model.num_parameters / 1e6:.1f} M parameters; {licence}; on {facts.machine.device_name}"
    return plan


def _facts(request: TrainRequest, audited: Audited, base: Plan | None, *, measuring: bool) -> Facts:
    """Data, machine, and the model: where a latency limit was asked for, the one that was measured to fit it."""
    data, machine = data_facts(request, audited, base), find_machine(request.device)
    wanted = resolve_model(request, data, machine, base)
    asked = wanted.pretrained.source == "asked"
    names = audited.index.class_names
    model = look_up(wanted.model.value, wanted.pretrained.value, asked=asked)
    if model.weights_problem:  # the rule may start with another network where there are no weights
        scratch = resolve_model(request, data, machine, base, weights=False).model.value
        if scratch != wanted.model.value:
            model = replace(look_up(scratch, "false", asked=False), weights_problem=model.weights_problem)
    model = count_known(model, names)
    facts = Facts(data=data, machine=machine, model=model)
    if not measuring:
        return facts
    fitted = fit_latency(request, resolve(request, facts, base), base, model, audited.index,
                         pictures=pictures_of(data.median_side))  # fmt: skip
    if fitted is not None and fitted.chosen.model != model.name:
        found = look_up(fitted.chosen.model, wanted.pretrained.value, asked=asked)
        facts = replace(facts, model=count_known(found, names))
    return replace(facts, fitted=fitted)


def _timed(facts: Facts, plan: Plan, index: DatasetIndex) -> Facts:
    """The facts with what a step takes, so that a time is not spent on what prepares for it."""
    seconds = 0.0
    with suppress(RuntimeError, MemoryError), execution(plan):
        parts = assemble(plan.changed(compile="off", cache="off", workers=0), index)
        group = parts.train.group(0, 0, plan.accumulate.value, size=plan.imgsz.value)
        seconds = step_seconds_here(parts.state.model, parts.context, parts.optimizer_for, group, ema=plan.ema.value)
        device = parts.context.device
        del parts, group
        device.hand_back()
    return replace(facts, first_step=FirstStep(plan.imgsz.value, seconds / plan.batch.value)) if seconds else facts


def _measured(request: TrainRequest, facts: Facts, index: DatasetIndex, base: Plan | None, journal: Journal) -> Facts:
    """The facts with what was measured, each on the plan that follows from what was measured before."""
    plan = resolve(request, facts, base)
    untimed = request.measure is False or plan.deterministic.value  # a study then takes rules
    if request.time and base is None and not untimed:
        facts = _timed(facts, plan, index)
        plan = resolve(request, facts, base)
    if wants_measuring(request, plan, facts.data.num_train, base) or (request.batch_study and not untimed):
        rows = subset(index, plan.fraction.value, plan.split_seed.value)
        facts = replace(facts, measured=measure(request, plan, index, rows, facts.machine))
        plan = resolve(request, facts, base)
    if request.batch_study:
        facts = replace(facts, measured=study_batches(request, facts, plan, index, journal))
        plan = resolve(request, facts, base)
    if request.lr_find:  # at the batch and in the precision that were chosen
        found = find_lr(request, plan, index, facts.machine)
        facts = replace(facts, measured=replace(facts.measured or Measured(batch=plan.batch.value), lr_range=found))
    return facts
