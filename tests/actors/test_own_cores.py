"""Cores are divided among processes, and those of one that has ended are free."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_ray.actors.own_cores import SUPPORTED

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="no sched_setaffinity on this system")

SETTLE = """
import os, sys, threading
from pathlib import Path
from deepseek_ray.actors.own_cores import settle
cores = settle(int(sys.argv[2]), Path(sys.argv[1]))
seen = []
thread = threading.Thread(target=lambda: seen.append((sorted(os.sched_getaffinity(0)), os.sched_getscheduler(0))))
thread.start()
thread.join()
print(list(cores), *seen[0], sep=";", flush=True)
sys.stdin.read()
"""


class Settled:
    """A process that has settled, until it is ended."""

    def __init__(self, directory: Path, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SETTLE, str(directory), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.cores, self.of_a_thread, self.policy = map(eval, self._process.stdout.readline().split(";"))

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def started() -> Iterator[list[Settled]]:
    processes: list[Settled] = []
    yield processes
    for process in processes:
        process.kill()


def test_each_process_has_cores_of_its_own(tmp_path: Path, started: list[Settled]) -> None:
    usable = sorted(os.sched_getaffinity(0))
    for core in usable:
        started.append(Settled(tmp_path, 1))
        assert started[-1].cores == started[-1].of_a_thread == [core]
        assert started[-1].policy == os.SCHED_BATCH
    started.append(Settled(tmp_path, 1))
    assert (started[-1].cores, started[-1].of_a_thread) == ([], usable), "it is not bound where no core is left"
    assert started[-1].policy == os.SCHED_OTHER
    started[0].kill()
    started.append(Settled(tmp_path, 1))
    assert started[-1].cores == usable[:1]


def test_several_threads_have_as_many_cores(tmp_path: Path, started: list[Settled]) -> None:
    usable = sorted(os.sched_getaffinity(0))
    started.append(Settled(tmp_path, len(usable)))
    assert started[0].cores == usable
    started.append(Settled(tmp_path, 1))
    assert not started[1].cores
