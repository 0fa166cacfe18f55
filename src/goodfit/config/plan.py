"""`Plan`: every decision of a run, each with its value, its reason and where it came from."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from goodfit.config.latency import LatencyCost
from goodfit.config.measured import Measured
from goodfit.core.errors import RequestError

Source = Literal["asked", "rule", "measured"]
ADDED: dict[str, Any] = {  # decisions that plans of earlier versions lack, and what was done then
    "compile": "off", "allocator": "keep", "prefetch": 2, "latency": 0.0, "latency_threads": 1, "most_epochs": 0, "time": 0.0,
    "layer_decay": 1.0, "freeze": "", "unfreeze": "never", "decay": 0.2, "milestones": [], "period": 0.0, "gamma": 0.1,
    "clip_value": 0.0, "swa": 0.0, "scale": 0.0, "multi_scale": 0.0, "progressive": 1.0, "size_step": 32,
    "mosaic": 0.0, "detector": {}, "copy_paste": 0.0, "max_det": 0,
}  # fmt: skip
EARLIER = "an earlier version's way"  # the reason of those
_FIGURES = ("measured", "sample_seconds")  # fields of a plan that are no decisions
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Decision(Generic[T_co]):
    """One value of a run, why it was chosen, and whether a person asked for it, a rule gave it, or it was measured."""

    value: T_co
    reason: str
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that decides what a run computes. Nothing in running code is "auto"; the saved plan is what ran.

    Lengths: epochs, warm-up, milestones and period in epochs; time in seconds; batch and micro-batch in samples; imgsz in
    pixels. Shares are fractions.
    """

    task: Decision[str]
    format: Decision[str]
    split: Decision[str]
    split_seed: Decision[int]
    fraction: Decision[float]
    max_bad: Decision[float]
    model: Decision[str]
    pretrained: Decision[str]  # "false", "hub" or "file"; where from is in `weights`
    weights: Decision[str]  # hub name, file path, or ""
    imgsz: Decision[int]
    preprocessing: Decision[dict[str, Any]]
    detector: Decision[dict[str, Any]]  # width, depth and levels of a detector's head; empty without one
    epochs: Decision[int]
    most_epochs: Decision[int]  # that a run which is still improving may be extended to; `epochs` or less: it never is
    time: Decision[float]  # seconds that the whole run may take; 0 is no limit
    batch: Decision[int]
    accumulate: Decision[int]
    optimizer: Decision[str]
    lr: Decision[float]
    head_lr: Decision[float]
    layer_decay: Decision[float]  # learning rate of a layer over that of the next nearer to the head; 1 is off
    freeze: Decision[str]  # "" nothing, a number of layers, "all-but-head", or a pattern of parameter names
    unfreeze: Decision[str]  # "never", "gradual", or after how many epochs
    weight_decay: Decision[float]
    momentum: Decision[float]
    schedule: Decision[str]
    warmup: Decision[float]
    decay: Decision[float]  # share of the run at its end over which wsd falls
    milestones: Decision[list[float]]
    period: Decision[float]
    gamma: Decision[float]
    lrf: Decision[float]
    clip: Decision[float]
    clip_value: Decision[float]
    label_smoothing: Decision[float]
    dropout: Decision[float]
    drop_path: Decision[float]
    ema: Decision[bool]
    swa: Decision[float]  # share of the run at its end over which weights are averaged equally; 0 is off
    patience: Decision[int]
    min_delta: Decision[float]
    monitor: Decision[str]
    balance: Decision[str]
    augment: Decision[str]
    scale: Decision[float]  # zoom in place of the preset's; 0 keeps that
    multi_scale: Decision[float]
    progressive: Decision[float]  # share of imgsz at the start; 1 is off
    size_step: Decision[int]  # between two sizes, pixels; 0: the network takes one only
    policy: Decision[str]
    erase: Decision[float]
    close_augment: Decision[float]
    flip: Decision[float]
    mixup: Decision[float]
    cutmix: Decision[float]
    mosaic: Decision[float]  # probability that four pictures with objects share an input
    copy_paste: Decision[float]  # probability that objects with masks of another picture lie upon an input
    max_det: Decision[
        int
    ]  # objects that a detector reports of a picture, at most; 0 without one, and as the data has it in plans of earlier versions
    precision: Decision[str]
    channels_last: Decision[bool]
    compile: Decision[str]
    device: Decision[str]
    allocator: Decision[str]  # "keep" freed memory for the next step, or the "system" default
    threads: Decision[int]
    cache: Decision[str]
    workers: Decision[int]
    prefetch: Decision[int]  # batches ahead, of each loader process
    latency: Decision[float]  # most milliseconds for one image in production; 0 is no limit
    latency_threads: Decision[int]
    seed: Decision[int]
    deterministic: Decision[bool]
    rehearse: Decision[bool]
    measured: Measured | None = None  # the figures behind what was measured; decides nothing
    sample_seconds: float = (
        0.0  # of a training sample in a step, where a time is to be kept; 0: not timed; decides nothing
    )

    def decisions(self) -> dict[str, Decision[Any]]:
        """Every decision by name, in the order of the schema."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _FIGURES}

    def changed(self, **values: Any) -> Plan:
        """The same plan with other values of some decisions: to try something out, not to be kept."""
        tried: dict[str, Any] = {name: Decision(value, "tried out", "rule") for name, value in values.items()}
        return replace(self, **tried)

    def thawed(self) -> Plan:
        """The same plan as when all trains that ever will: its dearest steps, which are the ones to measure."""
        return self if self.unfreeze.value == "never" else self.changed(freeze="")

    def with_latencies(self, costs: tuple[LatencyCost, ...]) -> Plan:
        """The same plan that also records the latencies behind its model and image size."""
        measured = self.measured or Measured(batch=self.batch.value)
        return replace(self, measured=replace(measured, latencies=costs))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values: {"decisions": {name: {"value", "source", "reason"}}}, with "measured" and "sample_seconds" if they were."""
        rows = {n: {"value": d.value, "source": d.source, "reason": d.reason} for n, d in self.decisions().items()}
        figures: dict[str, Any] = {"measured": self.measured.to_dict()} if self.measured is not None else {}
        if self.sample_seconds:
            figures["sample_seconds"] = self.sample_seconds
        return {"decisions": rows} | figures

    @classmethod
    def from_dict(cls, value: Any, *, where: str = "") -> Plan:
        """The inverse of to_dict.

        Raises:
            RequestError: a decision is missing, unknown or of the wrong type.
        """
        table = value.get("decisions") if isinstance(value, dict) else None
        if not isinstance(table, dict):
            raise RequestError("This is not a plan: it has no decisions.", where=where)
        added = {n: {"value": v, "reason": EARLIER, "source": "rule"} for n, v in ADDED.items()}
        table = added | table
        expected = {f.name: str(f.type) for f in fields(cls) if f.name not in _FIGURES}
        problems = [f"{name}: no such decision" for name in table if name not in expected]
        problems += [f"{name}: missing" for name in expected if name not in table]
        found: dict[str, Any] = {}
        for name, type_text in expected.items():
            row: Any = table.get(name)
            if not isinstance(row, dict):
                continue
            kind = type_text.removeprefix("Decision[").removesuffix("]").split("[")[0]
            kinds: dict[str, tuple[type, ...]] = {
                "str": (str,), "int": (int,), "float": (float, int), "bool": (bool,), "dict": (dict,),
                "list": (list,),
            }  # fmt: skip
            ok = isinstance(row.get("value"), kinds[kind]) and (kind == "bool" or not isinstance(row["value"], bool))
            if not ok or row.get("source") not in ("asked", "rule", "measured"):
                problems.append(f"{name}: must be a {kind} with a source")
                continue
            raw = float(row["value"]) if kind == "float" else row["value"]
            found[name] = Decision(raw, str(row.get("reason", "")), row["source"])
        if problems:
            raise RequestError("The plan cannot be read:\n" + "\n".join(f"  {p}" for p in problems), where=where)
        try:
            measured = Measured.from_dict(value["measured"]) if value.get("measured") else None
            sample_seconds = float(value.get("sample_seconds") or 0.0)
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(f"The plan's measurements cannot be read: {error}.", where=where) from error
        return cls(**found, measured=measured, sample_seconds=sample_seconds)


def read_plan(path: Path) -> Plan:
    """Read plan.json.

    Raises:
        RequestError: the file is missing, not JSON, or not a plan.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"Could not read the plan: {error}.", where=str(path), next="check plan=FILE") from error
    return Plan.from_dict(value, where=str(path))
