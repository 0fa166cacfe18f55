"""The story of a run on standard error: a progress bar where there is a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, TextIO

from goodfit.core.journal import Event

SHOWN = ("model", "pretrained", "imgsz", "batch", "precision", "optimizer", "lr", "head_lr", "schedule", "epochs",
         "balance", "augment", "flip", "cache", "workers", "device")  # fmt: skip
STAGE_WIDTH = 9
WIDTH = 112


class Terminal:
    """A listener that prints what happens, as it happens."""

    def __init__(self, stream: TextIO | None = None, *, unit: str = "img") -> None:
        self._unit = unit  # of the rate, a second
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._task: Any = None
        self._gone = False
        self._plan: dict[str, Event] = {}
        self._planned = False
        self._bare = 0.0
        self._start: tuple[float, int] | None = None
        self._fancy = bool(getattr(self._stream, "isatty", lambda: False)()) and os.environ.get("TERM") != "dumb"

    def __call__(self, event: Event) -> None:
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def _say(self, stage: str, text: str) -> None:
        self._line(f"{stage:<{STAGE_WIDTH}} {text}")

    def _line(self, line: str) -> None:
        """Print one line; a terminal that is gone never ends a run."""
        if self._gone:
            return
        shown = "".join(c if c.isprintable() else "?" for c in line)  # file names may hold escape codes
        try:
            if self._bar is not None:
                self._bar.console.print(shown, markup=False, highlight=False, soft_wrap=True)
            else:
                print(shown, file=self._stream, flush=True)
        except OSError:
            self._gone = True

    def _on_stage(self, event: Event) -> None:
        if event["name"] == "plan":
            self._planned = True
            asked = [name for name, event in self._plan.items() if event["source"] == "asked" and name not in SHOWN]
            for name in (*SHOWN, *asked):
                if name in self._plan:
                    self._decision(self._plan[name])
        if event.get("text"):
            self._say(event["name"], event["text"])
        if event["name"] == "rehearse":
            self._bare = (
                0.0 if event.get("varies") else float(event.get("bare_rate", 0.0))
            )  # of the mean over several sizes
        self._planned |= event["name"] == "resume"  # a resumed run has its plan
        if event["name"] == "train":
            self._close()

    def _on_decision(self, event: Event) -> None:
        if not self._planned:
            self._plan[event["name"]] = event
        else:
            self._decision(event)

    def _decision(self, event: Event) -> None:
        value = event["value"]
        text = f"{event['name']} {value:g}" if isinstance(value, float) else f"{event['name']} {value}"
        self._say("plan", f"{text}: {event['reason']}".ljust(WIDTH - 22) + f" [{event['source']}]")

    def _on_measured(self, event: Event) -> None:
        for line in event["table"]:
            self._say("measure", line)

    def _on_warning(self, event: Event) -> None:
        self._say("warning", event["text"])

    def _on_finding(self, event: Event) -> None:
        first = f" (first: {event['items'][0]})" if event["items"] else ""
        self._say("audit", f"{event['count']:,} {event['kind']}: {event['action']}{first}")

    def _on_progress(self, event: Event) -> None:
        self._say(event["name"], f"{event['done']:,} of {event['total']:,}")

    def _on_segment(self, event: Event) -> None:
        self._say(
            "segment",
            f"{event['segment']}: {event['reason']} (step {event['parent']['step']}), {event['epochs']} epochs",
        )

    def _on_step(self, event: Event) -> None:
        if event.get("skipped"):
            self._say("step", f"{event['step']}: loss or gradient not finite, update left out; samples in events.jsonl")
            return
        if self._start is None:
            self._start = (time.monotonic(), event["step"])
        if self._fancy and not self._gone:
            self._open(event["total_steps"])
            self._bar.update(
                self._task,
                completed=event["step"],
                total=event["total_steps"],
                note=f"loss {event['loss']:.3f} · {event['rate']:.0f} {self._unit}/s · lr {event['lr']:.1e}",
            )

    def _on_epoch(self, event: Event) -> None:
        val, total = event["val"], event["total_steps"]
        steps_per_epoch = max(1, event["step"] // (event["epoch"] + 1))
        speed = f"{event['samples_per_second']:.0f} {self._unit}/s"
        if self._bare:
            speed += f" ({event['samples_per_second'] / self._bare:.0%} of the model's own speed)"
        arrow = " ↑" if event["improved"] else ""
        figures = [(name, float(value)) for name, value in val.items() if name != "loss"]
        if "accuracy" in val:
            figures = [("acc", float(val["accuracy"]))]
        shown = "".join(
            f" · {name} " + (f"{100 * value:.1f} %" if name == "acc" else f"{value:.4g}") for name, value in figures[:3]
        )
        memory = f"{event['memory'] / 1e9:.1f} GB"
        line = (
            f"epoch {event['epoch'] + 1}/{max(event['epoch'] + 1, total // steps_per_epoch)}  loss {float(event['train_loss']):.3f} · "
            f"val {float(val['loss']):.3f}{shown}{arrow} · lr {event['lr']:.1e} · "
            f"{speed} · {memory}{self._eta(event)}"
        )
        self._line(line)

    def _eta(self, event: Event) -> str:
        if self._start is None or event["step"] <= self._start[1]:
            return ""
        began, first = self._start
        left = (event["total_steps"] - event["step"]) * (time.monotonic() - began) / (event["step"] - first)
        return f" · ETA {left / 60:.0f} min" if left >= 90 else f" · ETA {left:.0f} s"

    def _on_failed(self, _event: Event) -> None:
        self._close()

    def _on_done(self, _event: Event) -> None:
        self._close()

    def _open(self, total: int) -> None:
        if self._bar is not None:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(TextColumn("train"), BarColumn(bar_width=30), TextColumn("{task.fields[note]}"),
                             TimeRemainingColumn(), console=Console(file=self._stream), transient=True)  # fmt: skip
        self._task = self._bar.add_task("train", total=total, note="")
        self._bar.start()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
