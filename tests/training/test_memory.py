"""Freed memory is taken again without the kernel's help."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deepseek_ray.training.memory import ONE_ARENA

_PROGRAM = """
import resource, threading, torch
from deepseek_ray.training.memory import keep_freed_memory

faults = []

def steps():
    assert not {keep} or keep_freed_memory()
    for round in range(20):  # until no hole is a little too small for an aligned block
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(18_000_000)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if {aside}:
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
else:
    steps()
print(min(faults))
"""


def least_faults(keep: bool, aside: bool) -> int:
    """Of twenty times that a block is taken and freed."""
    program = _PROGRAM.format(keep=keep, aside=aside)
    environment = {**os.environ, **(ONE_ARENA if keep else {})}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc only")
@pytest.mark.parametrize("aside", [False, True], ids=["main thread", "another thread"])
def test_a_block_that_was_freed_costs_no_page_faults(aside: bool) -> None:
    pages = 18_000_000 * 4 // 4096  # glibc keeps smaller blocks, below 32 MB, of itself
    assert least_faults(False, aside) > pages / 2
    assert least_faults(True, aside) < pages / 2, "the best round: a machine short of memory takes pages away"
