"""What the process may use of its machine."""

import platform
import subprocess
import sys

import pytest

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
    assert faults[True] < 100 < 10_000 < faults[False], faults
