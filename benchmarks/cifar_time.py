"""CIFAR-10, all 60,000 images, from scratch: accuracy against wall-clock, goodfit's default against a plain loop.

    python benchmarks/cifar_time.py run SYSTEM... [--epochs 30] [--seeds 0] [--model NAME] [--goodfit WORD...]
                                    [--data ../shared/data] [--work cifar-time]
    python benchmarks/cifar_time.py report [--work cifar-time] [--picture FILE.png]

SYSTEM is goodfit, plain or plain-half. All train the network that `goodfit plan` chooses for this data (or `--model`) on the
same 42,500 images, validate after every epoch on the same 7,500, and are tested once on the 10,000 of CIFAR-10's own
test split. `plain` is what people write: a DataLoader with two workers over the files, random crop with a border of 4
and flip, batch 128, AdamW at 1e-3 with weight decay 0.05, a warm-up of a twentieth and a cosine to zero, fp32;
`plain-half` the same in bf16 and channels-last.

A run that was cut off goes on where it was: goodfit by `goodfit resume`, the plain loop from its last epoch. What is in
results.jsonl is not run again. The report gives the seconds of training (validations included) until validation accuracy is first
at 85 and at 90 %, and those from the start of the process; ratios compare each system's fastest length of run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from accuracy_data import Task, make_task

SYSTEMS = ("goodfit", "plain", "plain-half")
TARGETS = (0.85, 0.90)
BATCH, WORKERS = 128, 2
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
Row = dict[str, Any]


def plain(task: Task, out: Path, epochs: int, seed: int, half: bool) -> Row:
    """The plain loop, from its last epoch on. Everything random follows from seed and epoch."""
    import psutil
    import torch
    from torch import nn
    from torchvision import datasets
    from torchvision import transforms as t

    from goodfit.models.builder import create_at_size

    def loader(split: str) -> Any:
        cut = [t.RandomCrop(task.imgsz, padding=4), t.RandomHorizontalFlip()] if split == "train" else []
        images = datasets.ImageFolder(f"{task.tree}/{split}", t.Compose([*cut, t.ToTensor(), t.Normalize(MEAN, STD)]))
        return torch.utils.data.DataLoader(images, BATCH, shuffle=split == "train", drop_last=split == "train",
                                           num_workers=WORKERS, persistent_workers=split != "test")  # fmt: skip

    def outputs(images: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(images.to(memory_format=layout))

    def accuracy(batches: Any) -> float:
        model.eval()
        with torch.inference_mode():
            right = [(outputs(x).argmax(1) == y).double() for x, y in batches]
        return float(torch.cat(right).mean())

    torch.manual_seed(seed)
    layout = torch.channels_last if half else torch.contiguous_format
    model = create_at_size(task.model, task.imgsz, num_classes=len(task.classes)).to(memory_format=layout)
    train, val = loader("train"), loader("val")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * len(train)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warmup),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup)], [warmup])  # fmt: skip
    row: Row = {"laps": [], "val": []}
    if (out / "state.pt").is_file():
        kept = torch.load(out / "state.pt")
        row = kept["row"]
        for part, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(kept[name])
    row.setdefault("before", time.time() - psutil.Process().create_time())
    while len(row["laps"]) < epochs:
        torch.manual_seed(1000 * seed + len(row["laps"]))
        began = time.perf_counter()
        model.train()
        for x, y in train:
            loss = nn.functional.cross_entropy(outputs(x).float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        row["val"].append(accuracy(val))
        row["laps"].append((row["laps"] or [0.0])[-1] + time.perf_counter() - began)
        print(
            f"epoch {len(row['laps'])}/{epochs}  val {100 * row['val'][-1]:.1f} %  {row['laps'][-1]:.0f} s", flush=True
        )
        torch.save({"row": row, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict()}, out / "state.tmp")  # fmt: skip
        os.replace(out / "state.tmp", out / "state.pt")
    return {**row, "test": accuracy(loader("test"))}


def default(task: Task, out: Path, epochs: int, seed: int, words: list[str]) -> Row:
    """goodfit's run, begun or gone on with."""
    import goodfit

    command = ["train", task.tree, f"model={task.model}", "pretrained=false", f"epochs={epochs}", f"seed={seed}",
               f"project={out}", "name=run", *words]  # fmt: skip
    if (out / "run" / "plan.json").is_file():
        command = ["resume", str(out / "run")]
    subprocess.run([sys.executable, "-m", "goodfit", *command], check=True)
    run = goodfit.Run(out / "run")
    told = [e for e in run.events if e["event"] == "epoch"]
    stages = [e for e in run.events if e["event"] == "stage"]
    begun = next(k for k, e in enumerate(stages) if e["name"] == "train")
    laps = [sum(e["seconds"] for e in told[: k + 1]) for k in range(len(told))]
    return {"laps": laps, "val": [e["val"]["accuracy"] for e in told], "test": run.metrics["test"]["accuracy"],
            "before": sum(e.get("seconds", 0.0) for e in stages[:begun])}  # fmt: skip


def run(asked: argparse.Namespace) -> None:
    """Train what is missing in the results."""
    work, results = asked.work.resolve(), asked.work / "results.jsonl"
    os.environ["GOODFIT_CACHE_DIR"] = str(work / "cache")
    task = make_task("cifar60", asked.data, work, most=asked.images, model=asked.model)
    for seed in asked.seeds:
        for system in asked.systems:
            words = asked.goodfit if system == "goodfit" else []
            key = {"system": " ".join([system, *words]), "model": task.model, "images": asked.images, "epochs": asked.epochs,
                   "seed": seed}  # fmt: skip
            if any({k: r[k] for k in key} == key for r in read(results)):
                continue
            out = work / "-".join(map(str, key.values())).replace(" ", "-").replace("/", "-")
            out.mkdir(parents=True, exist_ok=True)
            if system == "goodfit":
                found = default(task, out, asked.epochs, seed, words)
            else:  # in a process of its own
                subprocess.run([sys.executable, __file__, "child", system, "--epochs", str(asked.epochs), "--seeds", str(seed),
                                "--work", str(out), "--task", json.dumps(vars(task))], check=True)  # fmt: skip
                found = json.loads((out / "found.json").read_text("utf-8"))
            with open(results, "a", encoding="utf-8") as handle:
                handle.write(json.dumps({**key, **found}) + "\n")


def read(results: Path) -> list[Row]:
    """The runs so far."""
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.is_file() else []


def seconds_to(row: Row, target: float) -> float | None:
    """Seconds of training until validation accuracy is first at the target."""
    return next((s for s, v in zip(row["laps"], row["val"], strict=True) if v >= target), None)


def report(rows: list[Row]) -> str:
    """A line per system and length of run, and the ratios of the fastest."""
    heads = "".join(f" s to {t:.0%} (with what comes before) |" for t in TARGETS)
    lines = [f"| system | network | epochs | seeds | s an epoch |{heads} best val % | test % |", "|---" * 9 + "|"]
    fastest: dict[tuple[str, float], float] = {}
    for key in dict.fromkeys((r["system"], r["model"], r["images"], r["epochs"]) for r in rows):
        mine = [r for r in rows if (r["system"], r["model"], r["images"], r["epochs"]) == key]
        cells = []
        for target in TARGETS:
            found = [(s, s + r["before"]) for r in mine if (s := seconds_to(r, target)) is not None]
            if len(found) < len(mine):
                cells.append(f"{len(found)} of {len(mine)} seeds reach it")
                continue
            seconds, whole = (statistics.mean(s) for s in zip(*found, strict=True))
            cells.append(f"{seconds:.0f} ({whole:.0f})")
            fastest[key[0], target] = min(seconds, fastest.get((key[0], target), seconds))
        pace = statistics.mean(r["laps"][-1] / r["epochs"] for r in mine)
        lines.append(f"| {key[0]} | {key[1]} | {key[3]} | {len(mine)} | {pace:.1f} | {' | '.join(cells)} | "
                     f"{100 * statistics.mean(max(r['val']) for r in mine):.1f} | "
                     f"{100 * statistics.mean(r['test'] for r in mine):.1f} |")  # fmt: skip
    for (system, target), seconds in fastest.items():
        ours = fastest.get(("goodfit", target))
        if system != "goodfit" and ours:
            lines.append(f"time of {system} to {target:.0%} over goodfit's: {seconds / ours:.2f}")
    return "\n".join(lines)


def picture(rows: list[Row], file: Path) -> None:
    """Validation accuracy against minutes of training."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for row in rows:
        axes.plot([s / 60 for s in row["laps"]], [100 * v for v in row["val"]], color=f"C{SYSTEMS.index(row['system'].split()[0])}",
                  label=f"{row['system']}, {row['epochs']} epochs, seed {row['seed']}")  # fmt: skip
    axes.set(xlabel="minutes of training", ylabel="validation accuracy, %", title="CIFAR-10 from scratch")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")


def main() -> None:
    """Run, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report", "child"))
    parser.add_argument("systems", nargs="*", choices=(*SYSTEMS, []))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--model", default="")
    parser.add_argument("--goodfit", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--images", type=int, default=0, help="per class and split, for trials")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("cifar-time"))
    parser.add_argument("--task", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.what == "child":
        found = plain(
            Task(**json.loads(asked.task)), asked.work, asked.epochs, asked.seeds[0], asked.systems[0] != "plain"
        )
        (asked.work / "found.json").write_text(json.dumps(found), "utf-8")
        return
    if asked.what == "run":
        asked.work.mkdir(parents=True, exist_ok=True)
        run(asked)
    rows = read(asked.work / "results.jsonl")
    print(report(rows))
    if asked.picture:
        picture(rows, asked.picture)


if __name__ == "__main__":
    main()
