"""Who answers for the experts of a shard that is away: the others, until it is back.

The plan stays as it is. Shards that are there load what only the one that is away should have; the table then names
those who hold an expert where none of the wanted ones does (`routes.published_placement`). When the shard is back, the
table names it again and the others drop what was lent to them, as after any other move.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from deepseek_ray.control.plan import Plan
from deepseek_ray.control.routes import Held
from deepseek_ray.control.shard_figures import Figures, capacities
from deepseek_ray.expert_parallel.placement import experts_of_shard
from deepseek_ray.expert_parallel.repair import lend
from deepseek_ray.expert_parallel.replicas import grid_of

logger = logging.getLogger(__name__)


class StandIns:
    """What each shard holds for others. Times are monotonic seconds given by the caller."""

    def __init__(self, after_seconds: float | None) -> None:
        """`after_seconds`: how long a shard must be away; None lends nothing."""
        self._after = after_seconds
        self._situation: tuple[int, tuple[int, ...], tuple[int, ...]] = (0, (), ())
        self._lent: dict[int, dict[int, list[int]]] = {}

    def update(self, plan: Plan, last_ready: Mapping[int, float], figures: Figures, now: float) -> None:
        """`last_ready`: when each shard was last ready; one that never was is not away, it has not come yet."""
        if self._after is None:
            return
        since = now - self._after
        there = tuple(id for id in plan.shards if id in last_ready and last_ready[id] >= since)
        away = tuple(id for id in plan.shards if id in last_ready and last_ready[id] < since)
        situation = (plan.revision, there, away)
        if situation == self._situation:
            return
        self._situation = situation
        self._lent = _lent_to(plan, there, away, figures) if there and away else {}

    def of(self, shard: int) -> Held:
        """layer -> experts that a shard shall hold beyond the plan."""
        return self._lent.get(shard, {})


def _lent_to(
    plan: Plan, there: Sequence[int], away: Sequence[int], figures: Figures
) -> dict[int, dict[int, list[int]]]:
    """Shard -> layer -> experts of which every wanted shard is away. Nothing if those that are there lack the room."""
    names = ", ".join(map(str, away))
    grid = grid_of(plan.placement, capacities(plan.placement, there, figures))
    lonely = [
        (row, expert)
        for row, layer in enumerate(grid.layers)
        for expert, shards in enumerate(plan.placement[layer])
        if set(shards) <= set(away)
    ]
    own = grid.placement()
    if not lend(grid, lonely):
        logger.warning("shards that are away: %s; the others lack the memory for their %d experts", names, len(lonely))
        return {}
    if lonely:
        logger.warning("shards that are away: %s; the others load their %d experts", names, len(lonely))
    both = grid.placement()
    return {shard: _beyond(experts_of_shard(both, shard), experts_of_shard(own, shard)) for shard in there}


def _beyond(held: Held, own: Held) -> dict[int, list[int]]:
    more = {layer: sorted(set(experts) - set(own.get(layer, ()))) for layer, experts in held.items()}
    return {layer: experts for layer, experts in more.items() if experts}
