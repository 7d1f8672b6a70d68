"""A client's link to one attention worker: requests out, events in, for all requests that run there. No torch."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from deepseek_ray.control.reports import WorkerView
from deepseek_ray.errors import LinkError
from deepseek_ray.links.base import Link
from deepseek_ray.links.frame import message_frame, read_message
from deepseek_ray.messages import AbortRequest, GenerateRequest, TokenEvent, TokenEvents

logger = logging.getLogger(__name__)

UNREACHABLE_SECONDS = 1.0
"""For so long after a vain attempt nobody else tries: a host that is cut off costs each attempt its whole time-out."""
SILENT_SECONDS = 2.0
"""A worker that owes events and sends none for so long may hang: whether it does, the router knows."""
_DECODER = msgspec.msgpack.Decoder(TokenEvents)


class WorkerStream:
    """The link to one life of an attention worker and the queues of the requests that run there.

    `hangs(worker)` says whether a silent worker is lost to its router as well, and another one could go on.
    """

    def __init__(
        self,
        link: Link,
        worker: WorkerView,
        loop: asyncio.AbstractEventLoop,
        hangs: Callable[[WorkerView], Awaitable[bool]],
    ) -> None:
        self.incarnation = worker.incarnation
        self.alive = True
        self._link = link
        self._worker = worker
        self._loop = loop
        self._hangs = hangs
        self._queues: dict[str, asyncio.Queue[TokenEvent | None]] = {}
        self._heard = time.monotonic()
        self._watch = loop.create_task(self._watch_silence())
        self._outbox: queue.SimpleQueue[GenerateRequest | AbortRequest | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name=f"read {link.peer}", daemon=True).start()
        threading.Thread(target=self._write, name=f"write {link.peer}", daemon=True).start()

    def open(self, request: GenerateRequest) -> asyncio.Queue[TokenEvent | None]:
        """Send the request; its events come out of the queue, None when the worker is gone."""
        if not self._queues:
            self._heard = time.monotonic()  # it owed nothing until now
        events: asyncio.Queue[TokenEvent | None] = asyncio.Queue()
        self._queues[request.request_id] = events
        if self.alive:
            self._outbox.put(request)
        else:
            events.put_nowait(None)
        return events

    def forget(self, request_id: str, abort: bool) -> None:
        self._queues.pop(request_id, None)
        if abort and self.alive:
            self._outbox.put(AbortRequest(request_id=request_id))

    def close(self) -> None:
        self.alive = False
        self._watch.cancel()
        self._link.close()
        self._outbox.put(None)

    def _write(self) -> None:
        """In a thread: a worker that is stopped takes nothing for seconds, in which the event loop serves the others.

        When the link ends, the thread that reads says so.
        """
        while (message := self._outbox.get()) is not None:
            try:
                self._link.send(message_frame(message))
            except LinkError:
                self._link.close()
                return

    async def _watch_silence(self) -> None:
        """A process that is stopped, or whose host is cut off, keeps its link open and says nothing."""
        while True:
            await asyncio.sleep(SILENT_SECONDS / 2)
            if self._queues and time.monotonic() - self._heard > SILENT_SECONDS and await self._hangs(self._worker):
                logger.warning("attention worker %d hangs; its requests go elsewhere", self._worker.id)
                self._end(None)
                return

    def _read(self) -> None:
        """In a thread: frames to the event loop until the link ends."""
        try:
            while True:
                frame = self._link.receive()
                if frame is not None:
                    self._hand_over(self._deliver, read_message(frame, _DECODER).events)
        except LinkError as error:
            logger.info("link to %s ended: %s", self._link.peer, error)
        self._hand_over(self._end, None)

    def _hand_over(self, call: Any, argument: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, argument)
        except RuntimeError:
            logger.debug("the event loop is closed; %s is not read any more", self._link.peer)

    def _deliver(self, events: list[TokenEvent]) -> None:
        self._heard = time.monotonic()
        for event in events:
            target = self._queues.get(event.request_id)
            if target is not None:
                target.put_nowait(event)

    def _end(self, _: None) -> None:
        """Every request that runs here learns that it does not any more."""
        self.close()
        for events in self._queues.values():
            events.put_nowait(None)


class WorkerStreams:
    """A client's streams, one to each attention worker, opened when first asked for. Belongs to one event loop."""

    def __init__(self, connect: Callable[[WorkerView], Link], hangs: Callable[[WorkerView], Awaitable[bool]]) -> None:
        """`connect` is called in threads."""
        self._connect = connect
        self._hangs = hangs
        self._streams: dict[int, WorkerStream] = {}
        self._opening: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._failed: dict[tuple[int, int], float] = {}

    async def get(self, worker: WorkerView) -> WorkerStream:
        """The open stream to this life of the worker. Nobody waits for the opening of another worker's.

        Raises LinkError or OSError when it cannot be reached.
        """
        life = worker.id, worker.incarnation
        async with self._opening[worker.id]:
            stream = self._streams.get(worker.id)
            if stream is not None and stream.alive and stream.incarnation == worker.incarnation:
                return stream
            if stream is not None:
                stream.close()
            if time.monotonic() - self._failed.get(life, -math.inf) < UNREACHABLE_SECONDS:
                raise LinkError(f"attention worker {worker.id} could not be reached a moment ago")
            try:
                link = await asyncio.to_thread(self._connect, worker)
            except (LinkError, OSError):
                self._failed[life] = time.monotonic()
                raise
            stream = WorkerStream(link, worker, asyncio.get_running_loop(), self._hangs)
            self._streams[worker.id] = stream
            return stream

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
