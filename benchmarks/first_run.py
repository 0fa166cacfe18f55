"""`make bench`: the figures of the first run, each from a process of its own, one after the other.

    python benchmarks/first_run.py [digits] [trashnet]

Run nothing else beside it. The real photos are looked for beside the checkout; without them only the digits are run.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from goodfit.engine.device import find_machine

SEEDS = range(5)
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TRASHNET = ("imgsz=160", "epochs=25", "model=mobilenetv2_100")


def run(folder: Path, *words: str) -> dict[str, Any]:
    """One command as a user gives it; its JSON result with whole-process seconds."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "goodfit", *words, "json=true"], cwd=folder, capture_output=True,
                          text=True, check=False)  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if done.returncode:
        raise SystemExit(f"{words}: {result}")
    return {**result, "process_seconds": time.monotonic() - start}


def line(name: str, seed: int, result: dict[str, Any]) -> str:
    test, rate = result["metrics"]["test"], result["rate"]
    return (
        f"| {name} | {seed} | {100 * test['accuracy']:.1f} ({100 * test['low']:.1f}–{100 * test['high']:.1f}, "
        f"n = {test['n']}) | {100 * result['baselines']['linear_probe']:.1f} | {rate['samples_per_second']:.0f} | "
        f"{100 * rate['share_of_bare']:.0f} | {result['process_seconds']:.0f} |"
    )


def main(wanted: list[str]) -> None:
    """Print a table in Markdown."""
    machine = find_machine("cpu")
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in ("goodfit", "torch", "timm", "onnxruntime"))
    print(f"{machine.device_name}, {machine.num_cores} cores, Python {platform.python_version()}, {versions}\n")
    print("| run | seed | test accuracy % (95 % interval) | linear probe % | img/s | % of bare step | process s |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "digits" in wanted:
            for seed in SEEDS:
                print(line("demo", seed, run(folder, "demo", f"seed={seed}")), flush=True)
        if "trashnet" in wanted and DATA.is_dir():
            photos, weights = DATA / "classify/trashnet/dataset-resized", DATA / "weights/mobilenetv2_100.safetensors"
            result = run(folder, "train", str(photos), f"pretrained={weights}", *TRASHNET)
            print(line("trashnet", 0, result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["digits", "trashnet"])
