"""From a deployment's configuration to a Ray Serve application."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import BackpressureConfig

from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.serving.ingress import DeploymentOwner, OpenAIIngress
from deepseek_ray.serving.limits import ApiLimits

_UNCOUNTED_REQUESTS = 1024
"""Room for what does not generate: health checks, models, bodies that are still arriving, and refusals, which the API
words as OpenAI does. Beyond it Serve itself refuses, in a plain line of text."""


def api_limits(config: DeploymentConfig) -> ApiLimits:
    """What the API admits is what the engines may run or queue: beyond it nothing could be answered sooner."""
    engine = config.engine
    return ApiLimits(
        max_concurrent_requests=config.attention_workers * (engine.max_num_seqs + engine.max_waiting),
        request_timeout_seconds=config.request_timeout_seconds,
    )


def build_app(
    config: DeploymentConfig, start_deployment: bool = False, node_id: str | None = None
) -> serve.Application:
    """The OpenAI API for the deployment `config.name`.

    With `start_deployment` the application starts the deployment and ends it when it is deleted; otherwise it joins a
    running one. `node_id` keeps the ingress, and with it a proxy, on one node: the one that can reach a loopback
    address. One ingress: the streams it holds are the only ones that break when it dies.
    """
    limits = api_limits(config)
    options: dict[str, Any] = {"num_cpus": 0, "runtime_env": {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}}
    if node_id is not None:
        options["label_selector"] = {"ray.io/node-id": node_id}
    ingress = serve.deployment(
        name="openai",
        max_ongoing_requests=limits.max_concurrent_requests + _UNCOUNTED_REQUESTS,
        max_queued_requests=_UNCOUNTED_REQUESTS,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        ray_actor_options=options,
    )(OpenAIIngress)
    if not start_deployment:
        return ingress.bind(config.name, limits)
    resolved = config.model_copy(update={"model_dir": str(Path(config.model_dir).resolve())})
    owner = serve.deployment(name="owner", ray_actor_options={"num_cpus": 0})(DeploymentOwner)
    return ingress.bind(config.name, limits, owner.bind(resolved))
