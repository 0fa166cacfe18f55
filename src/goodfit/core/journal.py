"""The one record of a run: `events.jsonl`, one JSON object a line, appended and never rewritten.

Events go one way. The engine and the stages emit; watchers (the terminal, plots, the report) read. A listener that
fails is dropped with one warning: it can neither change nor slow the run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from goodfit.core.errors import StorageError
from goodfit.core.safeio import as_json, storage_errors

Event = dict[str, Any]
Listener = Callable[[Event], None]

PATIENCE = 120.0  # seconds for which events may wait to be written ...
# ... of those of training, which are there before the next stage's event, or that one raises; the last is a stage's name
MAY_WAIT = ("step", "epoch", "checkpoint", "progress", "segment", "decision", "saving")

logger = logging.getLogger("goodfit")


class Journal:
    """Appends events to a run's `events.jsonl` and hands each to the listeners.

    One event is one `write` of one line, so a kill can tear only the last line, which readers skip. What training says and cannot be
    written, as where the disk is full for a while, waits for the next event; after `PATIENCE` seconds of that an event raises.
    """

    def __init__(self, path: Path | None, listeners: tuple[Listener, ...] = ()) -> None:
        self._listeners = list(listeners)
        self._descriptor: int | None = None
        self._waiting: list[bytes] = []  # for a file
        self._unwritten = b""  # for room in it ...
        self._since: float | None = None  # ... from this moment on
        self.segment = 0
        self.step = 0
        if path is not None:
            self.open(path)

    def open(self, path: Path) -> None:
        """Start writing to a file; events emitted before it are written first."""
        torn = False
        if path.exists() and path.stat().st_size > 0:
            with open(path, "rb") as handle:
                handle.seek(-1, os.SEEK_END)
                torn = handle.read(1) != b"\n"
        with storage_errors(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._path = path
        if torn:  # a kill cut the last line: end it, so that the next event starts on its own
            self._write(b"\n")
        for line in self._waiting:
            self._write(line)
        self._waiting.clear()

    def _write(self, line: bytes, *, may_wait: bool = False) -> None:
        """All that waits, and a line; raises StorageError where nothing could be written for long."""
        assert self._descriptor is not None
        self._unwritten += line
        try:
            with storage_errors(self._path):
                while self._unwritten:
                    self._unwritten = self._unwritten[os.write(self._descriptor, self._unwritten) :]
        except StorageError:
            now = time.monotonic()
            self._since = now if self._since is None else self._since
            if not may_wait or now - self._since > PATIENCE:
                raise
        else:
            self._since = None

    def listen(self, listener: Listener) -> None:
        """Hand every later event to one more listener."""
        self._listeners.append(listener)

    def emit(self, event: str, **fields: Any) -> None:
        """Record one event. Floats that are not finite are written as text ("nan", "inf"), so that lines stay JSON."""
        record = {"event": event, "time": round(time.time(), 3), "segment": self.segment, "step": self.step}
        record.update(as_json(fields))
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "surrogateescape")
        if self._descriptor is None:
            self._waiting.append(line)
        else:
            self._write(line, may_wait=(fields.get("name") if event == "stage" else event) in MAY_WAIT)
        for listener in list(self._listeners):
            try:
                listener(dict(record))
            except Exception as error:  # a watcher never ends a run
                self._listeners.remove(listener)
                logger.warning("a watcher failed and was switched off: %s: %s", type(error).__name__, error)

    def close(self) -> None:
        """Close the file; emitting afterwards is an error of the caller."""
        if self._descriptor is not None:
            with contextlib.suppress(StorageError):
                self._write(b"")
            os.close(self._descriptor)
            self._descriptor = None


def read_lines(path: Path) -> Iterator[Event]:
    """All whole events of a file, in order of writing; a torn line is skipped."""
    if not path.exists():
        return
    with open(path, "rb") as handle:
        for line in handle:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                yield event


def read_events(path: Path) -> list[Event]:
    """The history that counts: after a resume from step N, what the lost attempt recorded beyond N is left out.

    A resume is an event `run` with `resumed_from = {"segment": S, "step": N}`.
    """
    events: list[Event] = []
    for event in read_lines(path):
        origin = event.get("resumed_from")
        if event["event"] == "run" and isinstance(origin, dict):
            mark = (origin["segment"], origin["step"])
            events = [e for e in events if e["event"] in ("run", "stage", "decision", "finding") or _at(e) <= mark]
        events.append(event)
    return events


def _at(event: Event) -> tuple[int, int]:
    return int(event.get("segment", 0)), int(event.get("step", 0))
