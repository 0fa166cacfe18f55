"""Batch-norm statistics of the moving average: averaged like the weights, or taken anew from training samples?

    python benchmarks/average_statistics.py FOLDER [--seeds 3] [word=value ...]

Each seed trains once (its own split, no early stopping); after every epoch the same averaged weights are validated with
each kind of statistics, and each kind takes the epoch that it validates best, as a run does. Prints the validation and
test accuracy of that epoch, the mean of validation loss over all epochs, and what taking the statistics costs.
"""

from __future__ import annotations

import copy
import sys
import time
from contextlib import closing
from typing import Any

import numpy as np

from goodfit.api.assemble import Parts, assemble, execution
from goodfit.api.decide import decide
from goodfit.api.prepare import read_and_audit
from goodfit.config.parse import read_request
from goodfit.core.journal import Journal
from goodfit.engine.batch_norm import renew_statistics
from goodfit.engine.evaluate import evaluate
from goodfit.engine.state import copy_buffers
from goodfit.engine.step import train_step

KINDS = {"averaged": 0, "anew 256": 256, "anew 1024": 1024}  # training samples that statistics are taken from


def measured(parts: Parts, model: Any, loader: Any) -> dict[str, float]:
    """The metrics of a network on a split."""
    meter = evaluate(model, loader, task=parts.task, transform=parts.context.transform, device=parts.context.device,
                     ranks=parts.context.ranks)  # fmt: skip
    assert meter is not None
    return meter.compute()


def train(parts: Parts) -> dict[str, Any]:
    """Train all epochs; per kind and epoch the metrics of validation and test."""
    state, train = parts.state, parts.train
    test = parts.eval_loader(parts.index.rows("test"))
    found: dict[str, Any] = {kind: [] for kind in KINDS} | {"step": 0.0} | {f"{kind} seconds": 0.0 for kind in KINDS}
    progress = state.progress
    assert state.ema is not None
    while progress.step < progress.schedule.total_steps:
        progress.closing = progress.schedule.is_closing(progress.step)
        began = time.perf_counter()
        with closing(train.groups(progress.epoch, 0, progress.num_micro, closing=progress.closing)) as groups:
            for group in groups:
                train_step(
                    state, parts.context, group, progress.schedule.factor(progress.step), copy_buffers(state.model)
                )
        found["step"] += time.perf_counter() - began
        for kind, num in KINDS.items():
            began = time.perf_counter()
            average = copy.deepcopy(state.ema.model)
            if num:
                renew_statistics(average, state.model, train, parts.context, epoch=progress.epoch,
                                 num_micro=progress.num_micro, num_samples=num)  # fmt: skip
            found[f"{kind} seconds"] += time.perf_counter() - began
            found[kind].append((measured(parts, average, parts.val), measured(parts, average, test)))
        progress.epoch += 1
    return found


def main() -> None:
    """Print a line per seed and kind, and the means."""
    folder, words = sys.argv[1], sys.argv[2:]
    seeds = 3
    if "--seeds" in words:
        at = words.index("--seeds")
        seeds, words = int(words[at + 1]), words[:at] + words[at + 2 :]
    asked = dict(word.split("=", 1) for word in words)
    rows: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for seed in range(seeds):
        request = read_request({"data": folder, "seed": seed, "split_seed": seed, "suspects": False, "ema": True,
                                "rehearse": False, **asked})  # fmt: skip
        audited = read_and_audit(request, Journal(None, ()), None)
        plan = decide(request, audited, Journal(None, ()), None)
        with execution(plan):
            found = train(assemble(plan, audited.index))
        for kind in KINDS:
            monitor = plan.monitor.value
            best = max(found[kind], key=lambda pair: (pair[0][monitor], -pair[0]["loss"]))
            losses = [val["loss"] for val, _ in found[kind]]
            rows[kind].append([100 * best[0]["accuracy"], 100 * best[1]["accuracy"], 100 * best[1]["macro_f1"],
                               best[0]["loss"], float(np.mean(losses))])  # fmt: skip
            course = " ".join(f"{100 * val['accuracy']:.1f}" for val, _ in found[kind])
            print(f"seed {seed} {kind:<10} val {rows[kind][-1][0]:.1f} %, test {rows[kind][-1][1]:.1f} %, "
                  f"test macro F1 {rows[kind][-1][2]:.1f} %, val loss {rows[kind][-1][3]:.4f}, mean over epochs {rows[kind][-1][4]:.4f}; "
                  f"by epoch {course}", flush=True)  # fmt: skip
        shares = ", ".join(f"{kind} {100 * found[f'{kind} seconds'] / found['step']:.0f} %" for kind in KINDS)
        print(f"seed {seed} time beside that of training: {shares}", flush=True)
    for kind in KINDS:
        val, test, macro, loss, mean = np.mean(rows[kind], axis=0)
        print(
            f"{kind:<10} val {val:.2f} %, test {test:.2f} %, test macro F1 {macro:.2f} %, val loss {loss:.4f}, mean {mean:.4f}"
        )


if __name__ == "__main__":
    main()
