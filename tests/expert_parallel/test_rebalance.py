"""Changes of a placement: by hand, and what must hold for every placement, load and set of shards."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deepseek_ray.errors import DeploymentError
from deepseek_ray.expert_parallel.placement import Placement, contiguous_placement
from deepseek_ray.expert_parallel.rebalance import drain, move, rebalance, replicate, spread
from deepseek_ray.expert_parallel.replicas import (
    PlacementChange,
    ReplicaMove,
    ShardCapacity,
    balancedness,
    grid_of,
)


def equal_shards(num_shards: int, slots: int) -> list[ShardCapacity]:
    return [ShardCapacity(id, 1.0, slots) for id in range(num_shards)]


def busiest(placement: Placement, shards: list[ShardCapacity], loads: dict[int, list[float]]) -> dict[int, float]:
    grid = grid_of(placement, shards, loads)
    return {layer: float(grid.times(row).max()) for row, layer in enumerate(grid.layers)}


def test_one_shift_balances() -> None:
    # Shard 0 takes 3 + 2 + 1 = 6, shard 1 takes 2. Expert 1 (2) goes over: 4 and 4.
    change = rebalance({5: [(0,), (0,), (0,), (1,)]}, equal_shards(2, 3), {5: [3, 2, 1, 2]})
    assert change.placement == {5: [(0,), (1,), (0,), (1,)]}
    assert change.moves == (ReplicaMove(5, 1, 1, "add"), ReplicaMove(5, 1, 0, "drop"))
    assert change.num_adds == 1


def test_without_free_slots_experts_are_swapped() -> None:
    # 5 + 4 = 9 against 2 + 1 = 3, all slots in use. 5 <-> 2 gives 6 and 6.
    change = rebalance({0: [(0,), (0,), (1,), (1,)]}, equal_shards(2, 2), {0: [5, 4, 2, 1]})
    assert change.placement == {0: [(1,), (0,), (0,), (1,)]}
    assert change.num_adds == 2


def test_a_hot_expert_is_copied_if_replicas_are_allowed() -> None:
    # 10 alone on shard 0 against 2. Held by both: 5 and 5 + 2; mean 6. Without the right to it, nothing helps.
    placement: Placement = {0: [(0,), (1,)]}
    assert rebalance(placement, equal_shards(2, 2), {0: [10, 2]}).moves == ()
    change = rebalance(placement, equal_shards(2, 2), {0: [10, 2]}, extra_replicas=1)
    assert change.placement == {0: [(0, 1), (1,)]}


def test_copies_cool_down_into_the_budget() -> None:
    # Three replicas more than experts, one allowed: the two of the least load per replica go, from the busiest holder.
    placement: Placement = {0: [(0, 1), (0, 1), (0, 1)]}
    change = rebalance(placement, equal_shards(2, 3), {0: [9, 2, 4]}, extra_replicas=1)
    assert change.num_adds == 0
    assert Counter(len(holders) for holders in change.placement[0]) == {1: 2, 2: 1}
    assert change.placement[0][0] == (0, 1)


def test_a_faster_shard_gets_more() -> None:
    # Four equal experts; shard 1 is three times as fast: 1 of them against 3 is 1/1 = 3/3.
    shards = [ShardCapacity(0, 1.0, 4), ShardCapacity(1, 3.0, 4)]
    change = rebalance({0: [(0,), (0,), (1,), (1,)]}, shards, {0: [1, 1, 1, 1]})
    assert Counter(change.placement[0]) == {(0,): 1, (1,): 3}


def test_the_replicas_of_an_expert_share_by_speed() -> None:
    # 8 over speeds 1 and 3: each replica takes 8 / 4 = 2.
    shards = [ShardCapacity(0, 1.0, 1), ShardCapacity(1, 3.0, 1)]
    assert grid_of({0: [(0, 1)]}, shards, {0: [8]}).times(0).tolist() == [2, 2]


def test_balancedness_by_hand() -> None:
    # 6 and 2: mean 4 over largest 6. With speeds 3 and 1 both take 2.
    placement: Placement = {0: [(0,), (1,)], 1: [(0,), (1,)]}
    loads = {0: [6, 2], 1: [0, 0]}
    assert balancedness(placement, loads, equal_shards(2, 2)) == {0: pytest.approx(4 / 6), 1: 1.0}
    fast = [ShardCapacity(0, 3.0, 2), ShardCapacity(1, 1.0, 2)]
    assert balancedness(placement, loads, fast)[0] == pytest.approx(1)


def test_below_the_threshold_nothing_moves() -> None:
    # 6 against 4: the busiest takes 1.2 of the mean 5.
    placement: Placement = {0: [(0,), (0,), (1,), (1,)]}
    loads = {0: [5, 1, 3, 1]}
    assert rebalance(placement, equal_shards(2, 3), loads, threshold=0.2).moves == ()
    assert rebalance(placement, equal_shards(2, 3), loads, threshold=0.19, tolerance=0).num_adds == 1


def test_what_no_move_can_balance_is_left_alone() -> None:
    # 10 + 0.8 against 1. The mean is 5.9, but one expert alone takes 10: 10.8 is within a tenth of the best.
    placement: Placement = {0: [(0,), (0,), (1,)]}
    assert rebalance(placement, equal_shards(2, 3), {0: [10, 0.8, 1]}, threshold=0.1).moves == ()
    assert rebalance(placement, equal_shards(2, 3), {0: [10, 0.8, 1]}, threshold=0.07).num_adds == 1


def test_the_last_adds_are_not_made_for_little() -> None:
    # 10 + 3 + 0.4 against 1. Without 3 shard 0 takes 10.4, without 0.4 as well 10: the best, and 10.4 is near it.
    placement: Placement = {0: [(0,), (0,), (0,), (1,)]}
    change = rebalance(placement, equal_shards(2, 4), {0: [10, 3, 0.4, 1]}, tolerance=0.05)
    assert change.placement == {0: [(0,), (1,), (0,), (1,)]}
    assert rebalance(placement, equal_shards(2, 4), {0: [10, 3, 0.4, 1]}, tolerance=0.03).num_adds == 2


def test_a_copy_is_exchanged_for_a_colder_one() -> None:
    # 4 / 2 + 2 = 4, 9 and 4 / 2 = 2; the budget is used. Expert 0 leaves shard 2 for a copy of expert 2 there:
    # 6, 4.5 and 4.5, with one add.
    change = rebalance({0: [(0, 2), (0,), (1,)]}, equal_shards(3, 3), {0: [4, 2, 9]}, extra_replicas=1, tolerance=0.2)
    assert change.placement == {0: [(0,), (0,), (1, 2)]}
    assert change.num_adds == 1


def test_a_shard_that_holds_too_many_gives_away_what_costs_least() -> None:
    # Three experts, two slots. What another holds too is dropped; if there is no such, the least loaded moves.
    change = rebalance({0: [(0,), (0, 1), (0,)]}, equal_shards(2, 2), {0: [1, 9, 2]}, extra_replicas=1, threshold=9)
    assert change.moves == (ReplicaMove(0, 1, 0, "drop"),)
    change = rebalance({0: [(0,), (0,), (0,)]}, equal_shards(2, 2), {0: [3, 1, 2]}, threshold=9)
    assert change.placement == {0: [(0,), (1,), (0,)]}


@pytest.mark.parametrize("seed", range(1, 4))
def test_a_strong_skew_is_balanced_with_one_copy_per_shard(seed: int) -> None:
    # Zipf with exponent 1.5: the hottest of 64 takes 3.4 shards' work. From the current placement alone: 1.24.
    loads = {0: np.random.default_rng(seed).permutation((np.arange(64) + 1.0) ** -1.5).tolist()}
    change = rebalance(contiguous_placement([0], 64, range(8)), equal_shards(8, 9), loads, extra_replicas=8)
    assert busiest(change.placement, equal_shards(8, 9), loads)[0] <= 1.05 * sum(loads[0]) / 8


def test_a_lost_shard_is_replaced() -> None:
    placement = contiguous_placement([1, 2], 4, [0, 1])
    change = rebalance(placement, equal_shards(1, 8))
    assert change.placement == {layer: [(0,)] * 4 for layer in (1, 2)}
    assert {move.shard for move in change.moves if move.kind == "drop"} == {1}


def test_two_of_each() -> None:
    change = rebalance(contiguous_placement([0], 4, [0, 1]), equal_shards(2, 4), min_replicas=2)
    assert change.placement == {0: [(0, 1)] * 4}
    # One slot short of two of each: the least loaded stays single.
    shards = [ShardCapacity(0, 1.0, 4), ShardCapacity(1, 1.0, 3)]
    change = rebalance(contiguous_placement([0], 4, [0, 1]), shards, {0: [4, 3, 1, 2]}, min_replicas=2, threshold=9)
    assert sorted(len(holders) for holders in change.placement[0]) == [1, 2, 2, 2]


def test_a_copy_whose_only_free_slot_is_on_the_same_shard_makes_room_elsewhere() -> None:
    # Expert 0 is on shard 0, the only one with a free slot. Expert 1 moves there and leaves its place on shard 1.
    shards = [ShardCapacity(0, 1.0, 3), ShardCapacity(1, 1.0, 1)]
    change = rebalance({0: [(0,), (1,)]}, shards, min_replicas=2, threshold=9)
    assert sum(len(holders) for holders in change.placement[0]) == 3
    shards = [ShardCapacity(0, 1.0, 2), ShardCapacity(1, 1.0, 1), ShardCapacity(2, 1.0, 1)]
    change = rebalance({0: [(0,), (1, 2)]}, shards, min_replicas=2, threshold=9)
    assert [len(holders) for holders in change.placement[0]] == [2, 2]


def test_drain_goes_where_it_costs_least() -> None:
    # Shard 2 holds 4 and 1. 4 goes to shard 1 (2 + 4 = 6 < 5 + 4), then 1 to shard 0 (5 + 1 < 6 + 1).
    placement: Placement = {0: [(0,), (1,), (2,), (2,)]}
    change = drain(placement, equal_shards(3, 4), 2, {0: [5, 2, 4, 1]})
    assert change.placement == {0: [(0,), (1,), (1,), (0,)]}


def test_drain_only_drops_what_others_hold_too() -> None:
    change = drain({0: [(0, 1), (1, 2)]}, equal_shards(3, 2), 1)
    assert change.placement == {0: [(0,), (2,)]}
    assert change.num_adds == 0
    assert drain({0: [(0, 1), (1, 2)]}, equal_shards(3, 2), 1, min_replicas=2).placement == {0: [(0, 2), (0, 2)]}


def test_drain_takes_slots_of_spare_copies() -> None:
    # No free slot, but expert 0 is held twice.
    change = drain({0: [(0, 1), (2,)]}, equal_shards(3, 1), 2)
    assert sorted(change.placement[0]) == [(0,), (1,)]


def test_spread_fills_the_new_shard_only() -> None:
    # 8 equal experts on 2 shards; with a third the mean is 8/3. It takes two (4 + 4 -> 3 + 3 + 2): one more would
    # leave a shard that takes 3, as before.
    placement = contiguous_placement([0], 8, [0, 1])
    change = spread(placement, equal_shards(3, 8), [2])
    assert Counter(change.placement[0]) == {(0,): 3, (1,): 3, (2,): 2}
    assert {move.shard for move in change.moves if move.kind == "add"} == {2}


def test_spread_goes_on_when_the_busiest_cannot_be_helped() -> None:
    # Shard 0 has one hot expert alone; shard 1 still gives one of its two.
    change = spread({0: [(0,), (1,), (1,)]}, equal_shards(3, 3), [2], {0: [100, 5, 4]})
    assert change.num_adds == 1
    assert change.placement[0][0] == (0,)


def test_one_expert_by_hand() -> None:
    placement: Placement = {3: [(0,), (1,)]}
    shards = equal_shards(2, 2)
    assert replicate(placement, shards, 3, 0, 1).moves == (ReplicaMove(3, 0, 1, "add"),)
    assert move(placement, shards, 3, 0, 0, 1).placement == {3: [(1,), (1,)]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 0, 0), "shard 0 already holds expert 0 of layer 3"),
        ((3, 0, 7), r"shard 7 is not one of \[0, 1\]"),
        ((4, 0, 1), r"layer 4 has no routed experts; the MoE layers are \[3\]"),
        ((3, 2, 1), "expert 2 of layer 3; name one from 0 to 1"),
        ((3, 0, 1), "shard 1 holds 1 experts and has 1 slots; it lacks 1 for another"),
    ],
)
def test_replicas_that_cannot_be(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(DeploymentError, match=message):
        replicate({3: [(0,), (1,)]}, equal_shards(2, 1), *arguments)


def test_a_move_from_where_it_is_not() -> None:
    with pytest.raises(DeploymentError, match=r"shard 1 does not hold expert 0 of layer 3; move it from one of \[0\]"):
        move({3: [(0,), (1,)]}, equal_shards(2, 2), 3, 0, 1, 0)


def test_too_few_slots_says_how_many() -> None:
    message = r"2 layers of 4 experts need 8 slots, 2 more.*shard 0 has 3, shard 1 has 3.*raise each by 1"
    with pytest.raises(DeploymentError, match=message):
        rebalance(contiguous_placement([0, 1], 4, [0, 1]), equal_shards(2, 3))
    with pytest.raises(DeploymentError, match=r"need 8 slots, 3 more than there are \(shard 0 has 5\)"):
        drain(contiguous_placement([0, 1], 4, [0, 1]), equal_shards(2, 5), 1)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], "no expert shards"),
        ([ShardCapacity(0, 1, 4), ShardCapacity(0, 1, 4)], "shard 0 is named twice"),
        ([ShardCapacity(0, 0, 4)], "shard 0 has speed 0; use a positive number"),
        ([ShardCapacity(0, 1, -1)], "shard 0 has -1 slots"),
    ],
)
def test_shards_that_are_none(shards: list[ShardCapacity], message: str) -> None:
    with pytest.raises(DeploymentError, match=message):
        rebalance({0: [(0,)]}, shards)


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        ({1: [1, 1]}, r"no loads for layer 0; give one row for each of \[0\]"),
        ({0: [1]}, r"shape \(1,\) for layer 0; give one number for each of 2 experts"),
        ({0: [1, -3]}, r"load -3.0 of layer 0, expert 1"),
    ],
)
def test_loads_that_do_not_fit(loads: dict[int, list[float]], message: str) -> None:
    with pytest.raises(DeploymentError, match=message):
        rebalance({0: [(0,), (0,)]}, equal_shards(1, 2), loads)


def test_policies_that_make_no_sense() -> None:
    placement: Placement = {0: [(0,)]}
    with pytest.raises(DeploymentError, match="0 replicas of each expert; use at least 1"):
        rebalance(placement, equal_shards(1, 1), min_replicas=0)
    with pytest.raises(DeploymentError, match=r"a threshold of -0.1; use a part of the time"):
        rebalance(placement, equal_shards(1, 1), threshold=-0.1)
    with pytest.raises(DeploymentError, match="shard 0 is the only one; add another"):
        drain(placement, equal_shards(1, 1), 0)
    with pytest.raises(DeploymentError, match=r"layers with \[1, 2\] experts"):
        rebalance({0: [(0,)], 1: [(0,), (0,)]}, equal_shards(1, 9))


@st.composite
def deployments(draw: st.DrawFn) -> tuple[Placement, list[ShardCapacity], dict[int, list[float]]]:
    """A placement that is within its slots, uneven shards with slots to spare, and loads."""
    num_shards = draw(st.integers(2, 5))
    num_experts, num_layers = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    holders = st.sets(st.integers(0, num_shards - 1), min_size=1, max_size=num_shards).map(lambda s: tuple(sorted(s)))
    expert_list = st.lists(holders, min_size=num_experts, max_size=num_experts)
    placement = {layer: draw(expert_list) for layer in range(num_layers)}
    used = Counter(shard for experts in placement.values() for holders in experts for shard in holders)
    shards = [
        ShardCapacity(id, draw(st.sampled_from([0.5, 1.0, 1.0, 2.0])), used[id] + draw(st.integers(0, 4)))
        for id in range(num_shards)
    ]
    layer_loads = st.lists(st.integers(0, 100).map(float), min_size=num_experts, max_size=num_experts)
    return placement, shards, {layer: draw(layer_loads) for layer in placement}


def check(before: Placement, change: PlacementChange, shards: list[ShardCapacity]) -> None:
    """What holds for every change: nothing lost, nothing doubled, slots kept, and the moves lead from old to new."""
    ids = {shard.id for shard in shards}
    used = Counter(shard for experts in change.placement.values() for holders in experts for shard in holders)
    assert all(used[shard.id] <= shard.slots for shard in shards)
    state = {layer: [set(holders) for holders in experts] for layer, experts in before.items()}
    for step in change.moves:
        holders = state[step.layer][step.expert]
        assert (step.shard in holders) == (step.kind == "drop")
        holders.symmetric_difference_update({step.shard})
    for layer, experts in change.placement.items():
        for expert, shards_of_expert in enumerate(experts):
            assert len(shards_of_expert) >= 1
            assert list(shards_of_expert) == sorted(set(shards_of_expert))
            assert set(shards_of_expert) <= ids
            assert state[layer][expert] == set(shards_of_expert)


@settings(deadline=None)
@given(deployments(), st.integers(0, 6), st.integers(1, 3), st.sampled_from([0.0, 0.1, 0.5]))
def test_rebalance_keeps_its_promises(
    deployment: tuple[Placement, list[ShardCapacity], dict[int, list[float]]],
    extra_replicas: int,
    min_replicas: int,
    threshold: float,
) -> None:
    placement, shards, loads = deployment
    policy = {"extra_replicas": extra_replicas, "min_replicas": min_replicas, "threshold": threshold}
    change = rebalance(placement, shards, loads, **policy)  # type: ignore[arg-type]
    check(placement, change, shards)
    num_experts, copies = len(placement[0]), min(min_replicas, len(shards))
    most = num_experts + max(extra_replicas, num_experts * (copies - 1))
    assert all(sum(map(len, experts)) <= most for experts in change.placement.values())
    assert rebalance(placement, shards, loads, **policy) == change  # type: ignore[arg-type]


@settings(deadline=None)
@given(deployments(), st.integers(0, 6))
def test_a_rebalanced_placement_is_left_alone(
    deployment: tuple[Placement, list[ShardCapacity], dict[int, list[float]]], extra_replicas: int
) -> None:
    placement, shards, loads = deployment
    # What the second call may find better than the first did is bounded by its own threshold: one search is not two.
    once = rebalance(placement, shards, loads, extra_replicas=extra_replicas)
    twice = rebalance(once.placement, shards, loads, extra_replicas=extra_replicas)
    even = {layer: sum(row) / sum(shard.speed for shard in shards) for layer, row in loads.items()}
    peaks = busiest(once.placement, shards, loads)
    balanced = {layer for layer in placement if peaks[layer] <= 1.1 * even[layer]}
    assert not {step.layer for step in twice.moves} & balanced


@settings(deadline=None)
@given(deployments())
def test_rebalance_never_makes_the_busiest_busier(
    deployment: tuple[Placement, list[ShardCapacity], dict[int, list[float]]],
) -> None:
    placement, shards, loads = deployment
    before = busiest(placement, shards, loads)
    after = busiest(rebalance(placement, shards, loads, extra_replicas=1000).placement, shards, loads)
    assert all(after[layer] <= before[layer] * (1 + 1e-9) for layer in placement)


@settings(deadline=None)
@given(deployments(), st.integers(0, 4), st.integers(1, 2))
def test_a_drained_shard_holds_nothing(
    deployment: tuple[Placement, list[ShardCapacity], dict[int, list[float]]], shard: int, min_replicas: int
) -> None:
    placement, shards, loads = deployment
    assume(shard < len(shards))
    others = [known for known in shards if known.id != shard]
    needed = len(placement) * len(placement[0])
    if sum(known.slots for known in others) < needed:
        with pytest.raises(DeploymentError, match=rf"need {needed} slots"):
            drain(placement, shards, shard, loads)
        return
    check(placement, drain(placement, shards, shard, loads, min_replicas=min_replicas), others)


@settings(deadline=None)
@given(deployments(), st.floats(0.5, 2))
def test_spread_gives_to_the_new_shard_only(
    deployment: tuple[Placement, list[ShardCapacity], dict[int, list[float]]], speed: float
) -> None:
    placement, shards, loads = deployment
    grown = [*shards, ShardCapacity(9, speed, 5)]
    change = spread(placement, grown, [9], loads)
    check(placement, change, grown)
    assert {step.shard for step in change.moves if step.kind == "add"} <= {9}
    before, after = busiest(placement, shards, loads), busiest(change.placement, grown, loads)
    assert all(after[layer] <= before[layer] * (1 + 1e-9) for layer in placement)


@pytest.mark.parametrize("min_replicas", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_copies_are_there_when_slots_allow(seed: int, min_replicas: int) -> None:
    # Exactly as many slots as copies are wanted.
    rng = np.random.default_rng(seed)
    num_experts, num_shards = 12, 4
    placement: Placement = {
        layer: [(int(shard),) for shard in rng.integers(0, num_shards, num_experts)] for layer in range(2)
    }
    shards = equal_shards(num_shards, 2 * num_experts * min_replicas // num_shards)
    change = rebalance(placement, shards, min_replicas=min_replicas)
    assert all(len(holders) == min_replicas for experts in change.placement.values() for holders in experts)
