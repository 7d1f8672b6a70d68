"""A client's link to an attention worker that says nothing: who is asked, and what becomes of its requests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import msgspec
import pytest

import deepseek_ray.actors.worker_stream as worker_stream
from deepseek_ray.actors.worker_stream import WorkerStream, WorkerStreams
from deepseek_ray.control.reports import WorkerView
from deepseek_ray.errors import LinkError
from deepseek_ray.links.base import Link
from deepseek_ray.links.connect import connect, listen
from deepseek_ray.links.frame import Frame, message_frame, read_message
from deepseek_ray.links.listener import Listener
from deepseek_ray.messages import GenerateRequest, SamplingParams, TokenEvent, TokenEvents

SECRET = b"s" * 32
REQUESTS = msgspec.msgpack.Decoder(GenerateRequest)
REQUEST = GenerateRequest(request_id="r", prompt_token_ids=[1], params=SamplingParams())


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    monkeypatch.setattr(worker_stream, "SILENT_SECONDS", 0.1)
    with listen("node", "127.0.0.1", "d", SECRET) as listener:
        yield listener


class Router:
    """Says what it was told to, and remembers of whom it was asked."""

    def __init__(self, *answers: bool) -> None:
        self._answers = list(answers)
        self.asked: list[int] = []
        self.was_asked = asyncio.Event()

    async def hangs(self, worker: WorkerView) -> bool:
        self.asked.append(worker.id)
        self.was_asked.set()
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def open_stream(listener: Listener, router: Router) -> tuple[WorkerStream, Link]:
    """The stream and the worker's end of its link."""
    view = WorkerView(7, 1, listener.endpoints)
    stream = WorkerStream(
        connect(listener.endpoints, "node", "d", SECRET), view, asyncio.get_running_loop(), router.hangs
    )
    link = listener.accept(10)
    assert link is not None
    return stream, link


def test_requests_leave_a_worker_that_is_silent_and_lost_to_the_router(listener: Listener) -> None:
    async def check() -> None:
        router = Router(False, False, True)
        stream, link = open_stream(listener, router)
        events = stream.open(REQUEST)
        assert await asyncio.wait_for(events.get(), 10) is None
        assert router.asked == [7, 7, 7], "twice the router still heard it"
        assert not stream.alive
        link.close()

    asyncio.run(check())


def test_a_worker_that_takes_nothing_holds_up_nobody_else(listener: Listener) -> None:
    async def check() -> None:
        stream, link = open_stream(listener, Router(False))
        takes, taken, send = threading.Event(), threading.Event(), stream._link.send

        def send_when_it_takes(frame: Frame) -> None:
            takes.wait(10)
            taken.set()
            send(frame)

        stream._link.send = send_when_it_takes  # type: ignore[method-assign]
        stream.open(REQUEST)
        assert not taken.is_set(), "the event loop has waited for the worker"
        takes.set()
        assert read_message(link.receive(10), REQUESTS) == REQUEST  # type: ignore[arg-type]
        stream.close()
        link.close()

    asyncio.run(check())


def test_a_request_for_a_stream_that_has_ended_goes_elsewhere(listener: Listener) -> None:
    async def check() -> None:
        stream, link = open_stream(listener, Router(False))
        link.close()
        events = stream.open(REQUEST)
        assert await asyncio.wait_for(events.get(), 10) is None
        assert await asyncio.wait_for(stream.open(REQUEST).get(), 10) is None

    asyncio.run(check())


def test_a_worker_that_owes_nothing_may_be_silent(listener: Listener) -> None:
    async def check() -> None:
        router = Router(True)
        stream, link = open_stream(listener, router)
        await asyncio.sleep(0.3)  # three times as long as one that owes something may be
        assert not router.asked
        events = stream.open(REQUEST)
        last = TokenEvent(request_id="r", attempt=0, index=0, token_ids=[5], finish_reason="stop")
        link.send(message_frame(TokenEvents([last])))
        assert await asyncio.wait_for(events.get(), 10) == last
        stream.forget("r", abort=False)
        await asyncio.sleep(0.3)
        assert not router.asked
        assert stream.alive
        stream.close()
        link.close()

    asyncio.run(check())


def test_every_event_is_a_sign_of_life(listener: Listener) -> None:
    async def check() -> None:
        router = Router(True)
        stream, link = open_stream(listener, router)
        events = stream.open(REQUEST)
        for index in range(20):
            event = TokenEvent(request_id="r", attempt=0, index=index, token_ids=[5])
            link.send(message_frame(TokenEvents([event])))
            assert await asyncio.wait_for(events.get(), 10) == event
            await asyncio.sleep(0.02)
        assert not router.asked, "20 events over four times the silence that is allowed"
        stream.close()
        link.close()

    asyncio.run(check())


def test_a_worker_that_cannot_be_reached_holds_nobody_else_up(listener: Listener) -> None:
    """Its host is cut off: each attempt to connect takes its whole time-out."""
    given_up, attempts = threading.Event(), list[int]()

    def connect_or_wait(worker: WorkerView) -> Link:
        attempts.append(worker.id)
        if worker.id == 7:
            given_up.wait(10)
            raise LinkError("no link within 5 s")
        return connect(listener.endpoints, "node", "d", SECRET)

    async def check() -> None:
        streams = WorkerStreams(connect_or_wait, Router(False).hangs)
        lost = [asyncio.create_task(streams.get(WorkerView(7, 1, listener.endpoints))) for _ in range(20)]
        other = await asyncio.wait_for(streams.get(WorkerView(8, 1, listener.endpoints)), 5)
        assert other.alive
        assert not any(task.done() for task in lost)
        given_up.set()
        assert all(isinstance(error, LinkError) for error in await asyncio.gather(*lost, return_exceptions=True))
        assert attempts.count(7) == 1, "who waited for the first attempt does not try in vain again"
        assert await streams.get(WorkerView(8, 1, listener.endpoints)) is other
        streams.close()
        assert not other.alive

    asyncio.run(check())
