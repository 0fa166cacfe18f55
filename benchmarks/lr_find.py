"""The learning rate of the table against the one that a range test finds: accuracy on the test split, by dataset and seed.

    python benchmarks/lr_find.py run DATASET [--seeds 3] [--most 100] [--data ../shared/data] [--results lr_find.jsonl]
    python benchmarks/lr_find.py report [--results lr_find.jsonl]
    python benchmarks/lr_find.py rules NAME=PLAN.json ...

DATASET is digits, trashnet, facemask or cifar. Each seed trains twice, as `goodfit train` does it, once with the default
rate and once with `lr=find`. A line of JSON per run goes into the results; what is there already is not run again. The
report gives mean and spread over seeds of both, the spread of the suggestion (largest over smallest), and the verdict by
the rule that is in `verdict`. `rules` compares the ways to read a rate off the same curves: plan.json of runs with `lr=find`,
or what `goodfit plan ... lr=find json=true` prints; plans of one name are those of one dataset with other seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

EPOCHS = {"digits": 6, "trashnet": 4, "facemask": 4, "cifar": 4}
PER_CLASS = {"train": 400, "test": 100}  # of CIFAR-10
ARMS = {"table": [], "found": ["lr=find"]}


def folder_of(dataset: str, data: Path, made: Path) -> tuple[Path, list[str]]:
    """The folder of a dataset, written if it has none, and what to ask for."""
    classify = data / "classify"
    if dataset == "trashnet":
        weights = data / "weights" / "mobilenetv2_100.safetensors"
        return classify / "trashnet" / "dataset-resized", [
            "model=mobilenetv2_100",
            f"pretrained={weights.resolve()}",
            "imgsz=96",
        ]
    if dataset == "facemask":
        return classify / "facemask_crops", ["model=resnet10t", "pretrained=false", "imgsz=64"]
    if dataset == "digits":
        from goodfit.api.demo import write_digits

        write_digits(made / "digits")
        return made / "digits", []
    with zipfile.ZipFile(classify / "cifar10" / "cifar10.zip") as archive:
        for name in archive.namelist():
            split, _, _ = name.partition("/")
            if name.endswith(".jpg") and int(Path(name).stem) < PER_CLASS[split]:
                archive.extract(name, made / "cifar")
    return made / "cifar", ["model=resnet10t", "pretrained=false"]


def train(folder: Path, words: list[str], epochs: int, seed: int, made: Path) -> dict[str, Any]:
    """One run: its result, and its learning rate."""
    command = [sys.executable, "-m", "goodfit", "train", str(folder.resolve()), *words, f"seed={seed}", f"epochs={epochs}",
               "measure=false", "rehearse=false", "suspects=false", f"project={made / 'runs'}", "json=true"]  # fmt: skip
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    plan = json.loads((Path(result["run"]) / "plan.json").read_text())
    test = result["metrics"]["test"]
    return {"lr": plan["decisions"]["lr"]["value"], "reason": plan["decisions"]["lr"]["reason"], "accuracy": test["accuracy"],
            "macro_f1": test["macro_f1"], "val": result["metrics"]["val"]["accuracy"], "n": test["n"],
            "train_seconds": result["seconds"]["train"], "plan_seconds": result["seconds"]["plan"],
            "seconds": time.monotonic() - began}  # fmt: skip


def run(dataset: str, seeds: int, most: int, data: Path, results: Path) -> None:
    """Train what is missing in the results, so many runs at most."""
    done = {(r["dataset"], r["seed"], r["arm"]) for r in read(results)}
    with tempfile.TemporaryDirectory() as made:
        folder, words = folder_of(dataset, data, Path(made))
        for seed in range(seeds):
            for arm in list(ARMS)[:: 1 if seed % 2 else -1]:
                if (dataset, seed, arm) in done or most == 0:
                    continue
                most -= 1
                row = {"dataset": dataset, "seed": seed, "arm": arm,
                       **train(folder, [*words, *ARMS[arm]], EPOCHS[dataset], seed, Path(made))}  # fmt: skip
                with open(results, "a", encoding="utf-8") as handle:
                    handle.write(json.dumps(row) + "\n")
                print(f"{dataset} seed {seed} {arm}: lr {row['lr']:.3g}, {100 * row['accuracy']:.1f} %, {row['seconds']:.0f} s",
                      flush=True)  # fmt: skip


def read(results: Path) -> list[dict[str, Any]]:
    """The runs so far."""
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.is_file() else []


def report(rows: list[dict[str, Any]]) -> str:
    """A table by dataset, and the verdict."""
    lines = [
        "dataset    arm    lr, lowest–highest    max/min  test accuracy by seed         mean    spread (max - min)"
    ]
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for dataset in dict.fromkeys(r["dataset"] for r in rows):
        for arm in ARMS:
            mine = sorted((r for r in rows if (r["dataset"], r["arm"]) == (dataset, arm)), key=lambda r: r["seed"])
            if not mine:
                continue
            score, rates = 100 * np.array([r["accuracy"] for r in mine]), np.array([r["lr"] for r in mine])
            found.setdefault(dataset, {})[arm] = (float(score.mean()), float(np.ptp(score)))
            lines.append(f"{dataset:<10} {arm:<6} {rates.min():.3g}–{rates.max():.3g}".ljust(40)
                         + f"{rates.max() / rates.min():>7.1f}  {'  '.join(f'{s:5.1f}' for s in score):<28}"
                         f"{score.mean():>6.1f}    {np.ptp(score):.1f}")  # fmt: skip
    return "\n".join([*lines, verdict(found)])


def verdict(found: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Whether the range test becomes the default: only where its mean is not below the table's by more than the larger of
    the two spreads on any dataset, and its mean spread over the datasets is the smaller one."""
    both = {d: f for d, f in found.items() if len(f) == 2}
    if not both:
        return "nothing to compare yet"
    worse = [d for d, f in both.items() if f["found"][0] < f["table"][0] - max(f["found"][1], f["table"][1])]
    spread = {arm: float(np.mean([f[arm][1] for f in both.values()])) for arm in ARMS}
    gain = float(np.mean([f["found"][0] - f["table"][0] for f in both.values()]))
    steadier = not worse and spread["found"] < spread["table"]
    return (f"{len(both)} datasets: found against table {gain:+.1f} points in the mean; mean spread {spread['found']:.1f} against "
            f"{spread['table']:.1f}; clearly worse on {', '.join(worse) or 'none'}: "
            f"{'the range test may be' if steadier else 'the table stays'} the default")  # fmt: skip


def readings(rates: np.ndarray, smoothed: np.ndarray) -> dict[str, float]:
    """Rates that usual rules read off a smoothed curve: the steepest fall (fastai's "steep"), a tenth of the rate of the lowest
    loss (its "minimum"), and a point in the longest valley (its "valley": half-way through the middle third)."""
    lowest = int(np.argmin(smoothed))
    slope = np.gradient(smoothed, np.log10(rates))
    length, best = np.ones(len(smoothed), int), 0
    for k in range(len(smoothed)):
        length[k] = 1 + max((length[j] for j in range(k) if smoothed[j] > smoothed[k]), default=0)
        best = k if length[k] > length[best] else best
    start = best - length[best]
    return {"steepest": float(rates[int(np.argmin(slope[: max(1, lowest) + 1]))]), "lowest / 10": float(rates[lowest]) / 10,
            "valley": float(rates[max(0, int(start + (best - start) / 2))])}  # fmt: skip


def compare_rules(words: list[str]) -> str:
    """Per rule and dataset: suggestions in multiples of the table's rate, and largest over smallest."""
    from goodfit.config.lr_range import LrCurve, judge

    found: dict[str, dict[str, list[float]]] = {}
    for word in words:
        name, _, path = word.partition("=")
        kept = json.loads(Path(path).read_text())["measured"]["lr_range"]
        made = judge(LrCurve(rates=tuple(kept["rates"]), losses=tuple(kept["losses"])), kept["table"])
        values = {"half of the fall": made.suggestion, **readings(np.array(made.rates), np.array(made.smoothed))}
        for rule, value in values.items():
            found.setdefault(rule, {}).setdefault(name, []).append(value / made.table)
    lines = []
    for rule, by in found.items():
        parts = [
            f"{n}: {' '.join(f'{v:.2f}' for v in vs)} ({max(vs) / max(1e-9, min(vs)):.1f})" for n, vs in by.items()
        ]
        lines.append(f"{rule:<18}" + "   ".join(parts))
    return "\n".join(lines)


def main() -> None:
    """Run one dataset, or report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("run", "report", "rules"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--most", type=int, default=100)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--results", type=Path, default=Path("lr_find.jsonl"))
    given = parser.parse_args()
    if given.what == "rules":
        print(compare_rules(given.names))
    elif given.what == "report":
        print(report(read(given.results)))
    for dataset in given.names if given.what == "run" else ():
        run(dataset, given.seeds, given.most, given.data, given.results)


if __name__ == "__main__":
    main()
