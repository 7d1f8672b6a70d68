"""The autoscaling policy, driven by observations and a clock made of numbers."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek_ray.config.engine import AutoscaleConfig
from deepseek_ray.control.autoscale import AutoscalePolicy, Decision, Observation, Observer
from deepseek_ray.errors import ConfigError


def policy(**changes: Any) -> AutoscalePolicy:
    limits = {"min_workers": 1, "max_workers": 4, "min_shards": 1, "max_shards": 4}
    times = {"up_seconds": 5, "down_seconds": 60, "rest_seconds": 30}
    return AutoscalePolicy(AutoscaleConfig.parse({**limits, **times, **changes}, "test"))


def seen(**changes: Any) -> Observation:
    calm = {"workers": 2, "shards": 2, "cache_use": 0.6, "waiting": 0, "shard_busy": 0.6}
    return Observation(**{**calm, **changes})


def decisions(policy: AutoscalePolicy, observation: Observation, seconds: range) -> list[tuple[int, Decision]]:
    found = ((now, policy.decide(observation, float(now))) for now in seconds)
    return [(now, decision) for now, decision in found if decision is not None]


def test_a_calm_deployment_is_left_alone() -> None:
    assert decisions(policy(), seen(), range(1000)) == []


@pytest.mark.parametrize("crowded", [{"waiting": 3}, {"cache_use": 0.9}], ids=["queue", "cache"])
def test_a_worker_is_added_when_the_need_lasts_and_not_again_before_the_rest_is_over(crowded: dict) -> None:
    found = decisions(policy(), seen(**crowded), range(40))
    assert found == [(5, Decision(workers=3)), (35, Decision(workers=3))]


def test_a_need_that_breaks_off_begins_anew() -> None:
    state = policy()
    assert decisions(state, seen(waiting=1), range(4)) == []
    assert decisions(state, seen(), range(4, 5)) == []
    assert decisions(state, seen(waiting=1), range(5, 9)) == []


def test_shards_follow_the_busiest() -> None:
    assert decisions(policy(), seen(shard_busy=0.95), range(10)) == [(5, Decision(shards=3))]


def test_fewer_only_when_the_others_would_still_have_room() -> None:
    # One of two workers would use 2 x 0.2 = 0.4 of its cache; one of two shards would compute 2 x 0.15 = 0.3.
    found = decisions(policy(), seen(cache_use=0.2, shard_busy=0.15), range(70))
    assert found == [(60, Decision(workers=1, shards=1))]
    assert decisions(policy(), seen(cache_use=0.3, shard_busy=0.25), range(1000)) == []


def test_limits_hold_and_are_enforced_at_once() -> None:
    assert decisions(policy(), seen(workers=4, shards=4, waiting=9, shard_busy=1.0), range(100)) == []
    assert decisions(policy(), seen(workers=1, shards=1, cache_use=0.0, shard_busy=0.0), range(100)) == []
    assert decisions(policy(min_shards=3), seen(), range(1)) == [(0, Decision(shards=3))]
    with pytest.raises(ConfigError, match="min_shards is 5 and max_shards 4"):
        policy(min_shards=5)


def test_observations_come_from_reports() -> None:
    observer = Observer()
    stats = {
        "attention_worker/0": {"num_kv_blocks_used": 30.0, "num_kv_blocks_total": 100.0, "num_waiting": 2.0},
        "attention_worker/1": {"num_kv_blocks_used": 10.0, "num_kv_blocks_total": 100.0, "num_waiting": 1.0},
        "expert_shard/0": {"compute_seconds": 10.0},
        "expert_shard/1": {"compute_seconds": 90.0},
    }
    assert observer.observe(stats, 2, 2, now=5.0) is None
    later = {**stats, "expert_shard/0": {"compute_seconds": 11.0}, "expert_shard/1": {"compute_seconds": 0.5}}
    # Shard 0 computed 1 s of 2; shard 1 is a new process whose counter began anew.
    assert observer.observe(later, 2, 2, now=7.0) == Observation(
        workers=2, shards=2, cache_use=0.2, waiting=3, shard_busy=0.5
    )
