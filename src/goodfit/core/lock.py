"""One writer per run folder: a lock that the operating system frees when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from goodfit.core.errors import StorageError
from goodfit.core.safeio import storage_errors


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process.

    Raises:
        StorageError: another living process holds it; its process id is named.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no flock; two writers in one folder are then not detected
        yield
        return
    path = folder / ".lock"
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by loader processes
        except OSError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise StorageError(
                f"Another process (id {holder}) is writing to this run.",
                where=str(folder),
                kept="that run goes on undisturbed",
                next="wait for it, or start a new run with another name=",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)
