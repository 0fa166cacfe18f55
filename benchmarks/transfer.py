"""Ways to fine-tune pretrained weights, by what they reach in validation.

    python benchmarks/transfer.py DATA WEIGHTS --seeds 0 1 2 [--imgsz 96] [--epochs 8] [--ways default ...]

One line of JSON for each training: the way, the seed, validation accuracy and loss of its best state, and the seconds that
its epochs took. All ways of a seed see the same split, order and augmentation; the test split is never opened.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from goodfit.api.assemble import assemble, execution, run_hashes
from goodfit.api.decide import decide
from goodfit.api.prepare import read_and_audit
from goodfit.config.parse import read_request
from goodfit.core.journal import Journal
from goodfit.engine.checkpoint import Checkpoints
from goodfit.engine.loop import fit

WAYS = {
    "default": {},
    "layer_decay=0.75": {"layer_decay": 0.75},
    "layer_decay=0.9": {"layer_decay": 0.9},
    "unfreeze=1": {"unfreeze": "1"},
    "unfreeze=gradual": {"unfreeze": "gradual"},
    "freeze=all-but-head": {"freeze": "all-but-head"},
}


class Never:
    """A stop flag that nobody raises."""

    exit_code = 130

    def __call__(self) -> bool:
        return False


def main() -> None:
    """Train every way from every seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--imgsz", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    asked = parser.parse_args()
    given = {"data": asked.data, "pretrained": asked.weights, "imgsz": asked.imgsz, "epochs": asked.epochs,
             "max_bad": 0.05, "suspects": False, "measure": False, "rehearse": False, "cache": "ram"}  # fmt: skip
    journal = Journal(None, ())
    audited = read_and_audit(read_request(given), journal)
    for seed in asked.seeds:
        for way in asked.ways:
            plan = decide(read_request({**given, **WAYS[way], "seed": seed}), audited, journal)
            with execution(plan), tempfile.TemporaryDirectory() as folder:
                parts = assemble(plan, audited.index)
                parts.store.warm(plan.threads.value)
                start = time.perf_counter()
                fit(parts.state, parts.context, parts.train, parts.val, settings=parts.settings, journal=journal,
                    checkpoints=Checkpoints(Path(folder), run_hashes(plan, audited.index)), stop=Never())  # fmt: skip
                best = parts.state.progress.best
            row = {"way": way, "seed": seed, "imgsz": asked.imgsz, "epochs": asked.epochs, "best_epoch": best["epoch"] + 1,
                   **{name: round(best["metrics"][name], 4) for name in ("accuracy", "macro_f1", "loss")},
                   "seconds": round(time.perf_counter() - start, 1)}  # fmt: skip
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
