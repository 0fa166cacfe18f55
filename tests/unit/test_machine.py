"""What the process may use of its machine."""

import platform
import subprocess
import sys

import pytest

from goodfit.core.machine import peak_memory

STEPS = """
import resource, torch
from goodfit.core.machine import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def take():
    for _ in range(4):
        torch.ones(12_000_000)  # 48 MB, over glibc's largest threshold
take()
take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_for_the_next_allocation():
    faults = {}
    for keep in (True, False):
        done = subprocess.run([sys.executable, "-c", STEPS.format(keep=keep)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        faults[keep] = int(done.stdout)
    # 11,719 pages a block. Kept, they are 20 to 100 in all; once in many runs a small block takes one block's old place.
    assert faults[True] < 12_000 < 40_000 < faults[False], faults


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere getrusage is all there is")
def test_peak_memory_is_of_this_process_and_not_of_the_one_that_started_it():
    def child():
        words = "from goodfit.core.machine import peak_memory; print(peak_memory())"
        return int(subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout)

    small = child()
    held = bytearray(400_000_000)
    held[::4096] = b"x" * len(held[::4096])  # every page
    assert peak_memory() > len(held) and child() < small + 50_000_000
