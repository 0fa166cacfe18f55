"""Keeps metrics.csv up to date from the events of a run."""

from __future__ import annotations

from pathlib import Path

from goodfit.core.history import metrics_csv
from goodfit.core.journal import Event, read_events
from goodfit.core.safeio import write_text


class MetricsFile:
    """A listener that rewrites `metrics.csv` at every epoch; after a resume it starts from the history that counts."""

    def __init__(self, run: Path) -> None:
        self._path = run / "metrics.csv"
        self._epochs = [e for e in read_events(run / "events.jsonl") if e["event"] == "epoch"]

    def __call__(self, event: Event) -> None:
        if event["event"] == "epoch":
            self._epochs.append(event)
            write_text(self._path, metrics_csv(self._epochs))
