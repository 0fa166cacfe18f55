"""What keeping pictures reduced costs in accuracy: the same runs with and without the reduction, by seed.

    python benchmarks/cache_accuracy.py FOLDER [--seeds 5] [word=value ...]

The cache keeps pictures at 1.5 times the input size (shorter side), from which crops are cut. Each seed trains twice on the
same split with the same draws, once so and once from the full pictures; further words go to `goodfit train`. Prints the
accuracy on the test split and the mean difference with its 95 % interval (Student's t over seeds).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 97.5 % quantiles for 1 to 9 degrees of freedom
ARMS = {"reduced": None, "full": 1000.0}
CHILD = """
import sys
import goodfit.data.store
if float(sys.argv[1]):
    goodfit.data.store.RESERVE = float(sys.argv[1])
from goodfit.cli.main import main
raise SystemExit(main(sys.argv[2:]))
"""


def accuracy(folder: Path, arm: str, seed: int, words: list[str]) -> float:
    """Accuracy on the test split, per cent."""
    with tempfile.TemporaryDirectory() as made:
        command = [sys.executable, "-c", CHILD, str(ARMS[arm] or 0), "train", str(folder.resolve()), f"seed={seed}",
                   f"split_seed={seed}", "cache=ram", "suspects=false", "json=true", *words]  # fmt: skip
        done = subprocess.run(command, cwd=made, capture_output=True, text=True, check=False)
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if done.returncode:
        raise SystemExit(f"{words}: {result}")
    return 100 * float(result["metrics"]["test"]["accuracy"])


def main() -> None:
    """Print a line per seed and the difference."""
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    seeds = 5
    if "--seeds" in words:
        at = words.index("--seeds")
        seeds, words = int(words[at + 1]), words[:at] + words[at + 2 :]
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        for arm in list(ARMS)[:: 1 if seed % 2 else -1]:
            found[arm].append(accuracy(folder, arm, seed, words))
            print(f"seed {seed} {arm:<8} {found[arm][-1]:5.1f} %", flush=True)
    gaps = np.array(found["reduced"]) - np.array(found["full"])
    half = STUDENT[len(gaps) - 2] * gaps.std(ddof=1) / len(gaps) ** 0.5
    print(f"reduced {np.mean(found['reduced']):.1f} %, full {np.mean(found['full']):.1f} %, "
          f"difference {gaps.mean():+.2f} ± {half:.2f} points over {seeds} seeds")  # fmt: skip


if __name__ == "__main__":
    main()
