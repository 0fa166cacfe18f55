"""goodfit beside the systems that people use now: the same pictures, model, size and batch, each with its defaults.

    python benchmarks/peers.py FOLDER --peers PYTHON [--rounds 3] [--only NAME...]

FOLDER holds one folder per class. PYTHON is the interpreter of an environment with benchmarks/peers.txt installed (`make
bench` makes one). Every system trains resnet18 from scratch for three epochs, 128 px, batch 32, in a process of its own,
one after the other, the order turned in every round. Per system: images per second of the training part (epochs two and
three), whole-process seconds to the end of the third epoch, and peak memory of the process with its children
(proportional set size, so that pages which they share count once).

"ratio" is goodfit's rate over the system's within a round. "equal" compares at equal precision and memory format: what
the system does by default, plain fp32, with goodfit told to do so too (`goodfit-plain`), and bf16 with channels-last
(names ending in -half) with goodfit's own choice.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SIZE, BATCH, EPOCHS = 128, 32, 3
NAMES = ("goodfit", "plain", "lightning", "trainer", "fastai", "ultralytics", "goodfit-plain", "plain-half",
         "lightning-half", "trainer-half")  # fmt: skip
SAMPLE_SECONDS = 1.0


@dataclass(frozen=True)
class Found:
    """What one training took: images per second, seconds to the end of the third epoch and of all, peak bytes."""

    rate: float
    seconds: float
    whole: float
    memory: int


def make_folder(source: Path, folder: Path) -> None:
    """train, val and test of 70, 15 and 15 %, so that all systems see the same pictures."""
    for kind in sorted(p for p in source.iterdir() if p.is_dir()):
        for number, file in enumerate(sorted(kind.iterdir())):
            split = "train" if number % 20 < 14 else "val" if number % 20 < 17 else "test"
            (folder / split / kind.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / split / kind.name)


def run(command: list[str], folder: Path) -> tuple[str, float, float, int]:
    """Run a command; its output, when it started, its seconds, and the peak memory of its processes together."""
    environment = {**os.environ, "YOLO_CONFIG_DIR": str(folder), "MPLBACKEND": "agg", "YOLO_OFFLINE": "true",
                   "HF_HUB_OFFLINE": "1"}  # fmt: skip
    start = time.time()
    with open(folder / "output.txt", "w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=environment)
        peak, done = [0], threading.Event()
        watch = threading.Thread(target=_watch, args=(process.pid, peak, done))
        watch.start()
        code = process.wait()
        seconds = time.time() - start
        done.set()
        watch.join()
        output.seek(0)
        text = output.read()
    if code:
        raise RuntimeError(f"{command}: exit {code}\n{text[-3000:]}")
    return text, start, seconds, peak[0]


def _watch(pid: int, peak: list[int], done: threading.Event) -> None:
    while not done.wait(SAMPLE_SECONDS):
        total = 0
        try:
            for process in (root := psutil.Process(pid), *psutil.Process.children(root, recursive=True)):
                total += process.memory_full_info().pss
        except psutil.Error:
            continue
        peak[0] = max(peak[0], total)


def measure(name: str, data: Path, peers: str) -> Found:
    """One training of one system."""
    with tempfile.TemporaryDirectory() as made:
        out = Path(made)
        if not name.startswith("goodfit"):
            system = [peers, str(Path(__file__).with_name("peer_systems.py")), name, str(data), made]
            text, start, whole, memory = run(system, out)
            told = json.loads(text.strip().splitlines()[-1])
            epochs, end = told["epochs"], told["at"]
        else:
            asked = ["precision=fp32", "channels_last=false"] if name == "goodfit-plain" else []
            command = [sys.executable, "-m", "goodfit", "train", str(data), "model=resnet18", "pretrained=false",
                       f"imgsz={SIZE}", f"batch={BATCH}", f"epochs={EPOCHS}", "max_bad=0.05", f"project={made}",
                       "name=run", *asked]  # fmt: skip
            _, start, whole, memory = run(command, out)
            lines = (out / "run/events.jsonl").read_text("utf-8").splitlines()
            events: list[dict[str, Any]] = [e for e in map(json.loads, lines) if e["event"] == "epoch"]
            epochs, end = [(e["samples"], e["train_seconds"]) for e in events], events[-1]["time"]
    assert len(epochs) == EPOCHS, (name, epochs)
    later = epochs[1:]
    return Found(sum(n for n, _ in later) / sum(s for _, s in later), end - start, whole, memory)


def main() -> None:
    """Print each training as it ends, and the table of medians and ranges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    asked = parser.parse_args()
    names = list(asked.only)
    found: dict[str, list[Found]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as made:
        make_folder(asked.folder, Path(made))
        for number in range(asked.rounds):
            turn = number * len(names) // asked.rounds
            for name in names[turn:] + names[:turn]:
                if name not in found:
                    continue
                try:
                    one = measure(name, Path(made), asked.peers)
                except RuntimeError as error:  # the others' figures count without it
                    del found[name]
                    print(f"round {number + 1}  {name}: left out, {error}", flush=True)
                    continue
                found[name].append(one)
                print(f"round {number + 1}  {name:<16}{one.rate:7.1f} img/s  {one.seconds:6.1f} s to the third epoch's end, "
                      f"{one.whole:6.1f} s in all  {one.memory / 1e9:4.1f} GB", flush=True)  # fmt: skip
    print_table(found)


def print_table(found: dict[str, list[Found]]) -> None:
    """Medians over the rounds, ratios within a round with their range."""

    def ratio(over: str, name: str) -> str:
        if over not in found or over == name:
            return "-"
        values = [a.rate / b.rate for a, b in zip(found[over], found[name], strict=True)]
        return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"

    print(
        "\n| system | img/s (range) | ratio | equal | s to 3 epochs | s in all | memory GB |\n|---|---|---|---|---|---|---|"
    )
    for name, rows in found.items():
        rates = [r.rate for r in rows]
        equal = "goodfit" if name.endswith("-half") else "goodfit-plain" if not name.startswith("goodfit") else name
        print(f"| {name} | {statistics.median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f}) | {ratio('goodfit', name)} | "
              f"{ratio(equal, name)} | {statistics.median(r.seconds for r in rows):.0f} | "
              f"{statistics.median(r.whole for r in rows):.0f} | {statistics.median(r.memory for r in rows) / 1e9:.1f} |")  # fmt: skip


if __name__ == "__main__":
    main()
