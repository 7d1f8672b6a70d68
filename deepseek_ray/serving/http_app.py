"""What every HTTP application here has in common: keys, routes, health, models, and every error in one shape."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from deepseek_ray.errors import DeepSeekRayError, UnavailableError
from deepseek_ray.serving.auth import ApiKeys
from deepseek_ray.serving.errors import ErrorReply, HttpError, describe_error
from deepseek_ray.serving.exchange import ClientGoneError, Exchange, Receive, Scope, Send
from deepseek_ray.serving.models import find_model, model_card, model_list
from deepseek_ray.serving.replies import Health

logger = logging.getLogger(__name__)

Handler = Callable[[Exchange], Awaitable[None]]
_MODEL_PATH = "/v1/models/"


class ListedModel(Protocol):
    """A model as clients see it, and where it lies, which they must not see."""

    @property
    def served_model_name(self) -> str: ...
    @property
    def model_dir(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def created(self) -> int: ...


class HttpApp:
    """ASGI callable. Subclasses bring `post`: what paths beyond health and models take."""

    def __init__(self, models: Mapping[str, ListedModel], keys: ApiKeys, echo_request_id: bool) -> None:
        """`models` by served name. `echo_request_id` is False behind a proxy that sets X-Request-Id itself."""
        self._models = models
        self._keys = keys
        self._echo_request_id = echo_request_id

    async def ready(self) -> bool:
        """True when a request sent now would be answered."""
        raise NotImplementedError

    def post(self) -> dict[str, Handler]:
        """Path -> handler of POST requests."""
        raise NotImplementedError

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
        methods = self._methods(exchange.path)
        if not methods:
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

    def _methods(self, path: str) -> dict[str, Handler]:
        match path:
            case "/health":
                return {"GET": self._health}
            case "/ready":
                return {"GET": self._ready}
            case "/v1/models":
                return {"GET": self._list_models}
            case _ if path.startswith(_MODEL_PATH):
                return {"GET": self._show_model}
        post = self.post().get(path)
        return {"POST": post} if post else {}

    async def _health(self, exchange: Exchange) -> None:
        await exchange.reply(Health("ok"))

    async def _ready(self, exchange: Exchange) -> None:
        if not await self.ready():
            raise UnavailableError("the model cannot generate now: it is starting, recovering or stopping; try again")
        await exchange.reply(Health("ready"))

    async def _list_models(self, exchange: Exchange) -> None:
        await exchange.reply(model_list(self._models.values()))

    async def _show_model(self, exchange: Exchange) -> None:
        await exchange.reply(model_card(find_model(exchange.path.removeprefix(_MODEL_PATH), self._models)))

    def _without_paths(self, reply: ErrorReply) -> ErrorReply:
        """Where a model lies on the server is not the client's business."""
        for model in self._models.values():
            reply.body.error.message = reply.body.error.message.replace(model.model_dir, model.served_model_name)
        return reply


def check_media_type(exchange: Exchange) -> None:
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
