"""The Ray Serve deployment that answers HTTP.

Its processes import no torch: they tokenise, talk to attention workers over links, and write JSON.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from ray import serve

from deepseek_ray.actors.lease import Lease
from deepseek_ray.actors.record import require_record
from deepseek_ray.actors.request_session import DeploymentClient
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import DeploymentError, UnavailableError
from deepseek_ray.serving.api import Api
from deepseek_ray.serving.auth import ApiKeys
from deepseek_ray.serving.job import ApiContext
from deepseek_ray.serving.limits import ApiLimits
from deepseek_ray.serving.metrics_loop import export_metrics
from deepseek_ray.serving.request_metrics import MeasuredBackend

logger = logging.getLogger(__name__)

_UNREACHABLE_SECONDS = 60.0
"""Longest time without a ready backend before Serve may replace the ingress. Long, since a replacement breaks the
streams that the ingress holds and helps only when its own connections are at fault."""
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class ServedEngine:
    """A model of the API and the deployment that generates for it."""

    deployment: str
    served_model_name: str | None
    """None takes the deployment's own."""
    limits: ApiLimits


@serve.ingress()
class OpenAIIngress:
    """Answers the OpenAI API for deployments of this cluster."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, engines: Sequence[ServedEngine], keys: ApiKeys, owner: serve.handle.DeploymentHandle | None = None
    ) -> None:
        """Returns when every engine can generate.

        With an `owner` the engines live at least as long as this process: it finishes what it answers after Serve has
        turned to its successor, whose engines may be others. None when somebody else has started them and ends them.
        """
        self._clients: list[DeploymentClient] = []
        self._leases: list[Lease] = []
        self._exports: list[asyncio.Task[None]] = []
        contexts = await asyncio.gather(*(self._connect(engine, owner is not None) for engine in engines))
        # Serve's proxy puts X-Request-Id on every reply.
        self._api = Api(contexts, keys, echo_request_id=False)
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
            raise UnavailableError(f"a model was not ready for {now - self._last_ready:.0f} s")

    async def __del__(self) -> None:
        for export in getattr(self, "_exports", ()):
            export.cancel()
        for client in getattr(self, "_clients", ()):
            await client.close()
        for lease in getattr(self, "_leases", ()):
            await asyncio.to_thread(lease.release)

    async def _connect(self, engine: ServedEngine, holds_lease: bool) -> ApiContext:
        """Wait for the engine, which its owner may be starting just now."""
        client = await self._client(engine.deployment)
        self._clients.append(client)
        if holds_lease:
            self._leases.append(Lease(require_record(engine.deployment)))
        description = await client.describe()
        if engine.served_model_name is not None:
            description = msgspec.structs.replace(description, served_model_name=engine.served_model_name)
        backend = MeasuredBackend(client)
        export = export_metrics(description.served_model_name, backend, client)
        self._exports.append(asyncio.create_task(export))
        return ApiContext(backend, Tokenizer.from_dir(description.model_dir), description, engine.limits)

    async def _client(self, name: str) -> DeploymentClient:
        while True:
            try:
                client = await DeploymentClient.connect(name)
                if await client.ready():
                    return client
            except DeploymentError:
                logger.debug("%s does not run yet", name)
            await asyncio.sleep(_POLL_SECONDS)
