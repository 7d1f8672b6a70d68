"""Freed memory is taken again without the kernel's help."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import resource, torch
from deepseek_ray.training.memory import keep_freed_memory

keep = {keep}
assert not keep or keep_freed_memory()
faults = []
for round in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MiB: 16,384 pages of 4 KiB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc only")
def test_a_block_that_was_freed_costs_no_page_faults() -> None:
    faults = {}
    for keep in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM.format(keep=keep)], capture_output=True, text=True, check=True
        )
        faults[keep] = int(done.stdout)
    assert faults[True] < faults[False] / 2, "the best of six rounds: a machine short of memory takes pages away"
