"""A client's side of a deployment: requests out, token events in, retries in between. No torch.

One link per attention worker carries all requests of this client. A worker that dies costs a request nothing but time:
it is sent to another one with the tokens it already has, and goes on after them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Self

import msgspec
import ray

import deepseek_ray.errors as errors
from deepseek_ray.actors.record import DeploymentDescription, DeploymentRecord, get_router, require_record
from deepseek_ray.actors.worker_stream import WorkerStreams
from deepseek_ray.control.membership import SUSPECT_SECONDS
from deepseek_ray.control.peers import next_in_ring
from deepseek_ray.control.reports import WorkerView
from deepseek_ray.errors import DeadlineExceededError, DeepSeekRayError, LinkError, UnavailableError
from deepseek_ray.links.base import Link
from deepseek_ray.links.connect import connect
from deepseek_ray.messages import GenerateRequest, TokenEvent

logger = logging.getLogger(__name__)

MAX_LOST = 8
"""A request under which so many attention workers fell may be what fells them; those not reached do not count."""
_WORKER_WAIT_SECONDS = 30.0
"""How long a new request waits for an attention worker before it is answered that there is none. One that ran already
waits until its deadline: what it has is not thrown away."""
_ROUTER_SECONDS = 5.0
"""A router that does not answer within this time is away: stopped, cut off, or being restarted."""
_AVOID_SECONDS = 2 * SUSPECT_SECONDS
"""A worker that was lost to a request is not given to it again for so long; by then the router knows how it is."""
_RETRY_SECONDS = 0.1
_CONNECT_SECONDS = 5.0


class _WorkerLostError(DeepSeekRayError):
    """The link to the attention worker ended while the request ran there, or could not be opened."""

    def __init__(self, message: str, was_running: bool) -> None:
        super().__init__(message)
        self.was_running = was_running


class DeploymentClient:
    """Sends requests to a deployment. Belongs to one event loop; one per process is enough."""

    def __init__(self, record: DeploymentRecord) -> None:
        self._record = record
        self._name = record.description.name
        self._node_id: str = ray.get_runtime_context().get_node_id()
        self._streams = WorkerStreams(self._connect, self._hangs)
        self._known_workers: dict[int, WorkerView] = {}
        self._turn = itertools.count()
        self._kv_copies = record.config.kv_copies

    @classmethod
    async def connect(cls, name: str) -> Self:
        """Raises DeploymentError when there is no such deployment on this cluster."""
        return cls(require_record(name))

    async def describe(self) -> DeploymentDescription:
        return self._record.description

    async def ready(self) -> bool:
        """Whether the deployment can generate, as its router says; False when the router does not answer."""
        try:
            return await asyncio.wait_for(get_router(self._name).ready.remote(), timeout=2.0)
        except (ray.exceptions.RayError, ValueError, TimeoutError):
            return False

    async def stats(self) -> dict[str, dict[str, float]]:
        """Figures of every member by `role/id`, as the router knows them; empty when it does not answer."""
        try:
            return await asyncio.wait_for(get_router(self._name).stats.remote(), timeout=2.0)
        except (ray.exceptions.RayError, ValueError, TimeoutError):
            return {}

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Events of one request until it is finished. Closing the iterator stops the work.

        Raises what the engine or the router refused the request with (RequestError, OverloadedError, ...),
        UnavailableError when no worker can be had or too many were lost, DeadlineExceededError when the time ran out
        between two of them.
        """
        seconds = request.deadline_seconds or self._record.description.request_timeout_seconds
        deadline = time.monotonic() + seconds
        delivered = list(request.output_token_ids)
        lost: dict[tuple[int, int], float] = {}
        num_lost = 0
        for attempt in itertools.count():
            patience = deadline if attempt else min(deadline, time.monotonic() + _WORKER_WAIT_SECONDS)
            worker = await self._admit(request, deadline, patience, lost)
            attempted = msgspec.structs.replace(
                request,
                attempt=attempt,
                output_token_ids=list(delivered),
                deadline_seconds=deadline - time.monotonic(),
            )
            try:
                async with aclosing(self._attempt(worker, attempted)) as events:
                    async for event in events:
                        delivered += event.token_ids
                        yield event
                        if event.finish_reason is not None:
                            return
            except _WorkerLostError as error:
                logger.warning("request %s goes elsewhere: %s", request.request_id, error)
                lost.pop((worker.id, worker.incarnation), None)  # the latest last
                lost[worker.id, worker.incarnation] = time.monotonic()
                num_lost += error.was_running
            if num_lost == MAX_LOST:
                raise UnavailableError(f"{MAX_LOST} attention workers were lost while they ran it; try again later")

    async def close(self) -> None:
        self._streams.close()

    async def _attempt(self, worker: WorkerView, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Events of one attempt on one worker; _WorkerLostError if it dies."""
        try:
            stream = await self._streams.get(worker)
        except (LinkError, OSError) as error:
            self._release(request.request_id)
            raise _WorkerLostError(f"attention worker {worker.id} cannot be reached: {error}", False) from None
        events = stream.open(request)
        running = True
        try:
            while running:
                event = await events.get()
                if event is None:
                    running = False
                    raise _WorkerLostError(f"attention worker {worker.id} is gone", True)
                if event.attempt != request.attempt:
                    continue  # a late word of an earlier attempt
                running = event.finish_reason is None
                if event.finish_reason == "error":
                    raise _error_of(event)
                yield event
        finally:
            stream.forget(request.request_id, abort=running)
            self._release(request.request_id)

    async def _admit(
        self, request: GenerateRequest, deadline: float, patience: float, lost: dict[tuple[int, int], float]
    ) -> WorkerView:
        """A worker for the request; waits until `patience` when there is none, since Ray is restarting it."""
        while True:
            now = time.monotonic()
            avoid = [worker for worker, when in lost.items() if now - when < _AVOID_SECONDS]
            try:
                return await self._ask_router(request, deadline - now, avoid)
            except UnavailableError:
                if time.monotonic() >= deadline:
                    raise DeadlineExceededError("the request's deadline is over; allow more time") from None
                if time.monotonic() >= patience:
                    raise
            await asyncio.sleep(_RETRY_SECONDS)

    async def _ask_router(self, request: GenerateRequest, seconds: float, avoid: list[tuple[int, int]]) -> WorkerView:
        """The router's choice; while it is away, the workers known so far in turn."""
        tokens = len(request.prompt_token_ids) + (request.params.max_tokens or 0)
        try:
            admitted = get_router(self._name).admit.remote(request.request_id, tokens, seconds, avoid)
            worker = await asyncio.wait_for(admitted, _ROUTER_SECONDS)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, DeepSeekRayError) else error) from None
        except (ray.exceptions.RayError, ValueError, TimeoutError) as error:
            known = [w for w in self._known_workers.values() if (w.id, w.incarnation) not in avoid]
            if not known:
                raise UnavailableError(f"the router does not answer ({error}); try again in a few seconds") from None
            return self._choose(known, avoid)
        self._known_workers[worker.id] = worker
        return worker

    def _choose(self, known: list[WorkerView], lost: list[tuple[int, int]]) -> WorkerView:
        """In turn; who has copies of what a lost worker computed, first."""
        peer = next_in_ring(lost[-1][0], (worker.id for worker in known)) if lost and self._kv_copies else None
        turn = next(self._turn) % len(known)
        return next((worker for worker in known if worker.id == peer), known[turn])

    def _release(self, request_id: str) -> None:
        try:
            get_router(self._name).release.remote(request_id)
        except (ray.exceptions.RayError, ValueError) as error:
            logger.debug("router away, %s not released: %s", request_id, error)

    async def _hangs(self, worker: WorkerView) -> bool:
        """Whether the router has lost a worker too, and others take requests."""
        try:
            asked = get_router(self._name).hangs.remote(worker.id, worker.incarnation)
            return await asyncio.wait_for(asked, _ROUTER_SECONDS)
        except (ray.exceptions.RayError, ValueError, TimeoutError):
            return False

    def _connect(self, worker: WorkerView) -> Link:
        return connect(
            worker.endpoints,
            node_id=self._node_id,
            deployment=self._name,
            secret=self._record.secret,
            transport=self._record.config.transport,
            timeout=_CONNECT_SECONDS,
        )


def _error_of(event: TokenEvent) -> DeepSeekRayError:
    """The error an engine ended a request with, as the class it was raised with there."""
    kind = getattr(errors, event.error_kind or "", None)
    if isinstance(kind, type) and issubclass(kind, DeepSeekRayError):
        return kind(event.error or "")
    return DeepSeekRayError(event.error or "the engine ended the request")
