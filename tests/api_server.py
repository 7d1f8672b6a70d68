"""The HTTP API over real sockets, in front of backends that need no Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from fakes import FakeDecoder, FakeShape, byte_tokenizer

from deepseek_ray.config.engine import EngineConfig
from deepseek_ray.engine.engine import Engine
from deepseek_ray.messages import GenerateRequest, TokenEvent
from deepseek_ray.serving.api import Api
from deepseek_ray.serving.auth import ApiKeys
from deepseek_ray.serving.backend import Backend
from deepseek_ray.serving.http_app import HttpApp
from deepseek_ray.serving.job import ApiContext
from deepseek_ray.serving.limits import ApiLimits

MODEL = "tiny"


@dataclass(frozen=True)
class FakeModel:
    served_model_name: str = MODEL
    model_dir: str = "/secret/place/tiny"
    max_model_len: int = 256
    vocab_size: int = FakeShape().vocab_size
    created: int = 1_700_000_000


class EngineBackend:
    """A real engine over the fake decoder, stepped on the event loop."""

    def __init__(self) -> None:
        self.decoder = FakeDecoder(FakeShape())
        self.engine = Engine(self.decoder, byte_tokenizer(), EngineConfig(max_num_seqs=8, kv_cache_bytes=2**20))
        self.is_ready = True
        self._queues: dict[str, asyncio.Queue[TokenEvent]] = {}
        self._stepper: asyncio.Task[None] | None = None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        queue: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self.engine.add_request(request)
        self._queues[request.request_id] = queue
        if self._stepper is None or self._stepper.done():
            self._stepper = asyncio.create_task(self._step())
        try:
            while True:
                event = await queue.get()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            del self._queues[request.request_id]
            self.engine.abort(request.request_id)

    async def ready(self) -> bool:
        return self.is_ready

    async def _step(self) -> None:
        while self.engine.has_work:
            for event in self.engine.step():
                queue = self._queues.get(event.request_id)
                if queue is not None:
                    queue.put_nowait(event)
            await asyncio.sleep(0)


@dataclass
class ScriptedBackend:
    """Yields the given events, then raises `error`, or waits for ever. Says when a request starts and when it ends."""

    texts: list[str] = field(default_factory=list)
    error: Exception | None = None
    wait: bool = False
    started: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        try:
            for index, text in enumerate(self.texts):
                yield TokenEvent(request_id=request.request_id, attempt=0, index=index, token_ids=[65], text=text)
            self.started.set()
            if self.wait:
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
            yield TokenEvent(request_id=request.request_id, attempt=0, index=len(self.texts), finish_reason="stop")
        finally:
            self.stopped.set()

    async def ready(self) -> bool:
        if self.error is not None:
            raise self.error
        return True


@dataclass(frozen=True)
class RunningApi:
    url: str
    api: Api
    loop: asyncio.AbstractEventLoop


@contextmanager
def running_api(
    make_backend: Callable[[], Backend],
    limits: ApiLimits | None = None,
    model: FakeModel | None = None,
    keys: ApiKeys = ApiKeys(),
) -> Iterator[RunningApi]:
    """The OpenAI API in front of one backend."""
    context = ApiContext(make_backend(), byte_tokenizer(), model or FakeModel(), limits or ApiLimits())
    api = Api([context], keys, echo_request_id=True)
    with listening(api) as (url, loop):
        yield RunningApi(url, api, loop)


@contextmanager
def listening(app: HttpApp) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """A uvicorn server on a free port of the loopback interface, in a thread of its own: its URL and event loop."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=1)
    )
    started = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    server_startup = server.startup

    async def startup(*args: object, **kwargs: object) -> None:
        await server_startup(*args, **kwargs)  # type: ignore[arg-type]
        loops.append(asyncio.get_running_loop())
        started.set()

    server.startup = startup  # type: ignore[method-assign,assignment]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(20), "the server did not start"
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", loops[0]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert response.headers["x-request-id"]
    return error
