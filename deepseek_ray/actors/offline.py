"""`LLM(backend="actors")`: a deployment of its own behind the offline face."""

from __future__ import annotations

import asyncio
import queue
import threading
import uuid
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from deepseek_ray.actors.cluster import join_or_start
from deepseek_ray.actors.deployment import start_deployment
from deepseek_ray.actors.request_session import DeploymentClient
from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.engine.offline import OfflineBackend, tokenizer_beside
from deepseek_ray.errors import DeepSeekRayError
from deepseek_ray.messages import GenerateRequest, TokenEvent

T = TypeVar("T")


class ActorsBackend(OfflineBackend):
    """Router, attention workers and expert shards on the joined Ray cluster, or on one started here."""

    def __init__(self, config: DeploymentConfig) -> None:
        self.tokenizer = tokenizer_beside(config.model_dir)
        self._cluster = join_or_start()
        try:
            named = config.model_copy(update={"name": f"llm-{uuid.uuid4().hex[:12]}"})
            self.deployment = start_deployment(named)
        except BaseException:
            self._cluster.leave()
            raise
        self.vocab_size = self.deployment.description.vocab_size
        self.max_model_len = self.deployment.description.max_model_len
        per_worker = config.engine.max_num_seqs + config.engine.max_waiting
        self._most_at_once = per_worker * config.attention_workers
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()
        self._client = self._call(DeploymentClient.connect(self.deployment.name))
        self._closed = False

    def run(self, requests: Sequence[GenerateRequest]) -> Iterator[TokenEvent]:
        events: queue.SimpleQueue[TokenEvent | None] = queue.SimpleQueue()
        running = asyncio.run_coroutine_threadsafe(self._run_all(requests, events), self._loop)
        try:
            while (event := events.get()) is not None:
                yield event
            running.result()
        finally:
            running.cancel()

    def shutdown(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._call(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.deployment.stop()
        self._cluster.leave()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _run_all(self, requests: Sequence[GenerateRequest], events: queue.SimpleQueue[TokenEvent | None]) -> None:
        seats = asyncio.Semaphore(self._most_at_once)
        try:
            async with asyncio.TaskGroup() as tasks:
                for request in requests:
                    tasks.create_task(self._run_one(request, seats, events))
        finally:
            events.put(None)

    async def _run_one(
        self, request: GenerateRequest, seats: asyncio.Semaphore, events: queue.SimpleQueue[TokenEvent | None]
    ) -> None:
        num_tokens = len(request.output_token_ids)
        async with seats:
            try:
                async for event in self._client.generate(request):
                    num_tokens = event.index + len(event.token_ids)
                    events.put(event)
            except DeepSeekRayError as error:
                events.put(
                    TokenEvent(
                        request_id=request.request_id,
                        attempt=request.attempt,
                        index=num_tokens,
                        finish_reason="error",
                        error=str(error),
                        error_kind=type(error).__name__,
                    )
                )
