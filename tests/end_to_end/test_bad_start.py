"""A deployment that cannot start says why in one sentence and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from deepseek_ray.actors.offline import ActorsBackend
from deepseek_ray.actors.record import NAMESPACE, list_deployments
from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.errors import CheckpointError, DeepSeekRayError, DeploymentError
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.models.test_expert_store import write_nan_checkpoint

pytestmark = pytest.mark.cluster


def refused(config: DeploymentConfig) -> DeepSeekRayError:
    with pytest.raises(DeepSeekRayError) as caught:
        ActorsBackend(config)
    assert not list_deployments()
    assert not [row for row in ray.util.list_named_actors(all_namespaces=True) if row["namespace"] == NAMESPACE]
    return caught.value


def test_nan_in_the_weights_of_a_shard(ray_cluster: None, tmp_path: Path) -> None:
    error = refused(DeploymentConfig(model_dir=str(write_nan_checkpoint(tmp_path)), dtype="float32"))
    assert isinstance(error, DeploymentError)
    assert "experts.3.up_proj.weight" in str(error)


def test_more_shards_than_experts(ray_cluster: None, tmp_path: Path) -> None:
    model = write_random_checkpoint(tmp_path / "model", tiny_config())
    error = refused(DeploymentConfig(model_dir=str(model), expert_shards=9))
    assert "9 expert shards for 8 routed experts" in str(error)


def test_a_missing_tensor_is_found_before_any_actor_starts(ray_cluster: None, tmp_path: Path) -> None:
    model = write_random_checkpoint(tmp_path / "model", tiny_config())
    write_random_checkpoint(tmp_path / "other", tiny_config(num_hidden_layers=2))
    (tmp_path / "other" / "config.json").write_bytes((model / "config.json").read_bytes())
    error = refused(DeploymentConfig(model_dir=str(tmp_path / "other")))
    assert isinstance(error, CheckpointError)
    assert "model.layers.2" in str(error)
