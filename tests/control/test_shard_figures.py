"""What shards can take, from what they say of themselves."""

from __future__ import annotations

import pytest

from deepseek_ray.control.shard_figures import (
    EXPERTS_SHARE,
    EXTREME,
    ShardFigures,
    capacities,
    relative_speeds,
    slots,
)
from deepseek_ray.expert_parallel.replicas import ShardCapacity

GIB = float(1 << 30)


def speeds(*seconds: float) -> dict[int, float]:
    return relative_speeds({shard: ShardFigures(seconds_per_expert=own) for shard, own in enumerate(seconds)})


def test_the_median_is_one_and_half_the_time_is_twice_the_speed() -> None:
    assert speeds(2.0, 1.0, 2.0, 4.0) == {0: 1.0, 1: 2.0, 2: 1.0, 3: 0.5}


def test_small_differences_do_not_count() -> None:
    assert speeds(1.0, 1.2, 0.85) == {0: 1.0, 1: 1.0, 2: 1.0}


def test_nobody_is_beyond_the_extremes() -> None:
    found = speeds(1.0, 1000.0, 1.0, 0.001)
    assert (found[1], found[3]) == (1 / EXTREME, EXTREME)


def test_who_has_not_measured_is_not_named() -> None:
    assert speeds(0.0, 0.0) == {}
    assert set(speeds(0.0, 3.0)) == {1}
    assert slots({0: ShardFigures(), 1: ShardFigures(memory_bytes=GIB), 2: ShardFigures(expert_bytes=1.0)}) == {}


@pytest.mark.parametrize("count", [1, 2])
def test_few_shards(count: int) -> None:
    assert set(speeds(*[0.5] * count).values()) == {1.0}


def test_shards_of_one_machine_share_its_memory() -> None:
    def own(memory: str, gib: float) -> ShardFigures:
        return ShardFigures(expert_bytes=GIB / 4, memory_bytes=gib * GIB, memory=memory)

    found = slots({0: own("a", 16), 1: own("a", 16), 2: own("b", 16), 3: own("gpu", 8)})
    assert found == {0: 32 * EXPERTS_SHARE, 1: 32 * EXPERTS_SHARE, 2: 64 * EXPERTS_SHARE, 3: 32 * EXPERTS_SHARE}


def test_a_shard_has_room_for_what_it_holds_and_for_everything_until_it_says_otherwise() -> None:
    placement = {1: [(0,), (0,), (1,)], 2: [(0,), (0, 1), (1,)]}
    small = ShardFigures(expert_bytes=GIB, memory_bytes=2 * GIB, memory="a")
    assert capacities(placement, [0, 1, 2], {0: small}) == [
        ShardCapacity(0, 1.0, 4),
        ShardCapacity(1, 1.0, 6),
        ShardCapacity(2, 1.0, 6),
    ]
