"""Work ends in time over real HTTP: under overload, when a client leaves, at a deadline, while the server drains."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import httpx
import pytest
from api_server import MODEL, EngineBackend, RunningApi, ScriptedBackend, error_of, running_api

from deepseek_ray.serving.limits import ApiLimits

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


class HeldRequest:
    """A request that is sent and not read; leaving closes its connection."""

    def __init__(self, running: RunningApi, asked: dict[str, Any]) -> None:
        host, port = running.url.removeprefix("http://").split(":")
        body = json.dumps(asked).encode()
        self._socket = socket.create_connection((host, int(port)), timeout=10)
        self._socket.sendall(
            b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (CHAT.encode(), len(body), body)
        )

    def __enter__(self) -> socket.socket:
        return self._socket

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def test_overload_is_answered_at_once_and_ends_with_the_load() -> None:
    backend = ScriptedBackend(wait=True)
    with running_api(lambda: backend, ApiLimits(max_concurrent_requests=1)) as running:
        asked = {"model": MODEL, "messages": MESSAGES}
        with httpx.Client(base_url=running.url) as client, HeldRequest(running, asked):
            assert backend.started.wait(5)
            started = time.monotonic()
            answer = client.post(CHAT, json=asked)
            assert time.monotonic() - started < 0.5
            assert error_of(answer, 429)["code"] == "overloaded"
            assert int(answer.headers["retry-after"]) >= 1
            assert client.get("/health").status_code == 200
        assert backend.stopped.wait(1)
    assert running.api.num_generating == 0


@pytest.mark.parametrize("texts", [[], ["some text"]], ids=["before the first token", "in mid-stream"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_the_work_stops_when_the_client_leaves(texts: list[str], stream: bool, n: int) -> None:
    backend = ScriptedBackend(texts=texts, wait=True)
    with running_api(lambda: backend) as running:
        with HeldRequest(running, {"model": MODEL, "messages": MESSAGES, "stream": stream, "n": n}) as connection:
            assert backend.started.wait(5)
            if stream and texts:
                assert b"200 OK" in connection.recv(100)
            assert not backend.stopped.is_set()
        assert backend.stopped.wait(1)


def test_blocks_are_free_within_a_second_after_the_client_left() -> None:
    with running_api(EngineBackend) as running:
        engine = running.api.contexts[MODEL].backend.engine  # type: ignore[attr-defined]
        asked = {"model": MODEL, "messages": MESSAGES, "stream": True, "max_tokens": 200}
        with HeldRequest(running, asked) as connection:
            connection.recv(100)
            assert engine.stats().num_kv_blocks_used > 0
        deadline = time.monotonic() + 1
        while engine.stats().num_kv_blocks_used and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.stats().num_kv_blocks_used == 0
        assert engine.stats().num_generated_tokens < 200


def test_draining_refuses_new_work_and_waits_for_what_runs() -> None:
    backend = ScriptedBackend(wait=True)
    asked = {"model": MODEL, "messages": MESSAGES}
    with running_api(lambda: backend) as running, httpx.Client(base_url=running.url) as client:

        def drain(seconds: float) -> int:
            return asyncio.run_coroutine_threadsafe(running.api.drain(seconds), running.loop).result(10)

        with HeldRequest(running, asked):
            assert backend.started.wait(5)
            assert client.get("/ready").status_code == 200
            assert drain(0.1) == 1
            assert error_of(client.get("/ready"), 503)
            refused = client.post(CHAT, json=asked)
            assert "shutting down" in error_of(refused, 503)["message"]
            assert int(refused.headers["retry-after"]) >= 1
            assert client.get("/health").status_code == 200
            assert not backend.stopped.is_set()
        assert drain(5) == 0


def test_the_deadline_is_the_servers() -> None:
    backend = ScriptedBackend(wait=True)
    with running_api(lambda: backend, ApiLimits(request_timeout_seconds=0.2)) as running:
        headers = {"x-request-timeout-seconds": "0", "x-request-disconnect-disabled": "?1"}
        started = time.monotonic()
        answer = httpx.post(
            running.url + CHAT, json={"model": MODEL, "messages": MESSAGES}, headers=headers, timeout=10
        )
        assert error_of(answer, 504)["code"] == "deadline_exceeded"
        assert time.monotonic() - started < 2.5
        assert backend.stopped.is_set()


def test_a_body_that_does_not_arrive_in_time() -> None:
    with running_api(EngineBackend, ApiLimits(body_timeout_seconds=0.2)) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            assert b" 408 " in raw.recv(4096).splitlines()[0]
