"""Which shard holds which expert, before any load is known."""

from __future__ import annotations

from collections.abc import Sequence

from deepseek_ray.errors import DeploymentError


def contiguous_placement(layers: Sequence[int], num_experts: int, num_shards: int) -> dict[int, list[int]]:
    """layer -> shard of each expert: equal runs of neighbours, the first `num_experts % num_shards` one longer.

    Raises DeploymentError if a shard would be left without experts.
    """
    if num_shards > num_experts:
        raise DeploymentError(
            f"{num_shards} expert shards for {num_experts} routed experts per layer leaves shards without work; "
            f"use at most {num_experts}"
        )
    base, longer = divmod(num_experts, num_shards)
    owners = [shard for shard in range(num_shards) for _ in range(base + (shard < longer))]
    return {layer: list(owners) for layer in layers}


def experts_of_shard(placement: dict[int, list[int]], shard: int) -> dict[int, list[int]]:
    """layer -> experts that `shard` holds, in order."""
    return {
        layer: [expert for expert, owner in enumerate(owners) if owner == shard] for layer, owners in placement.items()
    }
