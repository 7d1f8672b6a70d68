"""A word to the kernel's scheduler about the calling thread."""

from __future__ import annotations

import ctypes
import logging
import os
import platform

logger = logging.getLogger(__name__)

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_LIBC = ctypes.CDLL(None, use_errno=True)


class _SchedAttr(ctypes.Structure):
    """struct sched_attr of <linux/sched/types.h>, its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def run_promptly(slice_microseconds: int = 100) -> bool:
    """Ask for short turns of the processor, so that this thread gets one soon after it wakes.

    Where attention and experts share cores, an expert shard that has a call in hand otherwise waits until whoever
    computes has used up its turn, some milliseconds. Linux from 6.12 on does so (EEVDF, per-task slices); elsewhere
    nothing changes and the answer is False.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or not hasattr(os, "sched_getscheduler"):
        return False
    attr = _SchedAttr(
        size=ctypes.sizeof(_SchedAttr),
        policy=os.SCHED_OTHER,
        nice=os.getpriority(os.PRIO_PROCESS, 0),
        runtime=1000 * slice_microseconds,
    )
    if _LIBC.syscall(number, 0, ctypes.byref(attr), 0) == 0:
        return True
    logger.info("the scheduler takes no slice of %d us: %s", slice_microseconds, os.strerror(ctypes.get_errno()))
    return False
