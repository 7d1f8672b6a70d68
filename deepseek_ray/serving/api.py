"""The OpenAI API over models that generate: admission, deadlines, draining."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deepseek_ray.errors import DeadlineExceededError, OverloadedError, RequestError, UnavailableError
from deepseek_ray.serving.auth import ApiKeys
from deepseek_ray.serving.body import parse_body
from deepseek_ray.serving.chat import plan_chat, reply_chat, stream_chat
from deepseek_ray.serving.completions import plan_completion, reply_completion, stream_completion
from deepseek_ray.serving.exchange import Exchange
from deepseek_ray.serving.http_app import Handler, HttpApp, check_media_type
from deepseek_ray.serving.job import ApiContext, Job
from deepseek_ray.serving.limits import ApiLimits
from deepseek_ray.serving.models import find_model
from deepseek_ray.serving.schema import ChatRequest, CompletionRequest, parse_request
from deepseek_ray.serving.structure import StructureChecker

logger = logging.getLogger(__name__)

_DEADLINE_GRACE_SECONDS = 1.0
"""The engine ends a request at its deadline; this much later the API does so itself, should the engine not answer."""
_SMALL_BODY_BYTES = 16 * 1024
"""Smaller bodies are read and tokenised on the event loop, larger ones in a thread, so that others' tokens go on."""


@dataclass(frozen=True)
class _Endpoint:
    """How a generating endpoint reads, plans and answers."""

    request_type: type[Any]
    id_prefix: str
    plan: Callable[[Any, ApiContext, str], Job]
    reply: Callable[[Any, Job, ApiContext], Awaitable[Any]]
    stream: Callable[[Any, Job, ApiContext], Any]


_CHAT = _Endpoint(ChatRequest, "chatcmpl-", plan_chat, reply_chat, stream_chat)
_COMPLETIONS = _Endpoint(CompletionRequest, "cmpl-", plan_completion, reply_completion, stream_completion)


class Api(HttpApp):
    """ASGI callable. `num_generating` counts the requests that generate now."""

    def __init__(self, contexts: Sequence[ApiContext], keys: ApiKeys, echo_request_id: bool) -> None:
        """One context per model; requests choose by its served name.

        `echo_request_id` is False behind a proxy that sets X-Request-Id itself.
        """
        super().__init__(
            {context.model.served_model_name: context.model for context in contexts}, keys, echo_request_id
        )
        self.contexts = {context.model.served_model_name: context for context in contexts}
        self.num_generating = 0
        self._limits = _join_limits([context.limits for context in contexts])
        self._structures = StructureChecker()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def post(self) -> dict[str, Handler]:
        return {
            "/v1/chat/completions": lambda exchange: self._generate(exchange, _CHAT),
            "/v1/completions": lambda exchange: self._generate(exchange, _COMPLETIONS),
        }

    async def ready(self) -> bool:
        """True when every backend says in time that it can generate, and work is taken here."""
        if self._draining:
            return False
        try:
            async with asyncio.timeout(self._limits.ready_timeout_seconds):
                return all(await asyncio.gather(*(context.backend.ready() for context in self.contexts.values())))
        except (TimeoutError, UnavailableError):
            return False

    async def drain(self, seconds: float) -> int:
        """Take no new work and wait, at most `seconds`, for what is running; how many requests still run then."""
        self._draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d requests still run after %g s of draining", self.num_generating, seconds)
        return self.num_generating

    async def _generate(self, exchange: Exchange, endpoint: _Endpoint) -> None:
        check_media_type(exchange)
        body = await exchange.read_body(self._limits.max_body_bytes, self._limits.body_timeout_seconds)
        self._admit()
        try:
            await exchange.unless_client_leaves(self._answer(exchange, endpoint, body))
        finally:
            self.num_generating -= 1
            if not self.num_generating:
                self._idle.set()

    def _admit(self) -> None:
        if self._draining:
            raise UnavailableError("this server is shutting down; send the request to another one, or later")
        limit = self._limits.max_concurrent_requests
        if self.num_generating >= limit:
            raise OverloadedError(f"{self.num_generating} requests are being answered; the limit is {limit}; try later")
        self.num_generating += 1
        self._idle.clear()

    async def _answer(self, exchange: Exchange, endpoint: _Endpoint, body: bytes) -> None:
        started = asyncio.get_running_loop().time()
        seconds = self._limits.request_timeout_seconds
        try:
            async with asyncio.timeout(seconds + _DEADLINE_GRACE_SECONDS) as deadline:
                if len(body) < _SMALL_BODY_BYTES:
                    request, context, job = self._plan(exchange, endpoint, body)
                else:
                    request, context, job = await asyncio.to_thread(self._plan, exchange, endpoint, body)
                seconds = context.limits.request_timeout_seconds  # the model's own, now that it is known
                deadline.reschedule(started + seconds + _DEADLINE_GRACE_SECONDS)
                structure = job.requests[0].params.structured_outputs
                if structure is not None:
                    await self._structures.check(request, structure)
                if request.stream:
                    await exchange.stream(endpoint.stream(request, job, context))
                else:
                    await exchange.reply(await endpoint.reply(request, job, context))
        except TimeoutError:
            raise DeadlineExceededError(
                f"the request's deadline of {seconds:g} s is over; ask for fewer tokens"
            ) from None

    def _plan(self, exchange: Exchange, endpoint: _Endpoint, body: bytes) -> tuple[Any, ApiContext, Job]:
        request = parse_request(endpoint.request_type, parse_body(body, self._limits.max_json_depth))
        if request.stream_options is not None and not request.stream:
            raise RequestError(
                "stream_options needs stream to be true; set it or leave stream_options out", param="stream_options"
            )
        context = find_model(request.model, self.contexts)
        job = endpoint.plan(request, context, endpoint.id_prefix + (request.request_id or exchange.request_id))
        return request, context, replace(job, typed_client=exchange.header("x-stainless-lang") != "")


def _join_limits(limits: Sequence[ApiLimits]) -> ApiLimits:
    """What holds before a request's model is known: room for the requests of all, and the longest deadline."""
    return limits[0].model_copy(
        update={
            "max_concurrent_requests": sum(limit.max_concurrent_requests for limit in limits),
            "request_timeout_seconds": max(limit.request_timeout_seconds for limit in limits),
        }
    )
