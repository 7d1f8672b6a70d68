"""Who keeps copies of whose cache blocks: workers in a ring, each gives its blocks to the next one that is there."""

from __future__ import annotations

from collections.abc import Iterable


def next_in_ring(worker: int, others: Iterable[int]) -> int | None:
    """The first of `others` after `worker` in order of ids, from the end back to the beginning; None without any.

    The same for a worker that is there and for one that was: while no other one came or went, who has the copies of a
    lost worker's blocks can be said without having kept it.
    """
    ids = sorted(id for id in others if id != worker)
    return next((id for id in ids if id > worker), ids[0] if ids else None)
