"""Hints to the system about mapped files: that their pages will be needed at once, or no more."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from torch import Tensor

_LIBC = ctypes.CDLL(None)
_MADV_DONTNEED, _MADV_POPULATE_READ = 4, 22


def bring_in(tensor: Tensor) -> None:
    """Read a mapped tensor's pages and enter them in this process's page table: its first use costs nothing more.

    Only a hint: before Linux 5.14 nothing happens.
    """
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _advise(start, tensor.data_ptr() + tensor.nbytes, _MADV_POPULATE_READ)


def is_mapped(tensor: Tensor, path: Path) -> bool:
    """Whether a tensor lies in a mapping of this file: only then may its pages be let go."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return False
    wanted = str(path.resolve())
    for line in lines:
        addresses, *_, found = line.split(maxsplit=5)
        start, _, end = addresses.partition("-")
        if found == wanted and int(start, 16) <= tensor.data_ptr() < int(end, 16):
            return True
    return False


def let_go(tensor: Tensor) -> None:
    """A mapped tensor was read for the last time: its pages no longer count as this process's memory. (Whoever reads it
    all the same reads the file again.) Pages that it shares with its neighbours stay."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    _advise(start, (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE, _MADV_DONTNEED)


def _advise(start: int, end: int, advice: int) -> None:
    if end > start:
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
