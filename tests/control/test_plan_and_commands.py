"""Plans and what is asked of them: values in, values out."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.control import commands
from deepseek_ray.control.plan import Plan, initial_members, initial_plan, take_over, with_placement, without_member
from deepseek_ray.control.shard_figures import EXPERTS_SHARE, ShardFigures
from deepseek_ray.errors import ConfigError, DeploymentError
from deepseek_ray.expert_parallel.placement import experts_of_shard

NO_LOADS = {1: np.zeros(8), 2: np.zeros(8)}


def plan(**config: Any) -> Plan:
    return initial_plan((1, 2), 8, DeploymentConfig(model_dir="m", **config))


def counts(plan: Plan) -> dict[int, list[int]]:
    """Shard -> number of experts of each layer."""
    return {
        shard: [len(experts_of_shard(plan.placement, shard).get(layer, [])) for layer in plan.placement]
        for shard in plan.shards
    }


def test_a_plan_begins_with_what_the_configuration_says() -> None:
    first = plan(attention_workers=2, expert_shards=3, standby_shards=1)
    assert first.members == [
        ("attention_worker", 0),
        ("attention_worker", 1),
        ("expert_shard", 0),
        ("expert_shard", 1),
        ("expert_shard", 2),
        ("expert_shard", 3),
    ]
    assert counts(first) == {0: [3, 3], 1: [3, 3], 2: [2, 2]}
    with pytest.raises(DeploymentError, match="9 expert shards for 8 routed experts"):
        plan(expert_shards=9)


def test_the_first_members_are_known_without_a_plan() -> None:
    config = DeploymentConfig(model_dir="m", attention_workers=2, expert_shards=3, standby_shards=1)
    assert initial_members(config) == initial_plan((1, 2), 8, config).members


def test_replicas_from_the_start_and_ever_after() -> None:
    first = plan(expert_shards=3, expert_replicas=2)
    assert all(len(shards) == 2 for experts in first.placement.values() for shards in experts)
    for layer in range(2):
        assert max(held[layer] for held in counts(first).values()) <= 1.2 * 16 / 3, (
            "even but for what is not worth a move"
        )
    smaller = commands.scale(first, NO_LOADS, shards=2)
    assert all(len(shards) == 2 for experts in smaller.placement.values() for shards in experts)
    alone = commands.scale(smaller, NO_LOADS, shards=1)
    assert all(shards == (0,) for experts in alone.placement.values() for shards in experts)
    back = commands.rebalance(commands.scale(alone, NO_LOADS, shards=2), NO_LOADS)
    assert all(len(shards) == 2 for experts in back.placement.values() for shards in experts)
    once = commands.rebalance(back, NO_LOADS, min_replicas=1)
    assert (once.min_replicas, once.placement == back.placement) == (1, False)
    with pytest.raises(ConfigError, match="expert_replicas is 3 and expert_shards 2"):
        DeploymentConfig.parse({"model_dir": "m", "expert_replicas": 3}, "test")


def test_plans_survive_the_key_value_store() -> None:
    first = plan(standby_shards=2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(first), type=Plan) == first


def test_scaling_shards_up_takes_from_the_busiest_and_down_gives_back() -> None:
    grown = commands.scale(plan(), NO_LOADS, shards=4)
    assert grown.shards == (0, 1, 2, 3)
    assert counts(grown) == {0: [2, 2], 1: [2, 2], 2: [2, 2], 3: [2, 2]}
    shrunk = commands.scale(grown, NO_LOADS, shards=2)
    assert shrunk.shards == (0, 1)
    assert shrunk.leaving_shards == (3, 2)
    assert counts(shrunk) == {0: [4, 4], 1: [4, 4]}
    again = commands.scale(shrunk, NO_LOADS, shards=3)
    assert again.shards == (0, 1, 4), "an id is never used twice"


def test_scaling_workers() -> None:
    grown = commands.scale(plan(), NO_LOADS, workers=3)
    assert grown.workers == (0, 1, 2)
    shrunk = commands.scale(grown, NO_LOADS, workers=1)
    assert (shrunk.workers, shrunk.leaving_workers) == ((0,), (2, 1))
    gone = without_member(shrunk, "attention_worker", 2)
    assert gone.leaving_workers == (1,)
    assert gone.revision > shrunk.revision > grown.revision


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"workers": 0}, "0 attention workers; this deployment can have 1 to 1024"),
        ({"shards": 9}, "9 expert shards; this deployment can have 1 to 8"),
    ],
)
def test_impossible_numbers_are_refused(wish: dict[str, int], words: str) -> None:
    with pytest.raises(DeploymentError, match=words):
        commands.scale(plan(), NO_LOADS, **wish)


@pytest.mark.parametrize(
    ("role", "id", "words"),
    [
        ("attention_worker", 0, "attention worker 0 is the only one; add another"),
        ("attention_worker", 7, "there is no attention worker 7; there are 0"),
        ("expert_shard", 7, "there is no expert shard 7; there are 0, 1"),
        ("router", 0, "cannot drain a 'router'"),
    ],
)
def test_what_cannot_be_drained(role: str, id: int, words: str) -> None:
    with pytest.raises(DeploymentError, match=words):
        commands.drain(plan(), role, id, NO_LOADS)


def test_draining_twice_is_draining_once() -> None:
    once = commands.drain(plan(expert_shards=3), "expert_shard", 1, NO_LOADS)
    assert commands.drain(once, "expert_shard", 1, NO_LOADS) == once
    assert not experts_of_shard(once.placement, 1)
    two = commands.scale(plan(), NO_LOADS, workers=2)
    leaving = commands.drain(two, "attention_worker", 0, NO_LOADS)
    assert commands.drain(leaving, "attention_worker", 0, NO_LOADS) == leaving


def test_a_standby_can_be_drained() -> None:
    without = commands.drain(plan(standby_shards=1), "expert_shard", 2, NO_LOADS)
    assert (without.standbys, without.leaving_shards) == ((), (2,))


def test_rebalancing_follows_the_load() -> None:
    hot = {layer: np.array([90.0, 90, 1, 1, 1, 1, 1, 1]) for layer in (1, 2)}  # both hot ones are on shard 0
    moved = commands.rebalance(plan(), hot)
    for layer in (1, 2):
        first, second = moved.placement[layer][:2]
        assert first != second, "the two hot experts are on different shards"
    assert commands.rebalance(moved, hot) == moved, "a balanced placement is left alone"
    twice = commands.rebalance(plan(), hot, min_replicas=2)
    assert all(len(shards) == 2 for experts in twice.placement.values() for shards in experts)


def test_a_slow_shard_gets_less_to_do() -> None:
    even = {layer: np.ones(8) for layer in plan().placement}
    slow = {0: ShardFigures(seconds_per_expert=1.0), 1: ShardFigures(seconds_per_expert=3.0)}
    moved = commands.rebalance(plan(), even, figures=slow)
    for experts in moved.placement.values():
        assert sum(shards == (0,) for shards in experts) == 6, "three times the speed, three times the experts"
    alike = {shard: ShardFigures(seconds_per_expert=2.0) for shard in (0, 1)}
    assert commands.rebalance(plan(), even, figures=alike) == plan()


def test_a_shard_takes_no_more_than_its_memory_holds() -> None:
    """Of 16 experts each of two shards holds 8; one has room for two more."""

    def own(slots: int) -> ShardFigures:
        return ShardFigures(expert_bytes=1.0, memory_bytes=(slots + 0.5) / EXPERTS_SHARE, memory=str(slots))

    figures = {0: own(100), 1: own(10)}
    twice = commands.rebalance(plan(), NO_LOADS, min_replicas=2, figures=figures)
    assert {shard: sum(layers) for shard, layers in counts(twice).items()} == {0: 16, 1: 10}
    with pytest.raises(DeploymentError, match="shard 1 holds 10 experts and has 10 slots"):
        commands.replicate(twice, NO_LOADS, *_held_by_one(twice), 1, figures=figures)


def _held_by_one(plan: Plan) -> tuple[int, int]:
    """A layer and an expert of it that only shard 0 holds."""
    return next(
        (layer, e) for layer, experts in plan.placement.items() for e, shards in enumerate(experts) if shards == (0,)
    )


def test_single_experts_are_moved_and_replicated() -> None:
    both = commands.replicate(plan(), NO_LOADS, 1, 0, 1)
    assert both.placement[1][0] == (0, 1)
    moved = commands.move(plan(), NO_LOADS, 1, 0, 0, 1)
    assert moved.placement[1][0] == (1,)
    with pytest.raises(DeploymentError, match="shard 1 does not hold expert 0 of layer 1"):
        commands.move(plan(), NO_LOADS, 1, 0, 1, 0)


def test_a_standby_takes_over_and_the_lost_one_becomes_the_standby() -> None:
    first = plan(standby_shards=2)
    second = take_over(first, 0)
    assert (second.shards, second.standbys) == ((1, 2), (3, 0))
    assert experts_of_shard(second.placement, 2) == experts_of_shard(first.placement, 0)
    assert take_over(second, 0) is second, "it holds nothing any more"
    assert take_over(plan(), 0).revision == plan().revision, "there is no standby"


def test_the_same_placement_is_no_change() -> None:
    first = plan()
    assert with_placement(first, dict(first.placement)) is first
