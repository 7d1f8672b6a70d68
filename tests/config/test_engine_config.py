from __future__ import annotations

from typing import Any

import pytest

from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kv_copies": True}, "attention_workers is 1; raise attention_workers to 2 or more"),
        (
            {"kv_copies": True, "attention_workers": 2, "engine": {"prefix_caching": False}},
            "set engine.prefix_caching to true",
        ),
        ({"expert_replicas": 3}, "raise expert_shards"),
    ],
)
def test_what_cannot_be_names_the_remedy(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DeploymentConfig.parse({"model_dir": "m", **values})


def test_copies_between_two_workers() -> None:
    config = DeploymentConfig(model_dir="m", attention_workers=2, kv_copies=True)
    assert config.engine.prefix_caching
    assert not DeploymentConfig(model_dir="m").kv_copies


@pytest.mark.parametrize("device", ["attention_device", "expert_device"])
def test_a_gpu_and_determinism_exclude_each_other(device: str) -> None:
    with pytest.raises(ConfigError, match=r"exist for the CPU only; set engine.deterministic to false"):
        DeploymentConfig.parse({"model_dir": "m", device: "cuda"}, "test")
    fast = {"deterministic": False}
    config = DeploymentConfig.parse({"model_dir": "m", device: "cuda", "engine": fast}, "test")
    assert getattr(config, device) == "cuda"
