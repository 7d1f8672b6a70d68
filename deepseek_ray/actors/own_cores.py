"""Cores of one's own: the processes of a host divide its cores among them, whoever started them.

A process keeps the locks of its cores for as long as it lives, so they are free again however it ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

SUPPORTED = hasattr(os, "sched_setaffinity")
_locks: list[int] = []
"""Descriptors, open until the process ends."""


def settle(threads: int, directory: Path | None = None) -> tuple[int, ...]:
    """Bind this thread, and those that it starts from now on, to as many cores as `threads`, which no other process has
    that was settled; empty, and nothing is changed, if so many are not left.

    They also let others go first (SCHED_BATCH): who is about to wake several such processes is not interrupted by the
    first one. directory: of the locks; one for each user by default.
    """
    if not SUPPORTED:
        return ()
    directory = directory or Path(tempfile.gettempdir(), f"deepseek_ray-{os.getuid()}", "cores")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    usable = sorted(os.sched_getaffinity(0))
    for first in range(0, len(usable) - threads + 1, threads):
        cores = tuple(usable[first : first + threads])
        if _lock(directory, cores):
            os.sched_setaffinity(0, cores)
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            return cores
    logger.warning("no %d of the cores %s are left to bind a shard to; it runs on any of them", threads, usable)
    return ()


def _lock(directory: Path, cores: tuple[int, ...]) -> bool:
    """All of them or none."""
    opened: list[int] = []
    for core in cores:
        opened.append(os.open(directory / str(core), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        try:
            fcntl.flock(opened[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            for descriptor in opened:
                os.close(descriptor)
            return False
    _locks.extend(opened)
    return True
