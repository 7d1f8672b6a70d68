"""Speeds of shards from what they measured."""

from __future__ import annotations

import pytest

from deepseek_ray.control.speeds import EXTREME, relative_speeds


def speeds(**seconds: float) -> dict[int, float]:
    return relative_speeds(
        {f"expert_shard/{name[1:]}": {"seconds_per_expert": value} for name, value in seconds.items()}
    )


def test_the_median_is_one_and_half_the_time_is_twice_the_speed() -> None:
    assert speeds(s0=2.0, s1=1.0, s2=2.0, s3=4.0) == {0: 1.0, 1: 2.0, 2: 1.0, 3: 0.5}


def test_small_differences_do_not_count() -> None:
    assert speeds(s0=1.0, s1=1.2, s2=0.85) == {0: 1.0, 1: 1.0, 2: 1.0}


def test_nobody_is_beyond_the_extremes() -> None:
    found = speeds(s0=1.0, s1=1000.0, s2=1.0, s3=0.001)
    assert (found[1], found[3]) == (1 / EXTREME, EXTREME)


def test_who_has_not_measured_is_not_named_and_others_are_not_shards() -> None:
    figures = {
        "expert_shard/0": {"seconds_per_expert": 0.0},
        "expert_shard/1": {"calls": 3.0},
        "attention_worker/0": {"seconds_per_expert": 1.0},
        "router/0": {"in_flight": 1.0},
    }
    assert relative_speeds(figures) == {}


@pytest.mark.parametrize("count", [1, 2])
def test_few_shards(count: int) -> None:
    assert set(speeds(**{f"s{id}": 0.5 for id in range(count)}).values()) == {1.0}
