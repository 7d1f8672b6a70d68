"""From the plan and what shards hold to what workers are told: make before break.

An expert moves in three steps, each seen in reports and none of them remembered: the new shard loads it (the plan wants
it there), the table that names the new shard is published (it is held there), and the old shard drops it once every
worker has that table. A router that restarts in between goes on where the reports say things are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepseek_ray.expert_parallel.placement import Placement

Held = Mapping[int, Sequence[int]]
"""layer -> experts that a shard holds."""


def published_placement(wanted: Placement, held: Mapping[int, Held]) -> Placement:
    """layer -> per expert the shards to ask, from what the live shards hold (shard -> `Held`).

    Where none of the wanted shards has an expert yet, those that still have it; where nobody has it, the wanted ones:
    they will.
    """
    holders: dict[int, list[list[int]]] = {layer: [[] for _ in experts] for layer, experts in wanted.items()}
    for shard in sorted(held):
        for layer, experts in held[shard].items():
            for expert in experts:
                holders[layer][expert].append(shard)
    return {
        layer: [_chosen(shards, holders[layer][expert]) for expert, shards in enumerate(experts)]
        for layer, experts in wanted.items()
    }


def _chosen(wanted: tuple[int, ...], holders: Sequence[int]) -> tuple[int, ...]:
    return tuple(shard for shard in wanted if shard in holders) or tuple(holders) or wanted


def held_by(shard: int, wanted: Held, published: Placement, now: Held, settled: bool) -> dict[int, list[int]]:
    """layer -> experts that a shard shall hold: what is `wanted` of it, and what it has and may still be asked for.

    `settled`: every worker has the published table, so that what it does not name is asked of nobody.
    """
    result = {layer: set(experts) for layer, experts in wanted.items()}
    for layer, experts in now.items():
        result.setdefault(layer, set()).update(
            expert for expert in experts if not settled or shard in published[layer][expert]
        )
    return {layer: sorted(experts) for layer, experts in result.items() if experts}


def unreachable_experts(published: Placement, held: Mapping[int, Held], alive: frozenset[int]) -> bool:
    """Whether some expert is on no shard of `alive` that holds it."""
    has = {shard: {layer: set(experts) for layer, experts in held[shard].items()} for shard in alive if shard in held}
    return any(
        not any(shard in has and expert in has[shard].get(layer, ()) for shard in shards)
        for layer, experts in published.items()
        for expert, shards in enumerate(experts)
    )
