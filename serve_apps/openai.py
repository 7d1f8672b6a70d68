"""The OpenAI API as a Ray Serve application: one model, or several of which `model` in a request chooses one.

    serve run serve_apps.openai:app model_dir=/models/DeepSeek-V2-Lite-Chat expert_shards=4
    serve run serve_apps.openai:app config=models.yaml
    serve deploy serve_apps/openai.yaml

For one model the arguments are the fields of `DeploymentConfig` and of its `engine` section
(`deepseek_ray/config/engine.py`): model_dir, name, served_model_name, dtype, attention_workers, expert_shards, threads,
request_timeout_seconds, max_model_len, kv_cache_bytes, max_num_seqs ... Each can also come from the environment as
DEEPSEEK_RAY_<FIELD>, for example DEEPSEEK_RAY_MODEL_DIR; arguments win. For several they are those of `ServingConfig`
(`deepseek_ray/config/serving.py`): `models`, a list, and `api`, from a YAML file given as `config`, or from the `args`
of a `serve deploy` file. API keys come from `api_key_file` or DEEPSEEK_RAY_API_KEY, never from arguments: Serve logs
those.

Serve owns the engines: deploying again keeps those whose configuration is the same, `serve shutdown` ends them. The
address, the port and the number of proxies are Serve's own options (`serve run --help`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ray.serve import Application

from deepseek_ray.config.engine import DeploymentConfig, EngineConfig
from deepseek_ray.config.load import load_config
from deepseek_ray.config.serving import IngressConfig, ServingConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.serving.app import build_app
from deepseek_ray.serving.auth import ApiKeys

_ENVIRONMENT_PREFIX = "DEEPSEEK_RAY_"
_SOURCE = "serve_apps.openai"


def app(args: dict[str, Any]) -> Application:
    """Serve's builder: called with the `key=value` pairs of the command line, or the `args` of a file."""
    config = read_config(args, os.environ)
    return build_app(config, ApiKeys.of((), config.api.api_key_file, os.environ))


def read_config(args: Mapping[str, Any], environment: Mapping[str, str]) -> ServingConfig:
    """ConfigError names what is unknown, wrong or missing."""
    if "config" in args:
        if len(args) > 1:
            others = ", ".join(sorted(set(args) - {"config"}))
            raise ConfigError(f"{_SOURCE}: config is given and {others} too; put {others} into the file")
        return load_config(ServingConfig, args["config"])
    if "models" in args:
        return ServingConfig.parse(args, _SOURCE)
    values = {**environment_values(environment), **args}
    api = {name: values.pop(name) for name in IngressConfig.model_fields if name in values}
    model = read_model(values)
    return ServingConfig(models=(model,), api=IngressConfig.parse(api, _SOURCE))


def environment_values(environment: Mapping[str, str]) -> dict[str, str]:
    """The configuration fields among DEEPSEEK_RAY_* variables; others (of tests, of other tools) are left alone."""
    classes = (DeploymentConfig, EngineConfig, IngressConfig)
    fields = {name for kind in classes for name in kind.model_fields} - {"engine"}
    values = {name: environment.get(_ENVIRONMENT_PREFIX + name.upper()) for name in fields}
    return {name: value for name, value in values.items() if value is not None}


def read_model(values: Mapping[str, Any]) -> DeploymentConfig:
    """Flat values to one model's configuration."""
    engine = {name: value for name, value in values.items() if name in EngineConfig.model_fields}
    rest = {name: value for name, value in values.items() if name not in engine}
    return DeploymentConfig.parse({**rest, "engine": engine}, _SOURCE)
