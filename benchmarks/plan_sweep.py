"""The plan's execution beside a full sweep: the real training step in every way, at every batch size, in turn.

    python benchmarks/plan_sweep.py DATA [--rounds 12] [--epochs 100] [--only MODEL]

DATA holds classify/ and weights/. For resnet18 from scratch at 128 px and pretrained mobilenetv2_100 at 160 px on trashnet:
`goodfit plan` as a user calls it, with nothing remembered, then a sweep of its own (precision × memory format × batch sizes, and
compiled in the best two of them), one step of each in turn. Prints both, and the chosen way's rate over that of fp32, contiguous,
eager, at the chosen batch, and over the best of the sweep; and the same for the whole run, the seconds of compiling included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from goodfit.api.assemble import assemble, assemble_step, execution
from goodfit.api.prepare import read_and_audit
from goodfit.config.execution import batch_candidates
from goodfit.config.parse import read_request
from goodfit.config.plan import Plan
from goodfit.core.journal import Journal
from goodfit.engine.ranks import Ranks
from goodfit.planning.measure import timed_step

Way = tuple[str, bool, str, int]  # precision, channels-last, compile, batch


@dataclass(frozen=True)
class Cost:
    """What one way takes: samples per second, and seconds before the first usual step."""

    rate: float
    start: float

    def total(self, samples: int) -> float:
        """Seconds for so many samples."""
        return self.start + samples / self.rate


def planned(data: Path, words: list[str]) -> Plan:
    """What `goodfit plan` prints, decided anew in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        start = time.monotonic()
        command = [sys.executable, "-m", "goodfit", "plan", str(data), *words, "json=true"]
        done = subprocess.run(command, capture_output=True, text=True, check=True,
                              env={**os.environ, "GOODFIT_CACHE_DIR": cache})  # fmt: skip
        plan = Plan.from_dict(json.loads(done.stdout))
    assert plan.measured is not None
    print(f"goodfit plan: {time.monotonic() - start:.0f} s, of which {plan.measured.seconds:.0f} measuring")
    print("\n".join("  " + line for line in plan.measured.table()))
    for name in ("precision", "channels_last", "compile", "allocator", "batch", "workers", "lr"):
        decision = plan.decisions()[name]
        print(f"  {name} {decision.value} [{decision.source}]: {decision.reason}")
    return plan


def sweep(plan: Plan, data: Path, words: list[str], rounds: int) -> tuple[dict[Way, Cost], int]:
    """What every way takes, medians over steps that took turns; and the samples of an epoch."""
    audited = read_and_audit(read_request({"data": data, **dict(w.split("=") for w in words)}), Journal(None, ()))
    found: dict[Way, Cost] = {}
    with execution(plan):
        parts = assemble(plan, audited.index)
        num = len(parts.train.rows)
        starts: dict[Way, float] = {}

        def ready(way: Way) -> Callable[[], float]:
            precision, channels_last, compiled, batch = way
            tried = plan.changed(precision=precision, channels_last=channels_last, compile=compiled, batch=batch)
            state, context, _ = assemble_step(tried, parts.task, num // batch, Ranks())
            rows = parts.train.rows[np.arange(batch) % num]
            group = [parts.train.samples.micro_batch(0, rows)]
            start = time.monotonic()
            for _ in range(3):
                timed_step(state, context, group)
            starts[way] = time.monotonic() - start if compiled != "off" else 0.0
            return lambda: timed_step(state, context, group)

        def measure(ways: list[Way]) -> None:
            starts.clear()
            steps = {way: ready(way) for way in ways}
            seconds: dict[Way, list[float]] = {way: [] for way in ways}
            for number in range(rounds):
                for way in ways if number % 2 else ways[::-1]:
                    seconds[way].append(steps[way]())
            found.update({way: Cost(way[3] / statistics.median(times), starts[way]) for way, times in seconds.items()})

        eager = [(p, last, "off", b) for b in batch_candidates(num) for p in ("fp32", "bf16") for last in (False, True)]
        measure(eager)
        best = sorted(eager, key=lambda way: -found[way].rate)[:2]
        measure([*best, *((p, last, "default", b) for p, last, _, b in best)])
    return found, num


def main() -> None:
    """Print the tables and the two ratios for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--only")
    asked = parser.parse_args()
    trashnet = asked.data / "classify/trashnet/dataset-resized"
    models: dict[str, list[str]] = {
        "resnet18": ["pretrained=false", "imgsz=128"],
        "mobilenetv2_100": [f"pretrained={asked.data / 'weights/mobilenetv2_100.safetensors'}", "imgsz=160"],
    }
    for model, more in models.items():
        if asked.only not in (None, model):
            continue
        words = [f"model={model}", *more, "max_bad=0.05", f"epochs={asked.epochs}"]
        print(f"\n{model} {more[1]}, {asked.epochs} epochs")
        plan = planned(trashnet, words)
        found, num = sweep(plan, trashnet, words, asked.rounds)
        samples = asked.epochs * num
        for (precision, last, compiled, batch), cost in sorted(found.items(), key=lambda item: -item[1].rate):
            name = precision + (" + channels-last" if last else "") + (" + compile" if compiled != "off" else "")
            print(f"  sweep: {name:<34}batch {batch:<4}{cost.rate:7.1f} img/s, {cost.start:5.1f} s to compile, "
                  f"{cost.total(samples):6.0f} s in all")  # fmt: skip
        chosen = found[plan.precision.value, plan.channels_last.value, plan.compile.value, plan.batch.value]
        plain = found["fp32", False, "off", plan.batch.value]
        print(f"  chosen over fp32 contiguous eager {chosen.rate / plain.rate:.2f}; over the sweep's best rate "
              f"{chosen.rate / max(c.rate for c in found.values()):.3f}; the shortest run over the chosen one's "
              f"{min(c.total(samples) for c in found.values()) / chosen.total(samples):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
