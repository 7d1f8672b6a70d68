"""Makes a placement whole again: within the slots of every shard, each expert held, copies where they are wanted.

Only what has to change does. Places are chosen by the time a shard would take in that layer, then by free slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deepseek_ray.errors import DeploymentError
from deepseek_ray.expert_parallel.replicas import ReplicaGrid


def repair(grid: ReplicaGrid, min_replicas: int) -> None:
    """In place: no shard over its slots, every expert at least once, and `min_replicas` times where slots allow.

    If no slot is free, an expert that nobody holds takes that of a spare replica of another.
    Raises DeploymentError if the shards cannot hold every expert once.
    """
    _check_room(grid)
    shares = _shares(grid)
    for full, lacking in enumerate(-grid.free_slots()):
        for _ in range(max(0, lacking)):
            _shed(grid, shares, full)
    for replicas in range(1, min(min_replicas, len(grid.shards)) + 1):
        for row, expert in _held_by_fewer(grid, shares, replicas):
            column = _free_place(grid, grid.free_slots(), row, expert)
            if column is None:
                column = _taken_place(grid, shares, row, expert, 1 if replicas == 1 else min_replicas)
            if column is None:
                column = _vacated_place(grid, shares, row, expert)
            if column is not None:
                grid.held[row, expert, column] = True


def lend(grid: ReplicaGrid, experts: Sequence[tuple[int, int]]) -> bool:
    """In place: one more replica of each (row, expert) in a free slot, where its layer takes the least time.

    Nothing else changes. False, and nothing is done, if there are not enough free slots.
    """
    free = grid.free_slots()
    if np.maximum(free, 0).sum() < len(experts):
        return False
    for row, expert in experts:
        column = _free_place(grid, free, row, expert)
        assert column is not None, "a lent expert has no replica, so every free slot can take it"
        grid.held[row, expert, column] = True
        free[column] -= 1
    return True


def trim(grid: ReplicaGrid, max_replicas: int, min_replicas: int) -> None:
    """In place: at most `max_replicas` replicas per layer; those with the least load go, from the busiest holder."""
    for row in range(len(grid.layers)):
        held = grid.held[row]
        while held.sum() > max_replicas:
            counts = held.sum(axis=1)
            spare = counts > max(1, min_replicas)
            expert = int(np.where(spare, grid.loads[row] / np.maximum(counts, 1), np.inf).argmin())
            held[expert, int(np.where(held[expert], grid.times(row), -1.0).argmax())] = False


def lacks_slot(grid: ReplicaGrid, column: int) -> DeploymentError:
    """Why `column` cannot be given one more replica."""
    shard = grid.shards[column]
    used = shard.slots - int(grid.free_slots()[column])
    return DeploymentError(
        f"shard {shard.id} holds {used} experts and has {shard.slots} slots; it lacks {used + 1 - shard.slots} for "
        "another; drop one from it or raise its slots"
    )


def _check_room(grid: ReplicaGrid) -> None:
    needed = grid.held.shape[0] * grid.held.shape[1]
    lacking = needed - sum(shard.slots for shard in grid.shards)
    if lacking <= 0:
        return
    have = ", ".join(f"shard {shard.id} has {shard.slots}" for shard in grid.shards)
    raise DeploymentError(
        f"{grid.held.shape[0]} layers of {grid.held.shape[1]} experts need {needed} slots, {lacking} more than there "
        f"are ({have}); add a shard of {lacking} slots or raise each by {-(-lacking // len(grid.shards))}"
    )


def _shares(grid: ReplicaGrid) -> NDArray[np.float64]:
    """[L, E]: part of a layer's load, to compare experts of different layers."""
    totals = grid.loads.sum(axis=1, keepdims=True)
    return np.divide(grid.loads, totals, out=np.zeros_like(grid.loads), where=totals > 0)


def _held_by_fewer(grid: ReplicaGrid, shares: NDArray[np.float64], replicas: int) -> list[tuple[int, int]]:
    """(row, expert) with less than that many, the most loaded first."""
    rows, experts = np.nonzero(grid.held.sum(axis=2) < replicas)
    order = np.argsort(-shares[rows, experts], kind="stable")
    return [(int(rows[index]), int(experts[index])) for index in order]


def _shed(grid: ReplicaGrid, shares: NDArray[np.float64], column: int) -> None:
    """Drop one replica of a shard that holds too many: one that others hold too if there is one, the least loaded."""
    rows, experts = np.nonzero(grid.held[:, :, column])
    alone = grid.held.sum(axis=2)[rows, experts] == 1
    index = np.lexsort((shares[rows, experts], alone))[0]
    grid.held[rows[index], experts[index], column] = False


def _free_place(grid: ReplicaGrid, free: NDArray[np.int64], row: int, expert: int) -> int | None:
    """The shard with a free slot that would take the least time in the layer with one more replica of the expert."""
    columns = np.flatnonzero((free > 0) & ~grid.held[row, expert])
    if not len(columns):
        return None
    holding_speed = grid.speeds[grid.held[row, expert]].sum() + grid.speeds[columns]
    after = grid.times(row)[columns] + grid.loads[row, expert] / holding_speed
    return int(columns[np.lexsort((-free[columns], after))[0]])


def _taken_place(grid: ReplicaGrid, shares: NDArray[np.float64], row: int, expert: int, keep: int) -> int | None:
    """Drop the least loaded replica of an expert that has more than `keep`, where this expert is not; return where."""
    counts = grid.held.sum(axis=2)
    spare = grid.held & (counts > keep)[:, :, None] & ~grid.held[row, expert]
    rows, experts, columns = np.nonzero(spare)
    if not len(rows):
        return None
    # The experts with the most replicas first: what is meant to survive a lost shard stays.
    index = np.lexsort(((shares / np.maximum(counts, 1))[rows, experts], -counts[rows, experts]))[0]
    grid.held[rows[index], experts[index], columns[index]] = False
    return int(columns[index])


def _vacated_place(grid: ReplicaGrid, shares: NDArray[np.float64], row: int, expert: int) -> int | None:
    """Free slots are only where this expert is already: move another there, the least loaded; return from where."""
    free = np.flatnonzero(grid.free_slots() > 0)
    for target in free:
        movable = grid.held & ~grid.held[:, :, [target]] & ~grid.held[row, expert]
        rows, experts, columns = np.nonzero(movable)
        if len(rows):
            index = int(shares[rows, experts].argmin())
            grid.held[rows[index], experts[index], columns[index]] = False
            grid.held[rows[index], experts[index], target] = True
            return int(columns[index])
    return None
