"""What the Serve applications are configured with; they run in `tests/end_to_end`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._common.utils import import_attr
from ray.serve.schema import ServeDeploySchema

from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.config.serving import ServingConfig, served_name
from deepseek_ray.errors import CheckpointError, ConfigError
from deepseek_ray.serving.app import build_app
from deepseek_ray.serving.auth import ApiKeys
from serve_apps import embeddings
from serve_apps.openai import environment_values, read_config

SERVE_APPS = Path(__file__).resolve().parents[2] / "serve_apps"


def test_arguments_are_the_fields_of_the_configuration() -> None:
    arguments = {"model_dir": "/m", "expert_shards": "4", "max_model_len": "512", "dtype": "float32", "max_replicas": 2}
    config = read_config(arguments, {})
    (model,) = config.models
    assert (model.model_dir, model.expert_shards, model.dtype) == ("/m", 4, "float32")
    assert model.engine.max_model_len == 512
    assert config.api.max_replicas == 2
    with pytest.raises(ConfigError, match="unknown key 'expert_shard'; did you mean 'expert_shards'"):
        read_config({"model_dir": "/m", "expert_shard": "4"}, {})
    with pytest.raises(ConfigError, match="model_dir"):
        read_config({}, {})


def test_the_environment_gives_fields_and_nothing_else() -> None:
    environment = {
        "DEEPSEEK_RAY_MODEL_DIR": "/m",
        "DEEPSEEK_RAY_MAX_NUM_SEQS": "8",
        "DEEPSEEK_RAY_TEST_DATA": "/data",
        "DEEPSEEK_RAY_ENGINE": "{}",
        "DEEPSEEK_RAY_API_KEY": "secret",
        "HOME": "/root",
    }
    assert environment_values(environment) == {"model_dir": "/m", "max_num_seqs": "8"}
    (model,) = read_config({"max_num_seqs": "4"}, environment).models
    assert (model.model_dir, model.engine.max_num_seqs) == ("/m", 4)


def test_several_models_come_from_a_file_or_from_arguments(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "models": [{"name": "a", "model_dir": "/m/a"}, {"name": "b", "model_dir": "/m/b", "expert_shards": 4}],
        "api": {"min_replicas": 2},
    }
    file = tmp_path / "models.yaml"
    file.write_text(yaml.safe_dump(values))
    config = read_config({"config": str(file)}, {})
    assert config == read_config(values, {})
    assert [served_name(model.model_dir, model.served_model_name) for model in config.models] == ["a", "b"]
    assert config.api.min_replicas == 2
    with pytest.raises(ConfigError, match="dtype"):
        read_config({"config": str(file), "dtype": "float32"}, {})
    with pytest.raises(ConfigError, match=r"unknown key 'model'; did you mean 'models'"):
        read_config({"models": values["models"], "model": []}, {})


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "models"),
        ([{"model_dir": "/m/a"}, {"model_dir": "/m/b"}], "'default' twice; give each a name of its own"),
        (
            [{"name": "a", "model_dir": "/m/a"}, {"name": "b", "model_dir": "/n/a"}],
            "'a' twice; give each a served_model_name of its own",
        ),
    ],
)
def test_models_must_be_told_apart(models: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServingConfig.parse({"models": models})


def test_more_replicas_at_least_than_at_most_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_replicas is 5 and max_replicas 4; raise max_replicas"):
        ServingConfig.parse({"models": [{"model_dir": "/m"}], "api": {"min_replicas": 5}})


def test_a_directory_that_cannot_be_served_fails_before_anything_starts() -> None:
    config = ServingConfig(models=(DeploymentConfig(model_dir="/nowhere"),))
    with pytest.raises(CheckpointError, match="/nowhere is not a directory"):
        build_app(config, ApiKeys())


@pytest.mark.parametrize("name", ["openai", "embeddings"])
def test_files_for_serve_deploy_are_what_serve_and_the_applications_take(name: str) -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load((SERVE_APPS / f"{name}.yaml").read_text()))
    (application,) = schema.applications
    assert application.import_path == f"serve_apps.{name}:app"
    build = import_attr(application.import_path)
    with pytest.raises(CheckpointError, match=r"/models/.* is not a directory"):  # nothing but the models is missing
        build(application.args)


def test_arguments_of_the_embeddings_are_the_fields_of_their_configuration() -> None:
    config = embeddings.read_config({"model_dir": "/m", "max_batch": "8", "max_replicas": "2"})
    assert (config.max_batch, config.api.max_replicas) == (8, 2)
    assert config == embeddings.read_config({"model_dir": "/m", "max_batch": 8, "api": {"max_replicas": 2}})
    with pytest.raises(ConfigError, match="min_batch is 9 and max_batch 8; lower min_batch"):
        embeddings.read_config({"model_dir": "/m", "max_batch": 8, "min_batch": 9})


def test_the_ingress_imports_no_torch() -> None:
    program = "import sys, deepseek_ray.serving.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
