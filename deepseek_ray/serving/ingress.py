"""The Ray Serve deployments: the ingress that answers HTTP, and the owner of a deployment that Serve itself starts.

The ingress process imports no torch: it tokenises, talks to attention workers over links, and writes JSON.
"""

from __future__ import annotations

import time

from ray import serve

from deepseek_ray.actors.deployment import Deployment, start_deployment
from deepseek_ray.actors.record import read_record
from deepseek_ray.actors.request_session import DeploymentClient
from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import UnavailableError
from deepseek_ray.serving.api import Api, build_api
from deepseek_ray.serving.limits import ApiLimits

_UNREACHABLE_SECONDS = 60.0
"""Longest time without a ready backend before Serve may replace the ingress. Long, since a replacement breaks the
streams that the ingress holds and helps only when its own connections are at fault."""


@serve.ingress()
class OpenAIIngress:
    """Answers the OpenAI API for one deployment of this cluster."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, deployment: str, limits: ApiLimits, owner: serve.handle.DeploymentHandle | None = None
    ) -> None:
        """`owner` starts the deployment and is waited for; None when somebody else has started it already."""
        if owner is not None:
            await owner.started.remote()
        self._client = await DeploymentClient.connect(deployment)
        description = await self._client.describe()
        tokenizer = Tokenizer.from_dir(description.model_dir)
        # Serve's proxy puts X-Request-Id on every reply.
        self._api = build_api(self._client, tokenizer, description, limits, echo_request_id=False)
        self._last_ready = time.monotonic()

    def __serve_build_asgi_app__(self) -> Api:
        return self._api

    async def drain(self, seconds: float) -> int:
        """Refuse new requests and let running ones finish; the number of those that did not."""
        return await self._api.drain(seconds)

    async def check_health(self) -> None:
        """Called by Serve."""
        now = time.monotonic()
        if await self._api.ready():
            self._last_ready = now
        elif now - self._last_ready > _UNREACHABLE_SECONDS:
            raise UnavailableError(f"the deployment was not ready for {now - self._last_ready:.0f} s")

    async def __del__(self) -> None:
        if hasattr(self, "_client"):
            await self._client.close()


class DeploymentOwner:
    """Starts a deployment with the Serve application it belongs to, and ends it with that."""

    def __init__(self, config: DeploymentConfig) -> None:
        record = read_record(config.name)
        # An owner that Serve has restarted takes over what the last one started.
        same = record is not None and record.config == config
        self._deployment = Deployment(record) if record is not None and same else start_deployment(config)

    def started(self) -> bool:
        """Returns once the constructor has: the deployment can generate."""
        return True

    def __del__(self) -> None:
        if hasattr(self, "_deployment"):
            self._deployment.stop()
