"""Keeps what a training step frees for the next one.

glibc gives large blocks back to the system as soon as they are free and asks for them again a moment later; the kernel
clears every page of them each time. A step frees and takes its gradients and activations, so that is as much work as
writing them once more.
"""

from __future__ import annotations

import ctypes
import functools
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of `malloc.h`."""
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""Environment of a process whose steps do not run in its main thread, as under Ray Train: other threads have arenas of
their own, which hold no block above 64 MB."""


@functools.cache
def keep_freed_memory() -> bool:
    """From now on this process keeps its largest need of memory until it ends. False where malloc is not glibc's."""
    if not sys.platform.startswith("linux"):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    # No separate mappings, which are given back when freed, and no cutting of the heap's end (-1: at no size).
    return bool(set_option(_M_MMAP_MAX, 0)) and bool(set_option(_M_TRIM_THRESHOLD, -1))
