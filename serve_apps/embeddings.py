"""A local Hugging Face encoder behind `/v1/embeddings`, as a Ray Serve application.

    serve run serve_apps.embeddings:app model_dir=/models/all-MiniLM-L6-v2 max_batch=64
    serve deploy serve_apps/embeddings.yaml

Arguments are the fields of `EmbeddingsConfig` and of its `api` section (`deepseek_ray/config/serving.py`): model_dir,
served_model_name, dtype, threads, min_batch, max_batch, latency_threshold (milliseconds), max_waiting, min_replicas ...
The directory holds config.json, tokenizer.json and safetensors; how tokens become one vector is read from the files of
sentence-transformers beside them. API keys come from `api_key_file` or DEEPSEEK_RAY_API_KEY, never from arguments:
Serve logs those.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ray.serve import Application

from deepseek_ray.config.serving import EmbeddingsConfig, IngressConfig
from deepseek_ray.serving.auth import ApiKeys
from deepseek_ray.serving.embeddings_app import build_embeddings_app


def app(args: dict[str, Any]) -> Application:
    """Serve's builder: called with the `key=value` pairs of the command line, or the `args` of a file."""
    config = read_config(args)
    return build_embeddings_app(config, ApiKeys.of((), config.api.api_key_file, os.environ))


def read_config(args: Mapping[str, Any]) -> EmbeddingsConfig:
    """Fields of `api` may stand in a section of their own or beside the others; ConfigError."""
    values = dict(args)
    flat = {name: values.pop(name) for name in IngressConfig.model_fields if name in values}
    api = values.pop("api", {})
    return EmbeddingsConfig.parse({**values, "api": {**api, **flat} if flat else api}, "serve_apps.embeddings")
