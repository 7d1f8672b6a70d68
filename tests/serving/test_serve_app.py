"""The Serve application's configuration; the application itself runs in `tests/end_to_end`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deepseek_ray.config.engine import DeploymentConfig, EngineConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.serving.app import api_limits
from serve_apps.openai import environment_values, read_config


def test_arguments_are_the_fields_of_the_configuration() -> None:
    config = read_config({"model_dir": "/m", "expert_shards": "4", "max_model_len": "512", "dtype": "float32"})
    assert (config.model_dir, config.expert_shards, config.dtype) == ("/m", 4, "float32")
    assert config.engine.max_model_len == 512
    with pytest.raises(ConfigError, match="unknown key 'expert_shard'; did you mean 'expert_shards'"):
        read_config({"model_dir": "/m", "expert_shard": "4"})
    with pytest.raises(ConfigError, match="model_dir"):
        read_config({})


def test_the_environment_gives_fields_and_nothing_else() -> None:
    environment = {
        "DEEPSEEK_RAY_MODEL_DIR": "/m",
        "DEEPSEEK_RAY_MAX_NUM_SEQS": "8",
        "DEEPSEEK_RAY_TEST_DATA": "/data",
        "DEEPSEEK_RAY_ENGINE": "{}",
        "HOME": "/root",
    }
    assert environment_values(environment) == {"model_dir": "/m", "max_num_seqs": "8"}


def test_the_api_admits_what_the_engines_can_take() -> None:
    engine = EngineConfig(max_num_seqs=8, max_waiting=2)
    config = DeploymentConfig(model_dir="/m", attention_workers=3, engine=engine, request_timeout_seconds=5)
    limits = api_limits(config)
    assert (limits.max_concurrent_requests, limits.request_timeout_seconds) == (30, 5)


def test_the_ingress_imports_no_torch() -> None:
    program = "import sys, deepseek_ray.serving.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
