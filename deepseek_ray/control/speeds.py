"""How fast expert shards are beside each other, from what each measured of itself."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

ALIKE = 1.3
"""Shards whose speeds differ by less count as equal: a measurement on a busy machine is no better."""
EXTREME = 8.0
"""Nobody counts as faster or slower than this: a shard that was stopped while it measured is not to be emptied."""


def relative_speeds(figures: Mapping[str, Mapping[str, float]]) -> dict[int, float]:
    """Shard -> speed, 1 being the median of all. figures: `expert_shard/<id>` -> with `seconds_per_expert`, or 0 while
    the shard has not measured; shards without it have the speed 1."""
    seconds = {
        int(member.partition("/")[2]): values["seconds_per_expert"]
        for member, values in figures.items()
        if member.startswith("expert_shard/") and values.get("seconds_per_expert")
    }
    usual = statistics.median(seconds.values()) if seconds else 1.0
    return {shard: _rounded(usual / own) for shard, own in seconds.items()}


def _rounded(speed: float) -> float:
    if 1 / ALIKE < speed < ALIKE:
        return 1.0
    return min(EXTREME, max(1 / EXTREME, speed))
