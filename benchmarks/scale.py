"""Index, split and subset of synthetic rows: seconds, bytes a row and peak memory, each size in a process of its own.

    python benchmarks/scale.py [rows ...]      100,000 and 1,000,000 rows unless told

Three datasets of 100 classes: `alone`, where one row in twenty has a copy or two of its class (as duplicates have);
`grouped`, where rows stand in groups of five with several classes (as crops of one photo do); and `boxes`, images with
six objects on average of classes from common to rare. No file is written or read. Bytes a row are those of the index
without objects; memory is the peak inside the split, and that of the process above what it had before the index.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from goodfit.data.columns import Blobs, Objects, Strings
from goodfit.data.index import NO_GROUP, NO_SPLIT, SPLITS, DatasetIndex, data_hash
from goodfit.data.split import SealedTest, check_splits, split_dataset, subset

NUM_CLASSES = 100
SIZES = (100_000, 1_000_000)
KINDS = ("alone", "grouped", "boxes")


def make_index(kind: str, rows: int, seed: int = 0) -> DatasetIndex:
    """An index as the audit leaves it, with random contents."""
    random = np.random.default_rng(seed)
    targets = np.sort(random.integers(0, NUM_CLASSES, rows))
    groups = np.full(rows, NO_GROUP, np.int64)
    if kind == "alone":
        first = random.choice(rows // 3, rows // 60, replace=False) * 3
        for member in (1, 2):
            twins = first[targets[first] == targets[first + member]]
            groups[twins], groups[twins + member] = twins, twins
    elif kind == "grouped":
        groups = random.integers(0, rows // 5, rows)
    return DatasetIndex(
        root=Path("data"),
        task="detect" if kind == "boxes" else "classify",
        paths=Strings(f"class_{t}/img_{r:07d}.jpg" for r, t in enumerate(targets.tolist())),
        targets=np.full(rows, -1, np.int64) if kind == "boxes" else targets,
        class_names=tuple(f"class_{c}" for c in range(NUM_CLASSES)),
        splits=np.full(rows, NO_SPLIT, np.int8),
        groups=groups,
        contents=random.integers(0, 256, (rows, 16), dtype=np.uint8),
        objects=_make_objects(rows, random) if kind == "boxes" else None,
    )


def _make_objects(rows: int, random: np.random.Generator) -> Objects:
    shares = 1 / np.arange(1, NUM_CLASSES + 1)
    counts = random.poisson(random.gamma(1, 6, rows))
    num = int(counts.sum())
    return Objects(
        starts=np.concatenate([[0], np.cumsum(counts)]),
        boxes=np.zeros((num, 4), np.float32),
        classes=random.choice(NUM_CLASSES, num, p=shares / shares.sum()).astype(np.int32),
        crowd=np.zeros(num, bool),
        kept=np.ones(num, bool),
        masks=Blobs([b""] * num),
        mask_kinds=np.zeros(num, np.uint8),
        files=Strings([""] * rows),
        numbers=np.arange(num),
    )


def peak_mib() -> float:
    """The most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def measure(kind: str, rows: int) -> None:
    """Print one line of the table."""
    start_mib = peak_mib()
    cells = []

    def timed(step: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = step()
        cells.append(f"{time.perf_counter() - start:.2f}")
        return result

    index = timed(lambda: make_index(kind, rows))
    made = timed(lambda: split_dataset(index, shares="70/15/15", split_seed=0, given=()))
    timed(lambda: check_splits(made))
    timed(lambda: subset(made, 0.1, 0))
    timed(lambda: SealedTest.seal(made))
    timed(lambda: data_hash(made))
    process_mib = peak_mib() - start_mib
    tracemalloc.start()
    split_dataset(index, shares="70/15/15", split_seed=0, given=())
    split_mib = tracemalloc.get_traced_memory()[1] / 2**20
    shares = "/".join(f"{100 * len(made.rows(s)) / rows:.2f}" for s in SPLITS)
    print(f"| {kind} | {rows:,} | {' | '.join(cells)} | {index.nbytes / rows:.0f} | {split_mib:.0f} | "
          f"{process_mib:.0f} | {shares} |", flush=True)  # fmt: skip


def main(words: list[str]) -> None:
    """Measure every dataset at every size, one process after the other."""
    if len(words) == 2 and words[0] in KINDS:
        measure(words[0], int(words[1]))
        return
    print("| dataset | rows | build s | split s | check s | subset s | seal s | hash s | bytes/row | MiB in split | "
          "MiB in all | train/val/test % |\n" + "|---" * 12 + "|", flush=True)  # fmt: skip
    for kind in KINDS:
        for rows in [int(w) for w in words] or SIZES:
            subprocess.run([sys.executable, __file__, kind, str(rows)], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
