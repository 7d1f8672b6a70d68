"""From a configuration to a Ray Serve application."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.config.serving import IngressConfig, ServingConfig, served_name
from deepseek_ray.control.rollout import engine_config
from deepseek_ray.serving.auth import ApiKeys
from deepseek_ray.serving.ingress import OpenAIIngress, ServedEngine
from deepseek_ray.serving.model_dir import check_model_dir
from deepseek_ray.serving.owner import EngineOwner
from deepseek_ray.serving.scaling import ReplicaPlan, api_limits, plan_openai

_MAX_STARTS = 3
"""An engine that cannot start thrice will not the fourth time."""


def build_app(config: ServingConfig, keys: ApiKeys) -> serve.Application:
    """The OpenAI API and the engines behind it, which Serve owns.

    Deployed again, it goes on with the engines that run (`control/rollout.py`); new ones start beside the old, which
    end when the last process that used them has. Raises CheckpointError or ConfigError for a directory that cannot be
    served.
    """
    engines = []
    for model in config.models:
        check_model_dir(Path(model.model_dir))
        resolved = str(Path(model.model_dir).resolve())
        engines.append(engine_config(model.model_copy(update={"model_dir": resolved})))
    served = [
        ServedEngine(engine.name, served_name(model.model_dir, model.served_model_name), api_limits(model))
        for engine, model in zip(engines, config.models, strict=True)
    ]
    ingress = serve.deployment(
        name="openai", **replica_options(plan_openai(config.models, config.api)), ray_actor_options=_ingress_actor()
    )(OpenAIIngress)
    owner = serve.deployment(
        name="engines",
        max_surge_percent=100,
        max_constructor_retry_count=_MAX_STARTS,
        ray_actor_options={"num_cpus": 0},
    )(EngineOwner)
    return ingress.bind(served, keys, owner.bind(engines))


def build_api_app(
    config: DeploymentConfig, api: IngressConfig, keys: ApiKeys, node_id: str | None = None
) -> serve.Application:
    """The OpenAI API alone, for a deployment that runs and is owned by somebody else.

    `node_id` keeps the ingress, and with it a proxy, on one node: the one that can reach a loopback address.
    """
    options = _ingress_actor()
    if node_id is not None:
        options["label_selector"] = {"ray.io/node-id": node_id}
    ingress = serve.deployment(name="openai", **replica_options(plan_openai([config], api)), ray_actor_options=options)(
        OpenAIIngress
    )
    return ingress.bind([ServedEngine(config.name, None, api_limits(config))], keys)


def replica_options(plan: ReplicaPlan) -> dict[str, Any]:
    """Arguments of `serve.deployment`: autoscaling, bounded queues; an update starts the new before the old ends."""
    return {
        "max_ongoing_requests": plan.max_ongoing_requests,
        "max_queued_requests": plan.max_queued_requests,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        "graceful_shutdown_timeout_s": plan.graceful_shutdown_timeout_s,
        "max_surge_percent": 100,
        "autoscaling_config": AutoscalingConfig(
            min_replicas=plan.min_replicas,
            max_replicas=plan.max_replicas,
            target_ongoing_requests=plan.target_ongoing_requests,
            upscale_delay_s=plan.upscale_delay_s,
            downscale_delay_s=plan.downscale_delay_s,
            metrics_interval_s=plan.metrics_interval_s,
            look_back_period_s=plan.look_back_period_s,
        ),
    }


def _ingress_actor() -> dict[str, Any]:
    return {"num_cpus": 0, "runtime_env": {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}}
