"""What this process may use of its machine."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Processors this process may use (a container's limit, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
