"""What expert shards can take, from what each reports of itself: speed beside the others, and room for experts."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from deepseek_ray.expert_parallel.placement import Placement
from deepseek_ray.expert_parallel.replicas import ShardCapacity

ALIKE = 1.3
"""Shards whose speeds differ by less count as equal: a measurement on a busy machine is no better."""
EXTREME = 8.0
"""Nobody counts as faster or slower than this: a shard that was stopped while it measured is not to be emptied."""
EXPERTS_SHARE = 0.75
"""Part of a machine's or a GPU's memory that experts may fill; attention, activations and the system need some, too."""


class ShardFigures(msgspec.Struct, frozen=True):
    """What a shard says of itself; 0 where it does not know yet."""

    seconds_per_expert: float = 0.0
    expert_bytes: float = 0.0
    """Of one packed expert."""
    memory_bytes: float = 0.0
    memory: str = ""
    """Names the machine or GPU whose memory that is: shards that name the same one share it."""


Figures = Mapping[int, ShardFigures]
"""By shard."""


def capacities(placement: Placement, shards: Sequence[int], figures: Figures) -> list[ShardCapacity]:
    """Of each of `shards`: speed 1 and room for every expert, as far as nothing else is known.

    What a shard holds already, it has room for.
    """
    everything = sum(len(experts) for experts in placement.values())
    speeds, room = relative_speeds(figures), slots(figures)
    held = Counter(shard for experts in placement.values() for holders in experts for shard in holders)
    return [ShardCapacity(id, speeds.get(id, 1.0), max(held[id], room.get(id, everything))) for id in shards]


def relative_speeds(figures: Figures) -> dict[int, float]:
    """Shard -> speed, 1 being the median of all; shards that have not measured are not named."""
    seconds = {shard: own.seconds_per_expert for shard, own in figures.items() if own.seconds_per_expert}
    usual = statistics.median(seconds.values()) if seconds else 1.0
    return {shard: _rounded(usual / own) for shard, own in seconds.items()}


def slots(figures: Figures) -> dict[int, int]:
    """Shard -> experts, over all layers, that its share of memory holds; shards that have not said are not named."""
    sharers = Counter(own.memory for own in figures.values())
    return {
        shard: int(EXPERTS_SHARE * own.memory_bytes / sharers[own.memory] / own.expert_bytes)
        for shard, own in figures.items()
        if own.expert_bytes and own.memory_bytes
    }


def _rounded(speed: float) -> float:
    if 1 / ALIKE < speed < ALIKE:
        return 1.0
    return min(EXTREME, max(1 / EXTREME, speed))
