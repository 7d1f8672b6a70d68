"""Who owns which slot: the bookkeeping of both ends of a ring of slots, without I/O."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from deepseek_ray.errors import LinkError


class SendSlots:
    """The sender's side: slots are taken, filled and announced, and come back with the reader's notices.

    The last one back is the first one taken, so a quiet link stays in the cache. Not thread safe: the link's lock.
    """

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._away: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._free)

    def take(self) -> int:
        slot = self._free.pop()
        self._away.add(slot)
        return slot

    def give_back(self, slots: Iterable[int]) -> None:
        """Raises LinkError when the reader gives back what it does not have."""
        for slot in slots:
            if slot not in self._away:
                raise LinkError(f"the peer released slot {slot}, which it does not hold; the link is out of step")
            self._away.remove(slot)
            self._free.append(slot)


class ReceiveSlots:
    """The reader's side: which of the peer's slots are in use here, and which are released but not yet announced.

    A notice normally rides on the next record that goes to the peer: a separate one would cost a system call and wake
    the peer for nothing. Once half of the peer's slots are here, it is `due` at once, so a peer that is out of slots
    hears of every release. Thread safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_slots = 0
        self._held: set[int] = set()  # received, and the peer does not know of a release
        self._released: list[int] = []  # the part of _held that a notice may name

    def open(self, num_slots: int) -> None:
        self._num_slots = num_slots

    def receive(self, slot: int) -> None:
        """Raises LinkError when the peer uses a slot that it does not have, or that is still in use here."""
        with self._lock:
            if not 0 <= slot < self._num_slots or slot in self._held:
                raise LinkError(
                    f"the peer sent slot {slot}; it has {self._num_slots} and {sorted(self._held)} are still in use"
                )
            self._held.add(slot)

    def release(self, slot: int) -> None:
        with self._lock:
            self._released.append(slot)

    @property
    def due(self) -> bool:
        return bool(self._released) and 2 * len(self._held) >= self._num_slots

    def take_notice(self) -> bytes:
        """The released slots, one byte each; from here on the peer may use them again."""
        if not self._released:
            return b""
        with self._lock:
            slots, self._released = self._released, []
            self._held.difference_update(slots)
        return bytes(slots)

    def restore(self, notice: bytes) -> None:
        """Take back a notice that could not be sent."""
        with self._lock:
            self._released.extend(notice)
            self._held.update(notice)
