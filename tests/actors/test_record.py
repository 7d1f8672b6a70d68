"""What deployments keep in the cluster's key-value store."""

from __future__ import annotations

import msgspec
import pytest

from deepseek_ray.actors.record import (
    DeploymentDescription,
    DeploymentRecord,
    delete_record,
    newest_life,
    read_plan,
    take_life,
    write_plan,
)
from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.control.plan import add_shards, initial_plan

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

NAME = "record-test"
CONFIG = DeploymentConfig(name=NAME, model_dir="m")
PLAN = initial_plan((1,), 8, CONFIG)


def record(instance: str) -> DeploymentRecord:
    description = DeploymentDescription(
        name=NAME,
        served_model_name="m",
        model_dir="m",
        max_model_len=1,
        vocab_size=1,
        created=0,
        request_timeout_seconds=1.0,
    )
    return DeploymentRecord(
        instance=instance,
        secret=b"s" * 32,
        config_json=CONFIG.model_dump_json(),
        description=description,
        moe_layers=(1,),
        num_experts=8,
    )


def test_a_plan_is_kept_until_a_later_router_writes_one() -> None:
    first = record("one")
    try:
        assert read_plan(first) is None
        assert write_plan(first, 2, PLAN)
        assert read_plan(first) == PLAN
        assert write_plan(first, 3, add_shards(PLAN, 1))
        assert not write_plan(first, 2, PLAN), "a router that was replaced commands no more"
        assert read_plan(first) == add_shards(PLAN, 1)
    finally:
        delete_record(NAME)
    assert read_plan(first) is None


def test_what_an_earlier_deployment_of_the_name_left_does_not_count() -> None:
    try:
        assert write_plan(record("earlier"), 99, PLAN)
        later = record("later")
        assert read_plan(later) is None
        assert write_plan(later, 1, add_shards(PLAN, 1))
        assert read_plan(later) == add_shards(PLAN, 1)
        assert read_plan(record("earlier")) is None
    finally:
        delete_record(NAME)


def test_lives_are_counted_until_the_deployment_ends() -> None:
    try:
        assert newest_life(NAME, "expert_shard", 0) == 0
        assert [take_life(NAME, "expert_shard", 0) for _ in range(3)] == [1, 2, 3]
        assert newest_life(NAME, "expert_shard", 0) == 3
        assert newest_life(NAME, "expert_shard", 1) == 0
    finally:
        delete_record(NAME)
    assert newest_life(NAME, "expert_shard", 0) == 0


def test_records_survive_their_encoding() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(record("x")), type=DeploymentRecord) == record("x")
