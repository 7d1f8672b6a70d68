"""DeepSeek's expert-parallel load balancer: which logical expert fills each physical slot, from the loads alone.

The algorithm of https://github.com/deepseek-ai/EPLB (eplb.py at d52c72d; DeepSeek-V3, arXiv 2412.19437, section 3.4),
in numpy. It places every expert anew and knows no moves, no shard speeds and no uneven shards; `rebalance` does. Here
as the reference to compare with, and for a first placement from measured loads.

Letters: L layers, E logical experts, P physical experts (slots), G groups of experts, N nodes, D shards. Equal loads
keep their order: the lower index comes first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepseek_ray.errors import DeploymentError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def rebalance_experts(
    loads: ArrayLike, num_physical: int, num_groups: int, num_nodes: int, num_shards: int
) -> tuple[Ints, Ints, Ints]:
    """Replicate the loaded experts and pack all replicas onto shards.

    loads: [L, E], tokens (any unit). Groups stay on one node if they divide evenly over the nodes (hierarchical
    policy); otherwise groups and nodes are ignored (global policy).

    Returns physical_to_logical [L, P] (shard d has the slots d * P/D up to (d + 1) * P/D), logical_to_physical
    [L, E, most replicas of an expert], padded with -1, and replica_counts [L, E].
    Raises DeploymentError for sizes that do not divide, too few slots, or loads that are negative or not finite.
    """
    matrix = _checked_loads(loads)
    _check_sizes(matrix.shape[1], num_physical, num_groups, num_nodes, num_shards)
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    physical_to_logical, rank, counts = _hierarchical(matrix, num_physical, num_groups, num_nodes, num_shards)
    num_layers, num_experts = matrix.shape
    logical_to_physical = np.full((num_layers, num_experts, counts.max(initial=1)), -1, dtype=np.int64)
    rows = np.arange(num_layers)[:, None]
    logical_to_physical[rows, physical_to_logical, rank] = np.arange(num_physical)
    return physical_to_logical, logical_to_physical, counts


def balanced_packing(loads: ArrayLike, num_packs: int) -> tuple[Ints, Ints]:
    """Pack n items per row into packs of n / num_packs items each: heaviest first, into the lightest pack with room.

    loads: [rows, n]. Returns the pack of each item and its place in the pack, both [rows, n].
    """
    matrix = _checked_loads(loads)
    num_rows, num_items = matrix.shape
    if num_packs < 1 or num_items % num_packs:
        raise DeploymentError(
            f"{num_items} items do not divide into {num_packs} packs; use a divisor of {num_items} as number of packs"
        )
    capacity = num_items // num_packs
    if capacity == 1:
        return np.tile(np.arange(num_items), (num_rows, 1)), np.zeros((num_rows, num_items), dtype=np.int64)
    pack = np.empty((num_rows, num_items), dtype=np.int64)
    place = np.empty_like(pack)
    pack_loads = np.zeros((num_rows, num_packs))
    pack_sizes = np.zeros((num_rows, num_packs), dtype=np.int64)
    rows = np.arange(num_rows)
    for items in np.argsort(-matrix, axis=1, kind="stable").T:
        chosen = np.where(pack_sizes < capacity, pack_loads, np.inf).argmin(axis=1)
        pack[rows, items] = chosen
        place[rows, items] = pack_sizes[rows, chosen]
        pack_loads[rows, chosen] += matrix[rows, items]
        pack_sizes[rows, chosen] += 1
    return pack, place


def replicate_experts(loads: ArrayLike, num_physical: int) -> tuple[Ints, Ints, Ints]:
    """Give every expert one replica, and each further one to the expert with the largest load per replica.

    loads: [rows, n]. Returns the expert of each physical one [rows, num_physical], which of its replicas that is (from
    0) [rows, num_physical], and the number of replicas of each expert [rows, n].
    """
    matrix = _checked_loads(loads)
    num_rows, num_experts = matrix.shape
    if num_physical < num_experts:
        raise DeploymentError(f"{num_physical} slots cannot hold {num_experts} experts; use at least {num_experts}")
    logical = np.tile(np.minimum(np.arange(num_physical), num_experts - 1), (num_rows, 1))
    rank = np.zeros((num_rows, num_physical), dtype=np.int64)
    counts = np.ones((num_rows, num_experts), dtype=np.int64)
    rows = np.arange(num_rows)
    for physical in range(num_experts, num_physical):
        chosen = (matrix / counts).argmax(axis=1)
        logical[:, physical] = chosen
        rank[:, physical] = counts[rows, chosen]
        counts[rows, chosen] += 1
    return logical, rank, counts


def _hierarchical(
    loads: Floats, num_physical: int, num_groups: int, num_nodes: int, num_shards: int
) -> tuple[Ints, Ints, Ints]:
    """physical_to_logical [L, P], the replica number of each slot [L, P], replica counts [L, E]."""
    num_layers, num_experts = loads.shape
    group_size, groups_per_node = num_experts // num_groups, num_groups // num_nodes
    experts_per_node, slots_per_node = num_experts // num_nodes, num_physical // num_nodes
    shards_per_node, slots_per_shard = num_shards // num_nodes, num_physical // num_shards

    # Step 1: pack groups onto nodes. Experts are renumbered so that those of a node are neighbours.
    group_loads = loads.reshape(num_layers, num_groups, group_size).sum(axis=2)
    node, place = balanced_packing(group_loads, num_nodes)
    first = (node * groups_per_node + place) * group_size
    to_neighbour = (first[:, :, None] + np.arange(group_size)).reshape(num_layers, num_experts)
    from_neighbour = _inverse(to_neighbour)

    # Step 2: replicate within each node; a row is now one node of one layer.
    node_loads = np.take_along_axis(loads, from_neighbour, 1).reshape(-1, experts_per_node)
    expert, rank, counts = replicate_experts(node_loads, slots_per_node)

    # Step 3: pack the replicas of a node onto its shards, and number the slots shard by shard.
    replica_loads = np.take_along_axis(node_loads / counts, expert, 1)
    shard, place = balanced_packing(replica_loads, shards_per_node)
    replica_of_slot = _inverse(shard * slots_per_shard + place)
    slot_expert = np.take_along_axis(expert, replica_of_slot, 1).reshape(num_layers, num_nodes, slots_per_node)
    slot_expert += (np.arange(num_nodes) * experts_per_node)[:, None]

    # Step 4: back to the experts' own numbers.
    slot_neighbour = slot_expert.reshape(num_layers, num_physical)
    slot_rank = np.take_along_axis(rank, replica_of_slot, 1).reshape(num_layers, num_physical)
    return (
        np.take_along_axis(from_neighbour, slot_neighbour, 1),
        slot_rank,
        np.take_along_axis(counts.reshape(num_layers, num_experts), to_neighbour, 1),
    )


def _inverse(permutation: Ints) -> Ints:
    """[rows, n] -> the inverse of each row."""
    return np.argsort(permutation, axis=1, kind="stable")


def _checked_loads(loads: ArrayLike) -> Floats:
    matrix = np.asarray(loads, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.shape[1]:
        raise DeploymentError(f"loads of shape {matrix.shape}, not [layers, experts]; give one row per layer")
    wrong = np.argwhere(~(np.isfinite(matrix) & (matrix >= 0)))
    if len(wrong):
        row, column = (int(index) for index in wrong[0])
        raise DeploymentError(
            f"load {matrix[row, column]} of row {row}, expert {column}; a load is a finite number of tokens, at least 0"
        )
    return matrix


def _check_sizes(num_experts: int, num_physical: int, num_groups: int, num_nodes: int, num_shards: int) -> None:
    sizes = {"physical experts": num_physical, "groups": num_groups, "nodes": num_nodes, "shards": num_shards}
    for name, size in sizes.items():
        if size < 1:
            raise DeploymentError(f"{size} {name}; use at least 1")
    if num_physical < num_experts:
        raise DeploymentError(f"{num_physical} slots cannot hold {num_experts} experts; use at least {num_experts}")
    divisions = (
        (num_physical, "physical experts", num_shards, "shards"),
        (num_experts, "experts", num_groups, "groups"),
        (num_shards, "shards", num_nodes, "nodes"),
    )
    for whole, name, parts, what in divisions:
        if whole % parts:
            raise DeploymentError(f"{whole} {name} do not divide over {parts} {what}; use a multiple of {parts}")
