"""What the events of a run add up to: the rows of metrics.csv, the rate, the seconds of each stage."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from typing import Any

from goodfit.core.journal import Event

SECONDS = ("train_seconds", "seconds", "data_seconds", "step_seconds", "host_seconds", "validation_seconds",
           "saving_seconds", "other_seconds")  # fmt: skip


def epochs_of(events: Sequence[Event]) -> list[Event]:
    """The epochs of a run, in order: of one that was gone through again after a kill, the last record."""
    made = {(e["segment"], e["epoch"]): e for e in events if e["event"] == "epoch"}
    return [made[key] for key in sorted(made)]


def metrics_rows(epochs: Sequence[Event]) -> list[dict[str, Any]]:
    """The rows of metrics.csv: one per epoch and segment, the last record of each, in order."""
    table: dict[tuple[int, int], dict[str, Any]] = {}
    for event in epochs:
        key = (event["segment"], event["epoch"])
        table[key] = {
            "segment": event["segment"],
            "epoch": event["epoch"] + 1,
            "step": event["step"],
            "lr": event["lr"],
            "train/loss": event["train_loss"],
            **{f"val/{name}": value for name, value in event["val"].items()},
            "samples_per_second": round(event["samples_per_second"], 2),
            **{name: round(event[name], 3) for name in SECONDS},
        }
    return [table[key] for key in sorted(table)]


def metrics_csv(epochs: Sequence[Event]) -> str:
    """The text of metrics.csv."""
    rows = metrics_rows(epochs)
    text = io.StringIO()
    writer = csv.DictWriter(
        text, fieldnames=list(rows[0]) if rows else ["segment", "epoch", "step"], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def training_rate(events: Sequence[Event]) -> float:
    """Samples per second of the training part, data wait included: the median over epochs after the first."""
    rates = [e["samples_per_second"] for e in epochs_of(events) if e["samples_per_second"] > 0]
    if not rates:
        return 0.0
    return float(statistics.median(rates[1:] or rates))


def validation_seconds(events: Sequence[Event]) -> float:
    """What the longest validation took, as a rule the first, for which files were read; 0 before one."""
    return max((float(e["validation_seconds"]) for e in epochs_of(events)), default=0.0)


def bare_rate(events: Sequence[Event]) -> float:
    """Samples per second of the bare step that the last rehearsal measured; 0 without one."""
    return next((float(e["bare_rate"]) for e in reversed(events) if e["event"] == "stage" and e.get("bare_rate")), 0.0)


def stage_found(events: Sequence[Event], name: str, field: str) -> dict[str, Any]:
    """What the last stage of this name recorded in a field, if the run was not extended after it; empty otherwise."""
    for event in reversed(events):
        if event["event"] == "segment":  # what comes after has other weights
            break
        if event["event"] == "stage" and event["name"] == name:
            return dict(event[field])
    return {}


def stage_seconds(events: Sequence[Event]) -> dict[str, float]:
    """Seconds of each finished stage, summed over resumes, in the order of the first time."""
    seconds: dict[str, float] = {}
    for event in events:
        if event["event"] == "stage" and "seconds" in event:
            seconds[event["name"]] = round(seconds.get(event["name"], 0.0) + event["seconds"], 3)
    return seconds
