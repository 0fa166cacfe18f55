"""Every look at a test set is counted, across all runs of a project."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

LEDGER = "test_looks.jsonl"


def count_look(project: Path, test_sha256: str, *, run: str, weights_sha256: str) -> int:
    """Record one look at a test set and return its number, from 1.

    The ledger is appended to before the test is run: a look that was interrupted has been a look.
    """
    path = project / LEDGER
    number = 1 + sum(row.get("test_sha256") == test_sha256 for row in read_looks(path))
    row = {"test_sha256": test_sha256, "look": number, "run": run, "weights_sha256": weights_sha256}
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        torn = path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")  # a kill cut the last line
        os.write(descriptor, (("\n" if torn else "") + json.dumps(row) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return number


def read_looks(path: Path) -> list[dict[str, Any]]:
    """All recorded looks; lines that are not JSON are skipped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
