"""From a module and its data to a plan, and to everything that `fit` takes."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from goodfit.api.assemble import FitParts, fit_settings, initial_state, run_hashes
from goodfit.api.prepare import stage
from goodfit.config.execution import ways_to_execute
from goodfit.config.facts import Facts
from goodfit.config.measured import Measured
from goodfit.config.module import decided, module_facts, resolve_module
from goodfit.config.monitor import check_monitor
from goodfit.config.plan import Plan
from goodfit.config.request import TrainRequest
from goodfit.core.errors import DataError, GoodfitError, RequestError
from goodfit.core.journal import Journal
from goodfit.data.loader import MicroBatch
from goodfit.data.nested import collate_samples, leaves
from goodfit.data.samples import (
    Collate,
    ItemSamples,
    NoTransform,
    SampleLoader,
    SampleReader,
    Samples,
    TensorSamples,
    read_samples,
)
from goodfit.engine.device import DevicePolicy, compile_in_place, find_machine
from goodfit.engine.optimizer import build_optimizer
from goodfit.engine.ranks import Ranks
from goodfit.engine.step import StepContext
from goodfit.models.groups import ParameterGroup
from goodfit.planning.inprocess import measure_ways_here
from goodfit.tasks.module import ModuleTask, as_pair

NUM_FEW = 8
TIMED_SAMPLES = 4  # of a dataset, to learn what one takes
MEASURE_PAYS = 60.0  # projected seconds of a run from which ways to execute the step are compared ...
MEASURE_SECONDS = 5.0  # ... for about as long


@dataclass(frozen=True, slots=True)
class Splits:
    """The samples of each split; there may be no test."""

    train: Samples
    val: Samples
    test: Samples | None

    def named(self) -> dict[str, Samples]:
        """Those that there are, by name."""
        found = {"train": self.train, "val": self.val}
        return found | ({"test": self.test} if self.test is not None else {})

    def digests(self) -> dict[str, dict[str, Any]]:
        """Number and hash of each split, and whether the hash covers all of it."""
        return {name: {"num": len(s), "sha256": s.digest(), "whole": isinstance(s, TensorSamples)}
                for name, s in self.named().items()}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleParts(FitParts):
    """The parts of a run that trains a copy of a module."""

    task: ModuleTask
    splits: Splits
    train: SampleLoader
    val: SampleReader
    data_sha256: str

    @property
    def hashes(self) -> dict[str, Any]:
        """Of the plan and of the splits."""
        return run_hashes(self.plan, self.data_sha256)

    @property
    def num_served(self) -> int:
        """The test looks at its own."""
        return len(self.splits.test) if self.splits.test is not None else 0

    def optimizer_for(self, model: nn.Module) -> torch.optim.Optimizer:
        """The plan's optimizer for a model of this kind."""
        return module_optimizer(model, self.plan)

    def reader(self, samples: Samples) -> SampleReader:
        """Any samples, as validation reads them."""
        return reader_of(self.plan, samples)

    def few_samples(self) -> MicroBatch:
        """The first samples of training, eight or fewer, as evaluation sees them."""
        return self.reader(self.splits.train).first(range(min(NUM_FEW, len(self.splits.train))))


def check_module(module: Any) -> None:
    """Raises RequestError if this is no module whose weights can be trained, kept and copied."""
    if not isinstance(module, nn.Module):
        hint = "pass an instance of it: Net()" if isinstance(module, type) else "pass an instance of torch.nn.Module"
        raise RequestError(f"goodfit.fit needs a module, not {_kind(module)}.", next=hint)
    lazy = [name for name, p in module.named_parameters() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        raise RequestError(f"The module's parameters have no shape yet: {lazy[0]}.", next="call it on one batch before")
    if not any(p.requires_grad for p in module.parameters()):
        raise RequestError("The module has no parameters that can be trained.",
                           next="register them as nn.Parameter, in nn.ModuleList and not in lists; requires_grad_(True)")  # fmt: skip
    low = next(
        (f"{n} is {p.dtype}" for n, p in module.named_parameters() if p.dtype not in (torch.float32, torch.float64)),
        None,
    )
    if low is not None:
        raise RequestError(
            f"The weights must be float32 or float64: {low}.", next="module.float(), and precision=bf16 or fp16"
        )
    apart = next((name for name, value in module.state_dict().items() if not isinstance(value, torch.Tensor)), None)
    if apart is not None:
        raise RequestError(f"The module's state holds what is no tensor, and so cannot be kept: {apart}.")
    try:
        copy.deepcopy(module)
    except Exception as error:
        raise RequestError(f"The module cannot be copied: {type(error).__name__}: {error}.",
                           next="keep out of it what copy.deepcopy cannot copy") from error  # fmt: skip


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def describe_module(module: nn.Module) -> dict[str, Any]:
    """What a resumed run's module must agree in: type and shape of everything in its state."""
    return {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in module.state_dict().items()}


def read_splits(
    module: nn.Module, train: Any, val: Any, test: Any, collate: Collate | None, journal: Journal
) -> Splits:
    """Stage `data`: every split as samples by number.

    Raises:
        RequestError, DataError: a split cannot be used.
    """
    floats = next(p.dtype for p in module.parameters())
    with stage(journal, "data") as note:
        for name, given in (("train", train), ("val", val)):
            if given is None:
                raise RequestError(
                    f"{name}= is missing.", next="pass train= and val=, and test= to be tested once at the end"
                )
        read = {n: read_samples(d, n, collate or collate_samples, floats=floats)
                for n, d in (("train", train), ("val", val), ("test", test)) if d is not None}  # fmt: skip
        splits = Splits(read["train"], read["val"], read.get("test"))
        counts = " · ".join(f"{name} {len(samples):,}" for name, samples in splits.named().items())
        note.text = f"{counts} samples, {splits.train.format}"
        for name, samples in splits.named().items():
            if isinstance(samples, ItemSamples) and not samples.is_repeatable():
                journal.emit("warning", text=f"{name}= gives another sample when it is asked twice with one random state: "
                             "it draws from a generator of its own, so a resumed run will not be exact")  # fmt: skip
    return splits


def module_optimizer(model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """The plan's optimizer over all parameters that train; weight decay is not for norms, biases and other vectors."""
    table: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            table.setdefault("weights" if parameter.ndim > 1 else "norms and biases", []).append(name)
    groups = [ParameterGroup(part, tuple(names), plan.lr.value, plan.weight_decay.value if part == "weights" else 0.0)
              for part, names in table.items()]  # fmt: skip
    return build_optimizer(model, groups, kind=plan.optimizer.value, momentum=plan.momentum.value)


def reader_of(plan: Plan, samples: Samples) -> SampleReader:
    """Samples for evaluation, as many at once as in training."""
    return SampleReader(samples, batch=max(1, plan.batch.value // plan.accumulate.value), seed=plan.seed.value,
                        workers=plan.workers.value, prefetch=plan.prefetch.value)  # fmt: skip


def assemble_module(
    plan: Plan, module: nn.Module, task: ModuleTask, splits: Splits, digests: Mapping[str, Any]
) -> ModuleParts:
    """Build everything around a copy of the module, on the plan's device."""
    ranks = Ranks()
    device = DevicePolicy(
        kind=plan.device.value, precision=plan.precision.value, channels_last=plan.channels_last.value
    )
    train = SampleLoader(splits.train, batch=plan.batch.value, seed=plan.seed.value, workers=plan.workers.value,
                         prefetch=plan.prefetch.value, rank=ranks.rank, size=ranks.size)  # fmt: skip
    copied = device.place(copy.deepcopy(module)).train()
    state = initial_state(plan, copied, module_optimizer(copied, plan), device, train.steps_per_epoch)
    compile_in_place(state.model, plan.compile.value)
    context = StepContext(task, NoTransform(), device, ranks, plan.seed.value, plan.clip.value, plan.clip_value.value)
    text = " ".join(str(digests[name]["sha256"]) for name in sorted(digests))
    return ModuleParts(plan=plan, context=context, train=train, val=reader_of(plan, splits.val), state=state,
                       settings=fit_settings(plan), task=task, splits=splits,
                       data_sha256=hashlib.sha256(text.encode()).hexdigest())  # fmt: skip


def decide_module(
    request: TrainRequest, module: nn.Module, task: ModuleTask, splits: Splits, digests: Mapping[str, Any],
    journal: Journal, base: Plan | None,
) -> Plan:  # fmt: skip
    """Stage `plan`: decide everything, measure where it pays, and try the module on a few samples.

    Raises:
        RequestError, DataError: something that was asked cannot be done, or the module does not take the data.
    """
    with stage(journal, "plan") as note:
        machine = find_machine(request.device)
        facts = module_facts(
            machine, name=type(module).__name__, num_parameters=sum(p.numel() for p in module.parameters()),
            format=splits.train.format, num_train=len(splits.train), num_val=len(splits.val),
            num_test=len(splits.test) if splits.test is not None else 0, sample_seconds=_sample_seconds(splits.train),
        )  # fmt: skip
        plan = resolve_module(request, facts, base)
        parts = assemble_module(plan.changed(compile="off"), module, task, splits, digests)
        check_monitor(plan.monitor.value, try_once(parts))
        if base is None and request.measure is not False and not plan.deterministic.value:
            facts = _measured(request, facts, parts)
            plan = resolve_module(request, facts, base)
        if plan.measured is not None and plan.measured.steps:
            table = [line.replace("img/s", "samples/s") for line in plan.measured.table()]
            journal.emit("measured", table=table, **plan.measured.to_dict())
        for name, decision in decided(plan).items():
            journal.emit("decision", name=name, value=decision.value, reason=decision.reason, source=decision.source)
        note.text = f"{facts.model.name}, {facts.model.num_parameters:,} parameters; on {machine.device_name}"
    return plan


def _sample_seconds(samples: Samples) -> float:
    """What one sample takes, the fastest of a few: the first may open files."""
    if isinstance(samples, TensorSamples):
        return 0.0
    seconds = []
    for row in range(min(TIMED_SAMPLES, len(samples))):
        start = time.perf_counter()
        samples.batch(np.array([row]), seed=0, epoch=0)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _measured(request: TrainRequest, facts: Facts, parts: ModuleParts) -> Facts:
    """The facts with ways to execute the step compared on copies in this process, where that pays or was asked for."""
    plan = parts.plan
    decided = plan.precision.source == "asked" and plan.channels_last.source == "asked"
    if decided and not request.measure:
        return facts
    group = parts.train.group(0, 0, plan.accumulate.value)
    costs = measure_ways_here(parts.state.model, parts.context, parts.optimizer_for, group, [("fp32", False)],
                              seconds=0.0, ema=plan.ema.value)  # fmt: skip
    run = plan.epochs.value * parts.train.steps_per_epoch * sum(cost.seconds for cost in costs)
    if not request.measure and run < MEASURE_PAYS:
        return facts
    start = time.monotonic()
    costs = measure_ways_here(parts.state.model, parts.context, parts.optimizer_for, group,
                              ways_to_execute(plan, facts.machine), seconds=MEASURE_SECONDS, ema=plan.ema.value)  # fmt: skip
    return replace(
        facts, measured=Measured(batch=plan.batch.value, steps=tuple(costs), seconds=time.monotonic() - start)
    )


def try_once(parts: ModuleParts) -> list[str]:
    """Call a copy of the module on a few samples, for training and for evaluation. Returns the names of the figures.

    Raises:
        RequestError: the module, the loss or a metric does not take them.
        DataError: the loss of these samples is not finite, or the targets hold NaN.
    """
    few = parts.few_samples()
    context = parts.context
    model = copy.deepcopy(parts.state.model)
    batch = context.device.move(few.data)
    try:
        with torch.no_grad(), context.device.autocast():
            outputs = parts.task.predict(model.eval(), batch)
            _check_targets(
                parts, outputs
            )  # before the loss: on a GPU a wrong class number ends the process's use of it
            terms = parts.task.loss(model.train(), batch)
        meter = parts.task.meter()
        meter.update(outputs, batch)
        figures = meter.compute()
    except GoodfitError:
        raise
    except Exception as error:
        raise RequestError(f"The module or its loss does not take a batch: {type(error).__name__}: {error}",
                           where=_shapes(few.data["data"]), next="call the loss on module(inputs) by hand, with inputs of this kind") from error  # fmt: skip
    if not all(bool(torch.isfinite(total)) for total, _ in terms.values()):
        bad = [place for place, value in leaves(few.data["data"]).items() if not _is_finite(value)]
        said = f": `{'`, `'.join(bad)}` holds values that are not finite" if bad else ", and the data is finite"
        raise DataError(f"The loss of the first {len(few.samples)} samples is not finite{said}.", where=_shapes(few.data["data"]),
                        next="clean the data, or look for a division by zero in the module")  # fmt: skip
    return list(figures)


def _check_targets(parts: ModuleParts, outputs: Any) -> None:
    """All targets at once, where they are tensors: finite, and class numbers that the outputs have."""
    pair = parts.task.pair
    for split, samples in parts.splits.named().items():
        if pair is None or not isinstance(samples, TensorSamples):
            continue
        for place, target in leaves(as_pair(samples.data)[1]).items():
            if not _is_finite(target):
                rows = (~torch.isfinite(target)).reshape(len(target), -1).any(dim=1).nonzero().flatten()
                raise DataError(f"{split}: {len(rows):,} of {len(target):,} targets are NaN or infinite (first: row {int(rows[0])}).",
                                where=f"`{place}` of the targets", next="leave these samples out")  # fmt: skip
            if pair.takes_logits and isinstance(outputs, torch.Tensor) and not target.is_floating_point():
                bad = ((target < 0) | (target >= outputs.shape[1])) & (target != pair.ignored)
                if bool(bad.any()):
                    value = int(target[bad].flatten()[0])
                    raise DataError(f"{split}: a target is {value}, and the module has {outputs.shape[1]} outputs: 0 to "
                                    f"{outputs.shape[1] - 1}.", next="number the classes from 0, or give the module more outputs")  # fmt: skip


def _is_finite(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())


def _shapes(data: Any) -> str:
    parts = [f"`{place}` {str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}" if isinstance(v, torch.Tensor) else f"`{place}` {type(v).__name__}"
             for place, v in leaves(data).items()]  # fmt: skip
    return "a batch of " + ", ".join(parts)
