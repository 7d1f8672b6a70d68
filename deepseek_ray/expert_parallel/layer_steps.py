"""The single steps by which one layer is balanced: what a step may do, and what it does to the times of the shards.

Letters: E experts, S shards, n candidate steps of one kind. `held`: bool [E, S]. Every kind takes work off one shard,
the busiest:

    drop      it drops an expert that others hold too                       0 adds
    shift     a replica of it goes to another shard                         1 add
    copy      another shard holds one of its experts as well                1 add
    exchange  as copy, paid for with a replica of another expert elsewhere  1 add
    swap      it and another shard change experts                           2 adds
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

_NUM_VICTIMS = 4
"""Replicas tried for `exchange`: those whose loss leaves the other holders least busy."""
_NUM_SWAPS = 32
"""Swaps looked at closely: those that leave the two shards least busy."""


@dataclass(frozen=True)
class LayerLimits:
    """What a step has to keep to."""

    speeds: Floats  # [S]
    max_replicas: int  # of all experts of the layer together
    min_replicas: int  # of each expert: no drop below; fewer are left as they are
    destinations: Bools  # [S] shards that may be given replicas


@dataclass(frozen=True)
class Steps:
    """n candidate steps of one kind: new holders of one expert each, or of two."""

    num_adds: int
    expert: Ints  # [n]
    holders: Bools  # [n, S]
    other_expert: Ints | None = None  # [n]
    other_holders: Bools | None = None  # [n, S]

    def apply(self, held: Bools, index: int) -> Bools:
        """[E, S] after one of the steps."""
        changed = held.copy()
        changed[self.expert[index]] = self.holders[index]
        if self.other_expert is not None and self.other_holders is not None:
            changed[self.other_expert[index]] = self.other_holders[index]
        return changed

    def peaks(self, held: Bools, loads: Floats, speeds: Floats, times: Floats, busiest: int) -> Floats:
        """[n]: the largest time among the shards that a step touches, after it. times: [S], before."""
        change = _contributions(self.holders, loads[self.expert], speeds)
        change -= _contributions(held[self.expert], loads[self.expert], speeds)
        if self.other_expert is not None and self.other_holders is not None:
            change += _contributions(self.other_holders, loads[self.other_expert], speeds)
            change -= _contributions(held[self.other_expert], loads[self.other_expert], speeds)
        touched = change != 0
        touched[:, busiest] = True
        return np.where(touched, times + change, 0.0).max(axis=1)


def kinds_of_steps(
    held: Bools, loads: Floats, free: Ints, limits: LayerLimits, times: Floats, busiest: int
) -> Iterator[Steps]:
    """Every kind, the cheap ones first. free: [S] slots that no layer uses; times: [S]."""
    open_shards = limits.destinations & (free > 0)
    yield _drops(held, limits, busiest)
    yield _shifts(held, open_shards, busiest)
    if held.sum() < limits.max_replicas:
        yield _copies(held, open_shards, busiest)
    yield _exchanges(held, loads, open_shards, limits, times, busiest)
    yield _swaps(held, loads, limits, times, busiest)


def _drops(held: Bools, limits: LayerLimits, busiest: int) -> Steps:
    experts = np.flatnonzero(held[:, busiest] & _droppable(held, limits))
    holders = held[experts]
    holders[:, busiest] = False
    return Steps(0, experts, holders)


def _shifts(held: Bools, open_shards: Bools, busiest: int) -> Steps:
    copies = _copies(held, open_shards, busiest)
    copies.holders[:, busiest] = False
    return Steps(1, copies.expert, copies.holders)


def _copies(held: Bools, open_shards: Bools, busiest: int) -> Steps:
    mine = np.flatnonzero(held[:, busiest])
    row, shards = np.nonzero(~held[mine] & open_shards)
    return Steps(1, mine[row], _changed(held, mine[row], shards, True))


def _exchanges(
    held: Bools, loads: Floats, open_shards: Bools, limits: LayerLimits, times: Floats, busiest: int
) -> Steps:
    victims, losers = _victims(held, loads, limits, times, busiest)
    mine = np.flatnonzero(held[:, busiest])
    wanted = ~held[mine] & limits.destinations
    chosen, row, shards = np.nonzero(np.broadcast_to(wanted, (len(victims), *wanted.shape)))
    experts = mine[row]
    has_room = open_shards[shards] | (shards == losers[chosen])
    allowed = has_room & (experts != victims[chosen])
    chosen, experts, shards = chosen[allowed], experts[allowed], shards[allowed]
    grown = _changed(held, experts, shards, True)
    return Steps(1, experts, grown, victims[chosen], _changed(held, victims[chosen], losers[chosen], False))


def _victims(held: Bools, loads: Floats, limits: LayerLimits, times: Floats, busiest: int) -> tuple[Ints, Ints]:
    """A few replicas (expert, shard) whose loss leaves the largest time of the expert's other holders the smallest."""
    droppable = held & _droppable(held, limits)[:, None]
    droppable[:, busiest] = False
    experts, shards = np.nonzero(droppable)
    drops = Steps(0, experts, _changed(held, experts, shards, False))
    after = times - _contributions(held[experts], loads[experts], limits.speeds)
    after += _contributions(drops.holders, loads[experts], limits.speeds)
    least = np.argsort(np.where(drops.holders, after, 0.0).max(axis=1), kind="stable")[:_NUM_VICTIMS]
    return experts[least], shards[least]


def _swaps(held: Bools, loads: Floats, limits: LayerLimits, times: Floats, busiest: int) -> Steps:
    if not limits.destinations[busiest]:
        return Steps(2, np.zeros(0, dtype=np.int64), held[:0])
    their_experts, their_shards = np.nonzero(held & ~held[:, [busiest]] & limits.destinations)
    mine = np.flatnonzero(held[:, busiest])
    row, pair = np.nonzero(~held[np.ix_(mine, their_shards)])
    mine, other, shards = mine[row], their_experts[pair], their_shards[pair]
    best = _best_swaps(held, loads, limits.speeds, times, busiest, mine, other, shards)
    mine, other, shards = mine[best], other[best], shards[best]
    given = _changed(held, mine, shards, True)
    given[:, busiest] = False
    taken = _changed(held, other, shards, False)
    taken[:, busiest] = True
    return Steps(2, mine, given, other, taken)


def _best_swaps(
    held: Bools, loads: Floats, speeds: Floats, times: Floats, busiest: int, mine: Ints, other: Ints, shards: Ints
) -> Ints:
    """Places of a few swaps with the lowest time of the two shards, other holders left aside. All arguments [n]."""
    holding_speed = held @ speeds
    faster = speeds[shards] - speeds[busiest]
    given, taken = loads[mine] / (holding_speed[mine] + faster), loads[other] / (holding_speed[other] - faster)
    here = times[busiest] - (loads / holding_speed)[mine] + taken
    there = times[shards] - (loads / holding_speed)[other] + given
    return np.argsort(np.maximum(here, there), kind="stable")[:_NUM_SWAPS]


def _droppable(held: Bools, limits: LayerLimits) -> Bools:
    """[E]: experts that may lose a replica."""
    return held.sum(axis=1) > max(1, limits.min_replicas)


def _changed(held: Bools, experts: Ints, shards: Ints, value: bool) -> Bools:
    """[n, S]: the holders of each expert with one shard more or less."""
    holders = held[experts]
    holders[np.arange(len(experts)), shards] = value
    return holders


def _contributions(holders: Bools, loads: Floats, speeds: Floats) -> Floats:
    """[n, S]: the time that an expert with these holders [n, S] and this load [n] takes of each shard."""
    return holders * (loads / (holders @ speeds))[:, None]
