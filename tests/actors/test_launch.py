"""What members ask Ray for."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek_ray.actors.launch import member_gpus, member_threads
from deepseek_ray.config.engine import DeploymentConfig, EngineConfig


def config(**fields: Any) -> DeploymentConfig:
    return DeploymentConfig(model_dir="m", engine=EngineConfig(deterministic=False), **fields)


@pytest.mark.parametrize(
    ("fields", "attention", "experts"),
    [
        ({}, 0, 0),
        ({"attention_device": "cuda"}, 1.0, 0),
        ({"expert_device": "cuda", "gpus_per_member": 0.5}, 0, 0.5),
        ({"attention_device": "cuda", "expert_device": "cuda", "gpus_per_member": 0.25}, 0.25, 0.25),
    ],
)
def test_only_members_on_a_gpu_ask_for_one(fields: dict[str, Any], attention: float, experts: float) -> None:
    settings = config(**fields)
    assert member_gpus(settings, "attention_worker") == attention
    assert member_gpus(settings, "expert_shard") == experts


def test_both_sides_may_use_all_threads_since_they_take_turns() -> None:
    settings = config(threads=8, attention_workers=2, expert_shards=4)
    assert member_threads(settings, "attention_worker") == 4
    assert member_threads(settings, "expert_shard") == 2
