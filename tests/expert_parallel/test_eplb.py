"""EPLB: the published vector, cases by hand, and a slow obvious version of the whole beside it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_ray.errors import DeploymentError
from deepseek_ray.expert_parallel.eplb import balanced_packing, rebalance_experts, replicate_experts

PUBLISHED_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def test_the_published_vector() -> None:
    # README of deepseek-ai/EPLB: 16 slots, 4 groups, 2 nodes, 8 shards.
    physical_to_logical, logical_to_physical, counts = rebalance_experts(PUBLISHED_LOADS, 16, 4, 2, 8)
    assert physical_to_logical.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert counts.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    assert sorted(logical_to_physical[0, 5].tolist()) == [0, 2]
    assert logical_to_physical[0, 7].tolist() == [3, -1]


def test_packing_by_hand() -> None:
    # Heaviest first into the lightest pack with room: 8 -> pack 0, 5 -> pack 1, 4 -> pack 1 (5 < 8), and 1 -> pack 0,
    # the only one with room (8 < 9 as well). Places count arrivals.
    pack, place = balanced_packing([[1, 8, 5, 4]], 2)
    assert pack.tolist() == [[0, 0, 1, 1]]
    assert place.tolist() == [[1, 0, 0, 1]]


def test_a_full_pack_takes_nothing_more() -> None:
    # 9 -> 0, 1 -> 1, 0 -> 1: full. The last 0 goes to the heavy pack.
    pack, _ = balanced_packing([[9, 1, 0, 0]], 2)
    assert pack.tolist() == [[0, 1, 1, 0]]


def test_packs_of_one_keep_the_order() -> None:
    pack, place = balanced_packing([[1, 3, 2]], 3)
    assert (pack.tolist(), place.tolist()) == ([[0, 1, 2]], [[0, 0, 0]])


def test_replication_by_hand() -> None:
    # Loads 6, 9: the third replica goes to 9 (9 > 6), then 9/2 = 4.5 < 6, so the fourth to 6.
    logical, rank, counts = replicate_experts([[6, 9]], 4)
    assert logical.tolist() == [[0, 1, 1, 0]]
    assert rank.tolist() == [[0, 0, 1, 1]]
    assert counts.tolist() == [[2, 2]]


def test_global_policy_when_groups_do_not_divide_over_nodes() -> None:
    # 3 groups on 2 nodes: as if there were one group and one node.
    loads = [[5, 1, 7, 2, 3, 4]]
    uneven = rebalance_experts(loads, 8, 3, 2, 4)
    assert all(np.array_equal(a, b) for a, b in zip(uneven, rebalance_experts(loads, 8, 1, 1, 4), strict=True))


def test_no_layers() -> None:
    physical_to_logical, logical_to_physical, counts = rebalance_experts(np.empty((0, 4)), 4, 1, 1, 2)
    assert (physical_to_logical.shape, logical_to_physical.shape, counts.shape) == ((0, 4), (0, 4, 1), (0, 4))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[int]], int, int, int, int]:
    """loads, slots, groups, nodes, shards whose sizes divide."""
    nodes = draw(st.integers(1, 3))
    shards = nodes * draw(st.integers(1, 3))
    groups = draw(st.integers(1, 6))
    experts = groups * draw(st.integers(1, 4))
    least = -(-experts // shards) * shards
    slots = least + shards * draw(st.integers(0, 3))
    layer = st.lists(st.integers(0, 50), min_size=experts, max_size=experts)
    return draw(st.lists(layer, min_size=1, max_size=3)), slots, groups, nodes, shards


@settings(deadline=None)
@given(problems())
def test_equals_the_slow_version(problem: tuple[list[list[int]], int, int, int, int]) -> None:
    loads, *sizes = problem
    physical_to_logical, logical_to_physical, counts = rebalance_experts(loads, *sizes)
    for layer, row in enumerate(loads):
        slots, replicas = slow_rebalance(row, *sizes)
        assert physical_to_logical[layer].tolist() == slots
        for expert, places in enumerate(replicas):
            assert counts[layer, expert] == len(places)
            padding = [-1] * (logical_to_physical.shape[2] - len(places))
            assert logical_to_physical[layer, expert].tolist() == places + padding


def slow_rebalance(
    loads: list[int], num_slots: int, num_groups: int, num_nodes: int, num_shards: int
) -> tuple[list[int], list[list[int]]]:
    """One layer with lists: expert of each slot; slots of each expert, in the order its replicas were made."""
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    size = len(loads) // num_groups
    groups = [list(range(start, start + size)) for start in range(0, len(loads), size)]
    nodes = slow_pack([float(sum(loads[e] for e in group)) for group in groups], num_nodes)
    slots: list[int] = []
    replicas: list[list[tuple[int, int]]] = [[] for _ in loads]
    for node in nodes:
        experts = [expert for group in node for expert in groups[group]]
        copies = [(expert, 0) for expert in experts]
        while len(copies) < num_slots // num_nodes:
            count = {expert: sum(1 for e, _ in copies if e == expert) for expert in experts}
            hottest = max(experts, key=lambda expert: loads[expert] / count[expert])  # the first of equals
            copies.append((hottest, count[hottest]))
        count = {expert: sum(1 for e, _ in copies if e == expert) for expert in experts}
        for shard in slow_pack([loads[e] / count[e] for e, _ in copies], num_shards // num_nodes):
            for copy in shard:
                expert, rank = copies[copy]
                replicas[expert].append((rank, len(slots)))
                slots.append(expert)
    return slots, [[slot for _, slot in sorted(places)] for places in replicas]


def slow_pack(loads: list[float], num_packs: int) -> list[list[int]]:
    """Items of each pack, in order of arrival."""
    room = len(loads) // num_packs
    if room == 1:
        return [[item] for item in range(len(loads))]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        open_packs = [pack for pack in packs if len(pack) < room]
        min(open_packs, key=lambda pack: sum(loads[i] for i in pack)).append(item)
    return packs


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((5, 1, 1, 2), r"5 physical experts do not divide over 2 shards; use a multiple of 2"),
        ((4, 3, 1, 2), r"4 experts do not divide over 3 groups"),
        ((6, 1, 2, 3), r"3 shards do not divide over 2 nodes"),
        ((2, 1, 1, 2), r"2 slots cannot hold 4 experts; use at least 4"),
        ((4, 1, 1, 0), r"0 shards; use at least 1"),
    ],
)
def test_sizes_that_do_not_fit(sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(DeploymentError, match=message):
        rebalance_experts([[1, 2, 3, 4]], *sizes)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_loads_that_are_no_loads(bad: float) -> None:
    with pytest.raises(DeploymentError, match=rf"load {bad} of row 1, expert 0.*at least 0"):
        rebalance_experts([[1.0, 2.0], [bad, 1.0]], 2, 1, 1, 2)


def test_one_row_without_layers_is_refused() -> None:
    with pytest.raises(DeploymentError, match=r"shape \(3,\), not \[layers, experts\]"):
        balanced_packing([1, 2, 3], 3)


def test_items_that_do_not_fill_the_packs() -> None:
    with pytest.raises(DeploymentError, match=r"3 items do not divide into 2 packs"):
        balanced_packing([[1, 2, 3]], 2)
