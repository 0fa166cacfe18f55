"""What multi-scale training gives at other input sizes than that of training: the same runs with and without it.

    python benchmarks/multi_scale.py FOLDER [--arms multi_scale=0,multi_scale=0.5] [--shares 0.7,1,1.4] [--seeds 3]
                                     [--runs FOLDER] imgsz=128 [word=value ...]

Each seed trains once per arm on the same split (split_seed=seed) with the same draws; further words go to `goodfit train`.
The best weights of each run are then judged at shares of imgsz, through the serving path at that size (the shorter side
scaled in the same ratio), on the validation split, which chose the weights, and on the test split. The test split is looked
at here beside the ledger: nothing may be chosen by these figures. Prints one Markdown table: accuracy in per cent, mean and
95 % interval (Student's t) over the seeds; last the differences of an arm from the first, by seed.

--runs keeps the runs, and finds those of an earlier call again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

import goodfit
from goodfit.api.assemble import EVAL_BATCH, Parts, execution
from goodfit.api.finish import load_best
from goodfit.api.train import reopen
from goodfit.core.journal import Journal
from goodfit.data.loader import EvalLoader
from goodfit.engine.checkpoint import Checkpoints, restore
from goodfit.engine.device import DevicePolicy
from goodfit.engine.evaluate import evaluate

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 97.5 % quantiles for 1 to 9 degrees of freedom
SPLITS = ("val", "test")


def trained(data: Path, runs: Path, arm: str, seed: int, words: list[str]) -> goodfit.Run:
    """The run of an arm and a seed: trained, or found."""
    name = f"{arm.replace('=', '-').replace('+', '-')}-{seed}"
    if (runs / name / "result.json").is_file():
        return goodfit.Run(runs / name)
    asked = dict(word.split("=", 1) for word in [*words, *arm.split("+")])
    return goodfit.train(data, project=str(runs), name=name, exist_ok=True, seed=seed, split_seed=seed, suspects=False,
                         rehearse=False, measure=False, **asked)  # fmt: skip


def judged(run: goodfit.Run, shares: list[float]) -> dict[tuple[str, float], float]:
    """Accuracy in per cent of a run's best weights, in float32, for each split and share of its image size."""
    parts = reopen(run, Journal(None))
    checkpoints = Checkpoints(run.path / "checkpoints", parts.hashes)
    snapshot = checkpoints.latest()
    assert snapshot is not None
    restore(parts.state, snapshot)
    load_best(parts, checkpoints)
    with execution(parts.plan):
        found = {(split, share): _accuracy(parts, split, share) for split in SPLITS for share in shares}
    own = 100 * float(snapshot.progress["best"]["metrics"]["accuracy"])
    mine = found.get(("val", 1.0), own)
    assert abs(mine - own) <= 0.6, f"{run.path.name}: {mine:.2f} % here, {own:.2f} % in its own validation"
    return found


def _accuracy(parts: Parts, split: str, share: float) -> float:
    tried = parts.preprocessing.at(round(share * parts.preprocessing.size))
    device = DevicePolicy(kind=parts.plan.device.value, precision="fp32", channels_last=parts.plan.channels_last.value)
    loader = EvalLoader(parts.index, parts.index.rows(split), preprocessing=tried, batch=EVAL_BATCH,
                        threads=parts.plan.threads.value, collate=parts.task.collate, keep=False)  # fmt: skip
    context = parts.context
    meter = evaluate(parts.state.model, loader, task=context.task, transform=context.transform, device=device,
                     ranks=context.ranks)  # fmt: skip
    assert meter is not None
    return 100 * meter.compute()["accuracy"]


def _interval(values: list[float]) -> str:
    half = STUDENT[len(values) - 2] * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.1f} ± {half:.1f}"


def main() -> None:
    """Print a line per run, then the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--arms", default="multi_scale=0,multi_scale=0.5", help="options joined by +, arms by commas")
    parser.add_argument("--shares", default="0.7,1,1.4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path)
    given, words = parser.parse_known_args()
    shares = [float(share) for share in given.shares.split(",")]
    arms = given.arms.split(",")
    found: dict[tuple[str, str, float], list[float]] = {}
    with tempfile.TemporaryDirectory() as made:
        runs = given.runs or Path(made)
        for seed in range(given.seeds):
            for arm in arms[:: -1 if seed % 2 else 1]:
                run = trained(given.data, runs, arm, seed, words)
                for (split, share), accuracy in judged(run, shares).items():
                    found.setdefault((arm, split, share), []).append(accuracy)
                rate = run.result["rate"]["samples_per_second"]
                print(f"{arm} seed {seed}: {rate:.0f} img/s; " + ", ".join(
                    f"{split} at {share:g}: {found[arm, split, share][-1]:.1f}" for split in SPLITS for share in shares
                ), flush=True)  # fmt: skip
    columns = [(split, share) for split in SPLITS for share in shares]
    print(f"\n| {' | '.join(['run', *(f'{split}, {share:g}×' for split, share in columns)])} |")
    print("|" + "---|" * (1 + len(columns)))
    for arm in arms:
        print(f"| {' | '.join([arm, *(_interval(found[arm, split, share]) for split, share in columns)])} |")
    for arm in arms[1:]:
        gaps = [np.subtract(found[arm, *column], found[arms[0], *column]).tolist() for column in columns]
        print(f"| {' | '.join([f'{arm}, difference', *(_interval(gap) for gap in gaps)])} |")
    print(f"\ntorch {torch.__version__}, {given.seeds} seeds, {' '.join(words)}")


if __name__ == "__main__":
    main()
