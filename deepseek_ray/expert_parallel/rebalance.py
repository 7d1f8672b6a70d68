"""Changes of a placement: balance it with few moves, empty a shard, fill new ones, or move one expert by hand.

EPLB (`eplb`) places every expert anew. Here shards are processes that load an expert's weights one by one while they
serve, so an add costs (a read and memory) and a drop is free: what is there stays unless moving it pays.

`loads` are tokens per expert in any unit, layer -> [experts] (`load.ExpertLoad.loads`); without them every expert
counts the same. Placements hold one list of experts per MoE layer. The same input gives the same output. Every function
raises DeploymentError that says which shard lacks how many slots, or what does not fit together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from deepseek_ray.errors import DeploymentError
from deepseek_ray.expert_parallel.layer_search import balance_layer, search
from deepseek_ray.expert_parallel.layer_steps import LayerLimits
from deepseek_ray.expert_parallel.placement import Placement
from deepseek_ray.expert_parallel.repair import lacks_slot, repair, trim
from deepseek_ray.expert_parallel.replicas import (
    PlacementChange,
    ReplicaGrid,
    ShardCapacity,
    change_between,
    grid_of,
)

THRESHOLD = 0.1
"""A layer is left as it is while its busiest shard takes at most this part more time than the best that is found."""
TOLERANCE = 0.05
"""A layer that changes is brought to within this part of the best."""


def rebalance(
    placement: Placement,
    shards: Sequence[ShardCapacity],
    loads: Mapping[int, ArrayLike] | None = None,
    *,
    extra_replicas: int = 0,
    min_replicas: int = 1,
    threshold: float = THRESHOLD,
    tolerance: float = TOLERANCE,
) -> PlacementChange:
    """Lower the time of the busiest shard of each layer, with few adds.

    `shards` are those that are there: what others held goes elsewhere. A layer may have `extra_replicas` more replicas
    than experts (or min_replicas - 1 per expert, if that is more) and need not use them. Each expert gets
    `min_replicas` on different shards as far as there are slots and shards.

    Layers are balanced one by one, the worst first, because slots are shared between them. For the rule by which a
    layer is left alone or changed see `layer_search.balance_layer`.
    """
    _check_policy(extra_replicas, min_replicas, threshold, tolerance)
    grid = grid_of(placement, shards, loads)
    num_experts = grid.held.shape[1]
    copies = min(min_replicas, len(grid.shards))
    max_replicas = num_experts + max(extra_replicas, num_experts * (copies - 1))
    repair(grid, copies)
    trim(grid, max_replicas, copies)
    everywhere = np.ones(len(grid.shards), dtype=np.bool_)
    limits = LayerLimits(grid.speeds, max_replicas, copies, everywhere)
    for row in _worst_first(grid):
        grid.held[row] = balance_layer(grid.held[row], grid.loads[row], grid.free_slots(), limits, threshold, tolerance)
    return change_between(placement, grid.placement())


def drain(
    placement: Placement,
    shards: Sequence[ShardCapacity],
    shard: int,
    loads: Mapping[int, ArrayLike] | None = None,
    *,
    min_replicas: int = 1,
) -> PlacementChange:
    """Take everything off a shard. Experts that would have too few replicas get one where it costs the least time."""
    _check_policy(0, min_replicas, 0, 0)
    others = [known for known in shards if known.id != shard]
    if not others:
        raise DeploymentError(f"shard {shard} is the only one; add another before it is drained")
    if len(others) == len(shards):
        raise DeploymentError(f"shard {shard} is not one of {[known.id for known in shards]}; name one of those")
    grid = grid_of(placement, others, loads)
    repair(grid, min_replicas)
    return change_between(placement, grid.placement())


def spread(
    placement: Placement,
    shards: Sequence[ShardCapacity],
    new_shards: Sequence[int],
    loads: Mapping[int, ArrayLike] | None = None,
    *,
    tolerance: float = 0.0,
) -> PlacementChange:
    """Move replicas to new shards, and only to those, until no busier shard gains or all take the mean time.

    `shards` are all, the new ones too. `tolerance`: shards that take at most this part more than the mean keep theirs.
    """
    _check_policy(0, 1, 0, tolerance)
    grid = grid_of(placement, shards, loads)
    repair(grid, 1)
    destinations = np.zeros(len(grid.shards), dtype=np.bool_)
    destinations[[grid.column(shard) for shard in new_shards]] = True
    for row in _worst_first(grid):
        held, row_loads = grid.held[row], grid.loads[row]
        limits = LayerLimits(grid.speeds, int(held.sum()), 1, destinations)
        states = search(held, row_loads, grid.free_slots(), limits, tolerance, every_shard=True)
        grid.held[row] = states[-1] if states else held
    return change_between(placement, grid.placement())


def replicate(
    placement: Placement, shards: Sequence[ShardCapacity], layer: int, expert: int, shard: int
) -> PlacementChange:
    """One more replica of an expert, on `shard`."""
    grid, row = _grid_and_row(placement, shards, layer, expert)
    _put(grid, row, expert, shard)
    return change_between(placement, grid.placement())


def move(
    placement: Placement, shards: Sequence[ShardCapacity], layer: int, expert: int, source: int, destination: int
) -> PlacementChange:
    """A replica of an expert from one shard to another."""
    grid, row = _grid_and_row(placement, shards, layer, expert)
    column = grid.column(source)
    if not grid.held[row, expert, column]:
        raise DeploymentError(
            f"shard {source} does not hold expert {expert} of layer {layer}; move it from one of "
            f"{list(placement[layer][expert])}"
        )
    _put(grid, row, expert, destination)
    grid.held[row, expert, column] = False
    return change_between(placement, grid.placement())


def _put(grid: ReplicaGrid, row: int, expert: int, shard: int) -> None:
    column = grid.column(shard)
    if grid.held[row, expert, column]:
        raise DeploymentError(
            f"shard {shard} already holds expert {expert} of layer {grid.layers[row]}; name a shard that does not"
        )
    if grid.free_slots()[column] < 1:
        raise lacks_slot(grid, column)
    grid.held[row, expert, column] = True


def _grid_and_row(
    placement: Placement, shards: Sequence[ShardCapacity], layer: int, expert: int
) -> tuple[ReplicaGrid, int]:
    grid = grid_of(placement, shards)
    if layer not in grid.layers:
        raise DeploymentError(f"layer {layer} has no routed experts; the MoE layers are {list(grid.layers)}")
    if not 0 <= expert < grid.held.shape[1]:
        raise DeploymentError(f"expert {expert} of layer {layer}; name one from 0 to {grid.held.shape[1] - 1}")
    return grid, grid.layers.index(layer)


def _worst_first(grid: ReplicaGrid) -> list[int]:
    """Rows by how much longer the busiest shard takes than all would if they were even."""
    even = grid.loads.sum(axis=1) / grid.speeds.sum()
    excess = np.array([grid.times(row).max() for row in range(len(grid.layers))]) - even
    return [int(row) for row in np.argsort(-excess, kind="stable")]


def _check_policy(extra_replicas: int, min_replicas: int, threshold: float, tolerance: float) -> None:
    least = {"extra replicas": (extra_replicas, 0), "replicas of each expert": (min_replicas, 1)}
    for name, (value, limit) in least.items():
        if value < limit:
            raise DeploymentError(f"{value} {name}; use at least {limit}")
    for name, part in {"threshold": threshold, "tolerance": tolerance}.items():
        if not 0 <= part < np.inf:
            raise DeploymentError(f"a {name} of {part}; use a part of the time, 0 or more")
