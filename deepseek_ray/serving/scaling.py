"""How many processes answer HTTP, how much each takes, and how long one may need to end: from the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.config.serving import EmbeddingsConfig, IngressConfig
from deepseek_ray.serving.limits import ApiLimits

_UNCOUNTED_REQUESTS = 1024
"""Room for what does not generate: health checks, models, bodies that are still arriving, and refusals, which the API
words as OpenAI does. Beyond it Serve itself refuses, in a plain line of text."""
_SHUTDOWN_GRACE_SECONDS = 10.0
"""For the last bytes of a reply and the way out."""
_METRICS_SECONDS = (0.5, 10.0)
"""Shortest and longest time between two looks at the queues."""


@dataclass(frozen=True)
class ReplicaPlan:
    """Serve's settings of an ingress deployment. Times in seconds."""

    max_ongoing_requests: int
    """Each process can hold all that the engines admit: the router, which sees every process, decides who is refused,
    and a process that has just started must not be missing."""
    max_queued_requests: int
    target_ongoing_requests: float
    """Requests per process that autoscaling aims for: with full engines, `max_replicas` processes share their sequences
    evenly."""
    graceful_shutdown_timeout_s: float
    """A process that is to end finishes what it answers: no request lives longer than its deadline and its body."""
    min_replicas: int
    max_replicas: int
    upscale_delay_s: float
    downscale_delay_s: float
    metrics_interval_s: float
    look_back_period_s: float


def api_limits(config: DeploymentConfig) -> ApiLimits:
    """What the API admits is what the engines may run or queue: beyond it nothing could be answered sooner."""
    engine = config.engine
    return ApiLimits(
        max_concurrent_requests=config.attention_workers * (engine.max_num_seqs + engine.max_waiting),
        request_timeout_seconds=config.request_timeout_seconds,
    )


def plan_openai(models: Sequence[DeploymentConfig], api: IngressConfig) -> ReplicaPlan:
    """For processes that forward to the engines of `models`."""
    limits = [api_limits(model) for model in models]
    return _plan(
        api,
        num_admitted=sum(limit.max_concurrent_requests for limit in limits),
        num_running=sum(model.attention_workers * model.engine.max_num_seqs for model in models),
        longest_request=max(limit.request_timeout_seconds + limit.body_timeout_seconds for limit in limits),
    )


def plan_embeddings(config: EmbeddingsConfig) -> ReplicaPlan:
    """For processes that encode themselves: each computes one batch while the next one gathers."""
    return _plan(
        config.api,
        num_admitted=config.max_waiting,
        num_running=2 * config.max_batch * config.api.max_replicas,
        longest_request=config.request_timeout_seconds + ApiLimits().body_timeout_seconds,
    )


def _plan(api: IngressConfig, num_admitted: int, num_running: int, longest_request: float) -> ReplicaPlan:
    shortest, longest = _METRICS_SECONDS
    interval = min(longest, max(shortest, api.upscale_delay_seconds / 2))
    return ReplicaPlan(
        max_ongoing_requests=num_admitted + _UNCOUNTED_REQUESTS,
        max_queued_requests=_UNCOUNTED_REQUESTS,
        target_ongoing_requests=max(1.0, num_running / api.max_replicas),
        graceful_shutdown_timeout_s=longest_request + _SHUTDOWN_GRACE_SECONDS,
        min_replicas=api.min_replicas,
        max_replicas=api.max_replicas,
        upscale_delay_s=api.upscale_delay_seconds,
        downscale_delay_s=api.downscale_delay_seconds,
        metrics_interval_s=interval,
        look_back_period_s=2 * interval,
    )
