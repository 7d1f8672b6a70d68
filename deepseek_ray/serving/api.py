"""The HTTP API as one ASGI application: routes, admission, deadlines, and every error in one shape."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deepseek_ray.errors import DeadlineExceededError, DeepSeekRayError, OverloadedError, RequestError, UnavailableError
from deepseek_ray.serving.auth import ApiKeys
from deepseek_ray.serving.body import parse_body
from deepseek_ray.serving.chat import plan_chat, reply_chat, stream_chat
from deepseek_ray.serving.completions import plan_completion, reply_completion, stream_completion
from deepseek_ray.serving.errors import ErrorReply, HttpError, describe_error
from deepseek_ray.serving.exchange import ClientGoneError, Exchange, Receive, Scope, Send
from deepseek_ray.serving.job import ApiContext, Job
from deepseek_ray.serving.limits import ApiLimits
from deepseek_ray.serving.models import find_model, model_card, model_list
from deepseek_ray.serving.replies import Health
from deepseek_ray.serving.schema import ChatRequest, CompletionRequest, parse_request
from deepseek_ray.serving.structure import StructureChecker

logger = logging.getLogger(__name__)

Handler = Callable[[Exchange], Awaitable[None]]
_MODEL_PATH = "/v1/models/"
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


class Api:
    """ASGI callable. `num_generating` counts the requests that generate now."""

    def __init__(self, contexts: Sequence[ApiContext], keys: ApiKeys, echo_request_id: bool) -> None:
        """One context per model; requests choose by its served name.

        `echo_request_id` is False behind a proxy that sets X-Request-Id itself.
        """
        self.contexts = {context.model.served_model_name: context for context in contexts}
        self.num_generating = 0
        self._keys = keys
        self._limits = _join_limits([context.limits for context in contexts])
        self._structures = StructureChecker()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._echo_request_id = echo_request_id
        self._routes: dict[str, dict[str, Handler]] = {
            "/health": {"GET": self._health},
            "/ready": {"GET": self._ready},
            "/v1/models": {"GET": self._models},
            "/v1/chat/completions": {"POST": lambda exchange: self._generate(exchange, _CHAT)},
            "/v1/completions": {"POST": lambda exchange: self._generate(exchange, _COMPLETIONS)},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            await self._handle(Exchange(scope, receive, send, self._echo_request_id))

    async def _handle(self, exchange: Exchange) -> None:
        try:
            self._keys.check(exchange.path, exchange.header("authorization"))
            await self._route(exchange)(exchange)
        except ClientGoneError:
            logger.info("request %s: the client left", exchange.request_id)
        except Exception as error:
            if not isinstance(error, DeepSeekRayError):
                logger.exception("request %s failed", exchange.request_id)
            reply = describe_error(error, exchange.request_id)
            await exchange.fail(self._without_paths(reply))

    def _route(self, exchange: Exchange) -> Handler:
        methods = self._routes.get(exchange.path)
        if methods is None and exchange.path.startswith(_MODEL_PATH):
            methods = {"GET": self._model}
        if methods is None:
            raise HttpError(404, f"there is no {exchange.path[:200]} here; see /v1/models", "not_found")
        handler = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            allowed = ", ".join(methods)
            raise HttpError(
                405,
                f"{exchange.path[:200]} takes {allowed}, not {exchange.method[:20]}",
                "method_not_allowed",
                {"allow": allowed},
            )
        return handler

    async def _health(self, exchange: Exchange) -> None:
        await exchange.reply(Health("ok"))

    async def _ready(self, exchange: Exchange) -> None:
        if not await self.ready():
            raise UnavailableError("the model cannot generate now: it is starting, recovering or stopping; try again")
        await exchange.reply(Health("ready"))

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

    async def _models(self, exchange: Exchange) -> None:
        await exchange.reply(model_list(context.model for context in self.contexts.values()))

    async def _model(self, exchange: Exchange) -> None:
        context = find_model(exchange.path.removeprefix(_MODEL_PATH), self.contexts)
        await exchange.reply(model_card(context.model))

    async def _generate(self, exchange: Exchange, endpoint: _Endpoint) -> None:
        _check_media_type(exchange)
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

    def _without_paths(self, reply: ErrorReply) -> ErrorReply:
        """Where a model lies on the server is not the client's business."""
        for context in self.contexts.values():
            model = context.model
            reply.body.error.message = reply.body.error.message.replace(model.model_dir, model.served_model_name)
        return reply


def _join_limits(limits: Sequence[ApiLimits]) -> ApiLimits:
    """What holds before a request's model is known: room for the requests of all, and the longest deadline."""
    return limits[0].model_copy(
        update={
            "max_concurrent_requests": sum(limit.max_concurrent_requests for limit in limits),
            "request_timeout_seconds": max(limit.request_timeout_seconds for limit in limits),
        }
    )


def _check_media_type(exchange: Exchange) -> None:
    """JSON only: a web page can make a browser send forms and plain text to any address without asking."""
    media_type = exchange.header("content-type").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HttpError(
            415,
            f"the content type is {media_type[:100]!r}; send JSON with the header Content-Type: application/json",
            "unsupported_media_type",
        )


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
