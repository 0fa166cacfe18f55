"""How long goodfit trains, on real data: stopping early with a cool-down, extending, `goodfit extend`, and a time budget.

    python benchmarks/epoch_policy.py DATA [--only NAME]

DATA holds classify/. Each line is a whole `goodfit train` in a process of its own, told by its events:

- overfits: a tenth of the face crops without augmentation or averaging; patience ends the stable rate, the rate is cooled down from the best state.
- improves: handwritten digits at a hundredth of the usual learning rate, epochs=auto; still improving at 240 of 300 epochs.
- extend: trashnet from scratch for 10 epochs, then `goodfit extend` to 20.
- time: trashnet from scratch with time=3m, wall-clock of the whole process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from goodfit.api.demo import write_digits

SHORT = ["suspects=false", "rehearse=false", "measure=false"]


def goodfit(*words: str, cwd: Path) -> tuple[dict[str, Any], float]:
    """One command: its result and its seconds."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "goodfit", *words, "json=true"], cwd=cwd, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]), time.monotonic() - start


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """The events of a run of these kinds."""
    lines = (json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines())
    return [event for event in lines if event["event"] in kinds]


def told(run: Path) -> None:
    """The segments of a run, each with its epochs and its validation figures."""
    for event in events(run, "segment"):
        print(
            f"  segment {event['segment']} from step {event['parent']['step']}: {event['reason']} ({event['epochs']} epochs)"
        )
    epochs = events(run, "epoch")
    for segment in sorted({e["segment"] for e in epochs}):
        mine = [e for e in epochs if e["segment"] == segment]
        best = max(mine, key=lambda e: (e["val"]["accuracy"], -e["val"]["loss"]))
        print(f"  segment {segment}: epochs {mine[0]['epoch'] + 1} to {mine[-1]['epoch'] + 1}, train loss {mine[0]['train_loss']:.3f} to "
              f"{mine[-1]['train_loss']:.3f}, best validation {100 * best['val']['accuracy']:.1f} % (loss {best['val']['loss']:.3f}) "
              f"in epoch {best['epoch'] + 1}, last {100 * mine[-1]['val']['accuracy']:.1f} % "
              f"({mine[-1]['val']['loss']:.3f}), last rate {mine[-1]['lr']:.1e}")  # fmt: skip


def overfits(data: Path, folder: Path) -> None:
    """Patience ends the run."""
    words = ["train", str(data / "classify/facemask_crops"), "fraction=0.1", "augment=off", "ema=false", "patience=20"]
    found, seconds = goodfit(*words, *SHORT, cwd=folder)
    print(f"  {found['epochs']} epochs of 300 in {seconds:.0f} s")
    told(Path(folder / found["run"]))


def improves(_data: Path, folder: Path) -> None:
    """A run that is slow to learn is extended."""
    write_digits(folder / "digits")
    found, seconds = goodfit("train", "digits", "fraction=0.15", "lr=1e-5", "head_lr=1e-5", *SHORT, cwd=folder)
    print(f"  {found['epochs']} epochs in {seconds:.0f} s")
    told(Path(folder / found["run"]))


def extend(data: Path, folder: Path) -> None:
    """A finished run goes on."""
    words = [
        "train",
        str(data / "classify/trashnet/dataset-resized"),
        "model=resnet10t",
        "pretrained=false",
        "imgsz=64",
        "epochs=10",
    ]
    first, _ = goodfit(*words, "max_bad=0.05", *SHORT, cwd=folder)
    longer, _ = goodfit("extend", first["run"], "epochs=20", cwd=folder)
    told(Path(folder / longer["run"]))
    for name, found in (("10 epochs", first), ("extended to 20", longer)):
        val, test = found["metrics"]["val"], found["metrics"]["test"]
        print(
            f"  {name}: validation {100 * val['accuracy']:.1f} % (loss {val['loss']:.3f}), test {100 * test['accuracy']:.1f} %, look {test['look']}"
        )


def budget(data: Path, folder: Path) -> None:
    """The whole process takes the time it was given."""
    words = [
        "train",
        str(data / "classify/trashnet/dataset-resized"),
        "model=resnet10t",
        "pretrained=false",
        "imgsz=64",
        "time=3m",
    ]
    found, seconds = goodfit(*words, "max_bad=0.05", cwd=folder)
    print(f"  time=3m: {seconds:.0f} s for the whole process, {found['epochs']} epochs")
    told(Path(folder / found["run"]))


RUNS: dict[str, Callable[[Path, Path], None]] = {
    "overfits": overfits,
    "improves": improves,
    "extend": extend,
    "time": budget,
}


def main() -> None:
    """Run them and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", choices=RUNS)
    asked = parser.parse_args()
    for name, run in RUNS.items():
        if asked.only in (None, name):
            print(f"{name}: {(run.__doc__ or '').splitlines()[0]}", flush=True)
            with tempfile.TemporaryDirectory() as made:
                run(asked.data.resolve(), Path(made))


if __name__ == "__main__":
    main()
