"""One HTTP request and its reply over plain ASGI: bounded reading, one reply, nothing sent twice."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, MutableMapping
from contextlib import aclosing
from typing import Any

import msgspec

from deepseek_ray.serving.errors import ErrorReply, HttpError
from deepseek_ray.serving.stream import encode_event

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class ClientGoneError(Exception):
    """The client closed the connection; nobody reads a reply."""


class Exchange:
    """A request's head, its body on demand, and the reply. `started` is True once a reply's head is out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, echo_request_id: bool) -> None:
        self.method: str = scope["method"]
        # Only the path decides what runs: the Host header is the client's to forge.
        self.path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        self._headers: dict[bytes, bytes] = {name.lower(): value for name, value in scope["headers"]}
        self._receive = receive
        self._send = send
        sent = self.header("x-request-id")
        self.request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        """The client's own where it is short and plain, so that it is safe in logs and headers; else a fresh one."""
        self._reply_headers = {"x-request-id": self.request_id} if echo_request_id else {}
        self.started = False
        self._streaming = False

    def header(self, name: str) -> str:
        """Value of a header, empty when absent."""
        return self._headers.get(name.encode(), b"").decode("latin-1")

    async def read_body(self, max_bytes: int, timeout_seconds: float) -> bytes:
        """The body. HttpError 413 as soon as it is longer than `max_bytes`, 408 when it takes too long to arrive."""
        declared = self.header("content-length")
        if declared.isdecimal() and len(declared) < 20 and int(declared) > max_bytes:
            raise _too_large(max_bytes)
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._read_body(max_bytes)
        except TimeoutError:
            raise HttpError(
                408, f"the body did not arrive within {timeout_seconds:g} s; send it faster", "body_timeout"
            ) from None

    async def _read_body(self, max_bytes: int) -> bytes:
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            body += message.get("body", b"")
            if len(body) > max_bytes:
                raise _too_large(max_bytes)
            if not message.get("more_body", False):
                return bytes(body)

    async def unless_client_leaves(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`; when the client disconnects first, cancel it and raise ClientGoneError. The body must be read."""
        task = asyncio.ensure_future(work)
        watcher = asyncio.ensure_future(self._disconnected())
        try:
            await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGoneError
            task.result()
        finally:
            task.cancel()
            watcher.cancel()
            await asyncio.gather(task, watcher, return_exceptions=True)

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def reply(self, body: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send a JSON reply."""
        encoded = msgspec.json.encode(body)
        await self._start(
            status,
            {"content-type": "application/json", "content-length": str(len(encoded)), **(headers or {})},
        )
        await self._send({"type": "http.response.body", "body": encoded})

    async def fail(self, error: ErrorReply) -> None:
        """Tell the client what went wrong: as the reply, or as the last event of a stream that has begun."""
        if not self.started:
            await self.reply(error.body, error.status, error.headers)
        elif self._streaming:
            await self._send({"type": "http.response.body", "body": encode_event(error.body)})

    async def stream(self, pieces: AsyncGenerator[bytes, None]) -> None:
        """Send server-sent events as they come.

        The reply starts with the first piece, so that an error before it still gets its own status.
        """
        async with aclosing(pieces):
            async for piece in pieces:
                if not self.started:
                    self._streaming = True
                    await self._start(
                        200,
                        {
                            "content-type": "text/event-stream; charset=utf-8",
                            "cache-control": "no-cache",
                            "x-accel-buffering": "no",  # nginx would hold pieces back
                        },
                    )
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        self._streaming = False
        await self._send({"type": "http.response.body", "body": b""})

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        assert not self.started, "a reply is under way already"
        self.started = True
        pairs = [(name.encode(), value.encode()) for name, value in {**headers, **self._reply_headers}.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})


def _too_large(max_bytes: int) -> HttpError:
    return HttpError(
        413,
        f"the body is longer than {max_bytes} bytes, the limit of this server; send less",
        "request_too_large",
        {"connection": "close"},
    )
