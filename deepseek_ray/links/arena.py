"""Slots in a sealed memfd: memory without a name that two processes share and that nobody can shrink.

Nothing appears in /dev/shm; the kernel frees the pages with the last descriptor and mapping, however the processes die.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
from contextlib import suppress

from deepseek_ray.errors import LinkError

MAX_SLOTS = 255  # a slot number, and the number of released slots, is one byte on the wire
MAX_ARENA_BYTES = 4 << 30
SUPPORTED = sys.platform == "linux" and hasattr(os, "memfd_create")


class Arena:
    """`num_slots` slots of `slot_bytes` each, mapped into this process."""

    def __init__(self, memory: mmap.mmap, num_slots: int, slot_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._memory = memory
        self._view = memoryview(memory)

    def slot(self, slot: int, num_bytes: int) -> memoryview:
        """The first `num_bytes` of a slot. The mapping lives as long as any such view does."""
        start = slot * self.slot_bytes
        return self._view[start : start + num_bytes]

    def fill(self, slot: int, parts: list[memoryview]) -> None:
        """Copy `parts` back to back into a slot; together they fit."""
        start = slot * self.slot_bytes
        for part in parts:
            end = start + part.nbytes
            self._view[start:end] = part
            start = end

    def close(self) -> None:
        """Unmap, unless a view of a slot is still in use; then that happens with the last view."""
        self._view.release()
        with suppress(BufferError):
            self._memory.close()


def create_arena(num_slots: int, slot_bytes: int) -> tuple[Arena, int]:
    """A new arena and its descriptor, which the caller closes once the peer has it.

    Every page is allocated here: without that, a full machine would kill whoever touches a page later. Raises LinkError
    when there is no room.
    """
    size = num_slots * slot_bytes
    descriptor = os.memfd_create("deepseek_ray_link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return Arena(mmap.mmap(descriptor, size), num_slots, slot_bytes), descriptor
    except OSError as error:
        os.close(descriptor)
        raise LinkError(
            f"no memory for a link's {num_slots} slots of {slot_bytes} bytes ({error}); free {size} bytes on this node "
            "or use transport 'tcp'"
        ) from None


def map_arena(descriptor: int, num_slots: int, slot_bytes: int) -> Arena:
    """The peer's arena; closes the descriptor. Raises LinkError unless it is sealed and as large as announced."""
    try:
        size = num_slots * slot_bytes
        actual = os.fstat(descriptor).st_size
        if not 0 < size <= MAX_ARENA_BYTES or size != actual or not 0 < num_slots <= MAX_SLOTS:
            raise LinkError(
                f"the peer announced {num_slots} slots of {slot_bytes} bytes in a memory of {actual} bytes; limits are "
                f"{MAX_SLOTS} slots and {MAX_ARENA_BYTES} bytes, and the memory must have just that size"
            )
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise LinkError("the peer's slots are not sealed against shrinking; reading them could kill this process")
        return Arena(mmap.mmap(descriptor, size), num_slots, slot_bytes)
    except OSError as error:
        raise LinkError(f"the peer's slots cannot be mapped: {error}") from None
    finally:
        os.close(descriptor)
