"""Accuracy on sealed test images beside the systems that people use now, at equal wall-clock on this machine.

    python benchmarks/accuracy.py run --peers PYTHON [--budget 60] [--seeds 0 1 2 3 4] [--datasets NAME...] [--only NAME...]
                                      [--most 1000] [--goodfit WORD...] [--model NAME] [--data ../shared/data] [--work accuracy]
    python benchmarks/accuracy.py report [--work accuracy]

Datasets: trashnet (photos, mobilenetv2_100 pretrained), cifar10 (10,000 of its training images and its own test images, from
scratch) and facemask (crops of three classes, 24 : 4 : 1, from scratch: goodfit's own choice for crops of 33 pixels, and
Ultralytics can take part). All systems are given the same files, split by goodfit once, the same network and image size (what
`goodfit plan` chooses, or `--model`) and a batch of 32; what else they do is their default (accuracy_systems.py says what).

Equal wall-clock: the training of each, from its first batch to the end of its last epoch with all validations, is to take the
budget in seconds. A run's number of epochs follows from the seconds of this system's epochs in earlier runs (at first one of
two epochs that is not judged), so that its schedule ends properly; what it then took is in the table. Every system
keeps the epoch it keeps by default, predicts the test images once, and all predictions are judged by `score`.

One process at a time, the order turned with every seed. Each run is a line of results.jsonl; what is there already is not run
again. `--goodfit` adds words to goodfit's command, and the row is named after them. `--images N` takes N images per class and
split, for trials.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_data import Task, make_task
from cache_accuracy import STUDENT
from peers import run as run_process

import goodfit as package

DATASETS = ("trashnet", "cifar10", "facemask")
SYSTEMS = ("goodfit", "torchvision", "trainer", "trainer-1e-3", "fastai", "ultralytics")
BATCH = 32
PACE_EPOCHS = 2
Row = dict[str, Any]


def score(predictions: dict[str, str], task: Task) -> Row:
    """Accuracy and macro F1 (a class that is neither there nor predicted does not count) on the test images, as shares."""
    truth = {str(p.relative_to(task.tree)): p.parent.name for p in task.test_files()}
    assert predictions.keys() == truth.keys(), "not the test images"
    pairs = [(truth[file], label) for file, label in predictions.items()]
    each = []
    for kind in task.classes:
        hits = sum(t == kind == p for t, p in pairs)
        named = sum((t == kind) + (p == kind) for t, p in pairs)
        each += [2 * hits / named] if named else []
    return {"n": len(pairs), "accuracy": sum(t == p for t, p in pairs) / len(pairs), "macro_f1": statistics.mean(each)}


def train(system: str, task: Task, epochs: int, seed: int, peers: str, made: Path) -> Row:
    """One training: its epochs' ends, whole-process seconds, and what it scores."""
    if not system.startswith("goodfit"):
        told_file, script = made / "task.json", Path(__file__).with_name("accuracy_systems.py")
        told_file.write_text(json.dumps(vars(task)), "utf-8")
        text, _, seconds, _ = run_process(
            [peers, str(script), system, str(told_file), str(epochs), str(seed), str(made)], made
        )
        told = json.loads(text.strip().splitlines()[-1])
        predictions = json.loads((made / "predictions.json").read_text("utf-8"))
        return {**told, "seconds": seconds, **score(predictions, task)}
    weights = (
        [f"model={task.model}", f"pretrained={task.weights}"]
        if task.weights
        else [f"model={task.model}", "pretrained=false"]
    )
    command = [sys.executable, "-m", "goodfit", "train", task.tree, *weights, f"imgsz={task.imgsz}", f"batch={BATCH}",
               f"epochs={epochs}", f"seed={seed}", f"project={made}", "name=run", *system.split()[1:]]  # fmt: skip
    _, _, seconds, _ = run_process(command, made)
    run = package.Run(made / "run")
    laps = np.cumsum([e["seconds"] for e in run.events if e["event"] == "epoch"]).tolist()
    found = run.predict(task.test_files())
    predictions = {str(Path(f["image"]).relative_to(task.tree)): f["label"] for f in found}
    return {"laps": laps, "seconds": seconds, **score(predictions, task)}


def epochs_within(budget: float, rows: list[Row]) -> int:
    """So many epochs as take the budget at the pace of the last trainings of one system (whose first epoch has its own)."""
    recent = rows[-3:]  # a pause of the machine in one of them counts for little, and not for ever
    first = statistics.median(r["laps"][0] for r in recent)
    later = statistics.median((r["laps"][-1] - r["laps"][0]) / (len(r["laps"]) - 1) if r["laps"][1:] else r["laps"][0]
                              for r in recent)  # fmt: skip
    of_its_own = len(rows[0]["laps"]) - rows[0]["epochs"]  # fastai's first epoch, of the head alone
    return max(1, 1 + round((budget - first) / later) - of_its_own)


def run(asked: argparse.Namespace) -> None:
    """Train what is missing in the results."""
    results = asked.work / "results.jsonl"
    names = [" ".join([n, *asked.goodfit]) if n == "goodfit" else n for n in asked.only]
    left = asked.most
    for dataset in asked.datasets:
        task = make_task(
            dataset,
            asked.data,
            asked.work.resolve(),
            most=asked.images,
            model="" if dataset == "trashnet" else asked.model,
        )
        taking_part = [n for n in names if not (task.weights and n == "ultralytics")]
        for number, seed in enumerate(asked.seeds):
            turn = number % len(taking_part)
            for system in taking_part[turn:] + taking_part[:turn]:
                key = {"dataset": dataset, "images": asked.images, "model": task.model, "system": system}
                rows = [r for r in read(results) if {k: r[k] for k in key} == key]
                if any((r["budget"], r["seed"]) == (asked.budget, seed) for r in rows):
                    continue
                for budget in (0, asked.budget):  # 0: the pace, not judged
                    rows = [r for r in read(results) if {k: r[k] for k in key} == key]
                    if left == 0 or (budget == 0 and rows):
                        continue
                    epochs = epochs_within(budget, rows) if budget else PACE_EPOCHS
                    begun = time.strftime("%FT%T")
                    try:
                        with tempfile.TemporaryDirectory() as made:
                            found = train(system, task, epochs, seed, asked.peers, Path(made))
                    except RuntimeError as error:  # the others' figures count without it
                        print(f"{dataset} seed {seed} {system}: left out, {error}", flush=True)
                        break
                    left -= 1
                    row = {**key, "budget": budget, "seed": seed, "epochs": epochs, "begun": begun,
                           "imgsz": task.imgsz, **found}  # fmt: skip
                    with open(results, "a", encoding="utf-8") as handle:
                        handle.write(json.dumps(row) + "\n")
                    what = f"{100 * row['accuracy']:5.1f} %  F1 {100 * row['macro_f1']:5.1f} %" if budget else "pace"
                    print(f"{dataset:<9} seed {seed} {system:<14} {what:<22}{epochs:4} epochs {row['laps'][-1]:6.1f} s, "
                          f"{row['seconds']:6.1f} s in all", flush=True)  # fmt: skip


def read(results: Path) -> list[Row]:
    """The runs so far."""
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.is_file() else []


def interval(values: list[float]) -> str:
    """Mean and 95 % interval of it (Student's t)."""
    if len(values) < 2:
        return f"{statistics.mean(values):.1f}"
    half = STUDENT[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def _name(row: Row) -> str:
    return f"{row['dataset']}, {row['model']}, {row['imgsz']} px, n = {row['n']}"


def report(rows: list[Row]) -> str:
    """The tables of one budget: each system, and goodfit less the best of the others, paired by seed."""
    lines = [
        "| dataset | system | seeds | epochs | accuracy % | macro F1 % | training s | process s |",
        "|---" * 8 + "|",
    ]
    gaps = ["| dataset | best other, accuracy | goodfit − it, points | best other, macro F1 | goodfit − it, points |",
            "|---" * 5 + "|"]  # fmt: skip
    overall: dict[str, list[float]] = {"accuracy": [], "macro_f1": []}
    for dataset in dict.fromkeys(_name(r) for r in rows):
        mine: dict[str, dict[int, Row]] = {}
        for row in rows:
            if _name(row) == dataset:
                mine.setdefault(row["system"], {})[row["seed"]] = row
        for system, by_seed in mine.items():
            found = list(by_seed.values())
            epochs = sorted({r["epochs"] for r in found})
            per_cent = [interval([100 * r[k] for r in found]) for k in overall]
            lines.append(f"| {dataset} | {system} | {len(found)} | {'–'.join(map(str, dict.fromkeys((epochs[0], epochs[-1]))))} | "
                         f"{per_cent[0]} | {per_cent[1]} | {interval([r['laps'][-1] for r in found])} | "
                         f"{interval([r['seconds'] for r in found])} |")  # fmt: skip
        cells = [dataset]
        for figure in overall:
            others = {
                s: statistics.mean(r[figure] for r in f.values())
                for s, f in mine.items()
                if not s.startswith("goodfit")
            }
            if "goodfit" not in mine or not others:
                continue
            best = max(others, key=lambda name: others[name])
            pairs = [(r, mine[best][seed]) for seed, r in mine["goodfit"].items() if seed in mine[best]]
            cells += [best, interval([100 * (a[figure] - b[figure]) for a, b in pairs]) if pairs else "no common seed"]
            overall[figure].append(100 * (statistics.mean(r[figure] for r in mine["goodfit"].values()) - others[best]))
        gaps += ["| " + " | ".join(cells) + " |"] if len(cells) == 5 else []
    means = ", ".join(f"{figure} {statistics.mean(values):+.1f}" for figure, values in overall.items() if values)
    return "\n".join(
        [*lines, "", *gaps, "", f"goodfit − best other, mean over datasets: {means or 'nothing to compare yet'}"]
    )


def main() -> None:
    """Run, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--peers", default="", help="the interpreter of an environment with benchmarks/peers.txt")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=DATASETS)
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--most", type=int, default=1000, help="trainings in this call")
    parser.add_argument("--goodfit", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--model", default="", help="from scratch, another network than goodfit would choose")
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("accuracy"))
    asked = parser.parse_args()
    if asked.what == "run":
        asked.work.mkdir(parents=True, exist_ok=True)
        cache = asked.work.resolve() / "cache"  # its record of looks at test images is not the user's
        os.environ["GOODFIT_CACHE_DIR"] = str(cache)
        os.environ["PYTHONPATH"] = str(Path(package.__file__).parents[1])  # the peers build the same network
        run(asked)
    rows = [r for r in read(asked.work / "results.jsonl") if r["budget"]]
    for images, budget in sorted({(r["images"], r["budget"]) for r in rows}):
        few = f", {images} images per class" if images else ""
        print(f"\n{budget:g} s of training{few}\n")
        print(report([r for r in rows if (r["images"], r["budget"]) == (images, budget)]))


if __name__ == "__main__":
    main()
