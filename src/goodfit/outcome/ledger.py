"""Every look at a test set is counted, across all runs of a project."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from goodfit.core.safeio import storage_errors

LEDGER = "test_looks.jsonl"


def count_look(run: Path, test_sha256: str, *, weights_sha256: str) -> int:
    """Record one look of a run's folder at a test set, in the ledger beside it, and return its number, from 1.

    The ledger is appended to before the test is run: a look that was interrupted has been a look.

    Raises:
        StorageError: the ledger cannot be written.
    """
    folder = run.resolve()  # "." has no parent of its own
    path = folder.parent / LEDGER
    with storage_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with storage_errors(path):
            _wait_for_others(descriptor)
            number = 1 + sum(row.get("test_sha256") == test_sha256 for row in read_looks(path))
            row = {"test_sha256": test_sha256, "look": number, "run": folder.name, "weights_sha256": weights_sha256}
            torn = path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")  # a kill cut the last line
            os.write(descriptor, (("\n" if torn else "") + json.dumps(row) + "\n").encode())
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return number


def _wait_for_others(descriptor: int) -> None:
    """Two runs that end together count one after the other; the lock goes with the descriptor."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # lockf would let go as soon as the file is read through another descriptor


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
