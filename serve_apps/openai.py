"""The OpenAI API as a Ray Serve application.

    serve run serve_apps.openai:app model_dir=/models/DeepSeek-V2-Lite-Chat expert_shards=4

Arguments are the fields of `DeploymentConfig` and of its `engine` section (`deepseek_ray/config/engine.py`): model_dir,
name, served_model_name, dtype, attention_workers, expert_shards, threads, request_timeout_seconds, max_model_len,
kv_cache_bytes, max_num_seqs ... Each can also come from the environment as DEEPSEEK_RAY_<FIELD>, for example
DEEPSEEK_RAY_MODEL_DIR; arguments win. Serve owns the deployment: `serve shutdown` ends it, and the address, the port
and the number of proxies are Serve's own options (`serve run --help`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ray.serve import Application

from deepseek_ray.config.engine import DeploymentConfig, EngineConfig
from deepseek_ray.serving.app import build_app

_ENVIRONMENT_PREFIX = "DEEPSEEK_RAY_"


def app(args: dict[str, Any]) -> Application:
    """Serve's builder: called with the `key=value` pairs of the command line."""
    return build_app(read_config({**environment_values(os.environ), **args}), start_deployment=True)


def environment_values(environment: Mapping[str, str]) -> dict[str, str]:
    """The configuration fields among DEEPSEEK_RAY_* variables; others (of tests, of other tools) are left alone."""
    fields = {*DeploymentConfig.model_fields, *EngineConfig.model_fields} - {"engine"}
    values = {name: environment.get(_ENVIRONMENT_PREFIX + name.upper()) for name in fields}
    return {name: value for name, value in values.items() if value is not None}


def read_config(values: Mapping[str, Any]) -> DeploymentConfig:
    """Flat values to a configuration; ConfigError names what is unknown, wrong or missing."""
    engine = {name: value for name, value in values.items() if name in EngineConfig.model_fields}
    rest = {name: value for name, value in values.items() if name not in engine}
    return DeploymentConfig.parse({**rest, "engine": engine}, "serve_apps.openai")
