"""The Ray Serve application around an encoder: each process computes its own batches."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from ray import serve

from deepseek_ray.config.serving import EmbeddingsConfig, served_name
from deepseek_ray.serving.app import replica_options
from deepseek_ray.serving.auth import ApiKeys
from deepseek_ray.serving.batch_runner import BatchRunner
from deepseek_ray.serving.batching import DynamicBatchScheduler
from deepseek_ray.serving.embeddings import EmbeddingsApi, EncoderModel, Vector
from deepseek_ray.serving.limits import ApiLimits
from deepseek_ray.serving.scaling import plan_embeddings

MAX_INPUTS = 2048
"""Inputs of one request, as with OpenAI."""


def build_embeddings_app(config: EmbeddingsConfig, keys: ApiKeys) -> serve.Application:
    """Raises CheckpointError for a directory that cannot be served."""
    from deepseek_ray.models.text_encoder import check_encoder_dir

    check_encoder_dir(Path(config.model_dir))
    variables = {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    ingress = serve.deployment(
        name="embeddings",
        **replica_options(plan_embeddings(config)),
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": variables}},
    )(EmbeddingsIngress)
    return ingress.bind(config, int(time.time()), keys)


@serve.ingress()
class EmbeddingsIngress:
    """Answers `/v1/embeddings`, and computes what it answers."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: EmbeddingsConfig, created: int, keys: ApiKeys
    ) -> None:
        """`created`: unix seconds, the same in every process."""
        # Serve's proxy puts X-Request-Id on every reply.
        self._api = await asyncio.to_thread(build_embeddings_api, config, created, keys, echo_request_id=False)

    def __serve_build_asgi_app__(self) -> EmbeddingsApi:
        return self._api


def build_embeddings_api(
    config: EmbeddingsConfig, created: int, keys: ApiKeys, echo_request_id: bool = True
) -> EmbeddingsApi:
    """Load the encoder, and put a queue and the API in front of it."""
    import torch

    from deepseek_ray.models.text_encoder import TextEncoder

    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    encoder = TextEncoder(config.model_dir, getattr(torch, config.dtype))
    scheduler = DynamicBatchScheduler(config.min_batch, config.max_batch, config.latency_threshold)
    runner = BatchRunner[list[int], Vector](
        lambda batch: list(encoder.encode(batch).numpy()), scheduler, config.max_waiting
    )
    model = EncoderModel(
        served_model_name=served_name(config.model_dir, config.served_model_name),
        model_dir=config.model_dir,
        max_model_len=encoder.max_length,
        created=created,
    )
    limits = ApiLimits(request_timeout_seconds=config.request_timeout_seconds)
    max_inputs = min(MAX_INPUTS, config.max_waiting)
    return EmbeddingsApi(model, encoder, runner, limits, keys, max_inputs, echo_request_id)
