"""What was projected before a run against what it took: an epoch's seconds and peak memory.

    python benchmarks/projection.py DATA [--rounds 1]

DATA holds classify/ and weights/. Each line is a whole `goodfit train` in a process of its own with everything at its
defaults but model, size and epochs; epochs are those after the first, their median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

EPOCHS = 6


def runs(data: Path) -> dict[str, list[str]]:
    """The command of each run, by its name."""
    trashnet, masks = data / "classify/trashnet/dataset-resized", data / "classify/facemask_crops"
    weights = data / "weights/mobilenetv2_100.safetensors"
    return {
        "resnet18, 128 px": ["train", str(trashnet), "model=resnet18", "pretrained=false", "imgsz=128", "max_bad=0.05"],
        "mobilenetv2_100, 160 px": ["train", str(trashnet), "model=mobilenetv2_100", f"pretrained={weights}", "imgsz=160",
                                    "max_bad=0.05"],
        "resnet10t, 64 px": ["train", str(masks), "model=resnet10t", "pretrained=false", "imgsz=64", "max_bad=0.05"],
        "demo (resnet10t, 32 px)": ["demo"],
    }  # fmt: skip


def main() -> None:
    """Print achieved over projected for each run, and the worst."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    ratios: dict[str, list[tuple[float, float]]] = {}
    for _ in range(asked.rounds):
        for name, command in runs(asked.data.resolve()).items():
            with tempfile.TemporaryDirectory() as made:
                subprocess.run([sys.executable, "-m", "goodfit", *command, f"epochs={EPOCHS}", f"project={made}", "name=run"],
                               check=True, capture_output=True, cwd=made)  # fmt: skip
                found = json.loads((Path(made) / "run/result.json").read_text("utf-8"))["projection"]
            was, took = found["projected"], found["achieved"]
            time, memory = took["epoch_seconds"] / was["epoch_seconds"], took["memory"] / was["memory"]
            ratios.setdefault(name, []).append((time, memory))
            print(f"{name:<26}epoch {was['epoch_seconds']:6.2f} s projected, {took['epoch_seconds']:6.2f} taken: {time:.3f}   "
                  f"memory {was['memory'] / 1e9:.2f} GB, {took['memory'] / 1e9:.2f}: {memory:.3f}", flush=True)  # fmt: skip
    for name, values in ratios.items():
        print(f"median of {asked.rounds}: {name:<26}epoch {statistics.median(t for t, _ in values):.3f}   "
              f"memory {statistics.median(m for _, m in values):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
