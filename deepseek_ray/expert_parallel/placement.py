"""What a placement is, and the one to begin with, before any load is known."""

from __future__ import annotations

from collections.abc import Sequence

from deepseek_ray.errors import DeploymentError

Placement = dict[int, list[tuple[int, ...]]]
"""layer -> for each logical expert the shards that hold a replica of it, each once, in ascending order."""


def contiguous_placement(layers: Sequence[int], num_experts: int, shards: Sequence[int]) -> Placement:
    """Every expert once: equal runs of neighbours, the first `num_experts % len(shards)` shards have one more.

    Raises DeploymentError if a shard would be left without experts.
    """
    if len(shards) > num_experts:
        raise DeploymentError(
            f"{len(shards)} expert shards for {num_experts} routed experts per layer leaves shards without work; "
            f"use at most {num_experts}"
        )
    base, longer = divmod(num_experts, len(shards))
    owners = [(shard,) for place, shard in enumerate(shards) for _ in range(base + (place < longer))]
    return {layer: list(owners) for layer in layers}


def experts_of_shard(placement: Placement, shard: int) -> dict[int, list[int]]:
    """layer -> experts of which `shard` holds a replica, in order; layers without one are left out."""
    held = {
        layer: [expert for expert, shards in enumerate(experts) if shard in shards]
        for layer, experts in placement.items()
    }
    return {layer: experts for layer, experts in held.items() if experts}
