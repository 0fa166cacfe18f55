"""What this process may use of its machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_KEPT = {  # glibc's mallopt: bytes
    -1: 1 << 30,  # free end of the heap that is kept, M_TRIM_THRESHOLD
    -3: 1 << 30,  # blocks from this size on are mapped and given back, M_MMAP_THRESHOLD
    -2: 1
    << 26,  # by which the heap grows at least, M_TOP_PAD: without it, aligned blocks just miss the gap of the last one
}


_RETURNED = {-1: 1 << 26, -3: 1 << 25, -2: 1 << 17}  # what glibc adapts itself to in a program that frees large blocks


def num_cores() -> int:
    """Processors this process may use (a container's limit, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory() -> int:
    """Largest resident memory of this process so far, bytes; 0 where that cannot be read.

    On Linux from the kernel's status and not by getrusage, whose figure a new process takes over from the one that
    started it: a child of a process of 2 GB would have held 2 GB from its first moment.
    """
    try:
        status = Path("/proc/self/status").read_text("ascii")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Let `peak_memory` begin anew, with what this process holds now, of which the C library hands back what is free. Nothing happens
    where the system has no such switch, as outside Linux."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def memory_limited(num_bytes: int) -> Iterator[None]:
    """Let this process fail by itself, with MemoryError or torch's RuntimeError, where it takes so many bytes more than now, before the
    machine runs out of memory and ends somebody's process. Does nothing where there is no such limit."""
    try:
        import resource

        import psutil

        held = psutil.Process().memory_info().data  # address space with libraries' own buffers; not resident memory
        before = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (held + num_bytes, before[1]))
    except (ImportError, ValueError, OSError, AttributeError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def has_mallopt() -> bool:
    """Whether the C library's habit of handing memory back can be changed in a running process: glibc, on Linux."""
    return _mallopt() is not None


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for the next allocation, in place of handing it back to the system.

    A training step frees and takes the same memory again and again. By default, glibc returns every freed block over
    32 MB and every free end of its heap, and the system zeroes each page anew: 8,700 page faults in a step of resnet18
    (32 of 128 × 128 pixels, two cores), 2 % of its time; with this, 130, and 5 % more memory is held. Blocks over 1 GB still go back.

    Returns:
        Whether the C library has such a setting.
    """
    mallopt = _mallopt()
    return mallopt is not None and all(mallopt(name, size) for name, size in _KEPT.items())


def return_freed_memory() -> bool:
    """The inverse, as far as there is one: glibc then hands memory back as it does in a training process by default.

    glibc raises its thresholds by itself up to 32 MB for mapped blocks and twice that for trimming, whenever a larger
    mapped block is freed; once a program has set one, it no longer adapts, so its final values are set here.

    Returns:
        Whether the C library has such a setting.
    """
    mallopt = _mallopt()
    return mallopt is not None and all(mallopt(name, size) for name, size in _RETURNED.items())


def _mallopt() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return None
