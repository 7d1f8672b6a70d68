"""What shared memory and TCP links have in common: who reads the socket, who waits, and what happens at the end.

There is no thread per link. Whoever needs something from the peer - a receiver a frame, a sender a free slot or room
in the socket - reads the socket if nobody else does, and else waits for the one who does. So two peers that both send
large frames never wait for each other, and a single thread pays no hand-over.
"""

from __future__ import annotations

import select
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence

from deepseek_ray.errors import LinkClosedError, LinkError, LinkLostError
from deepseek_ray.links.base import Link, LinkLimits
from deepseek_ray.links.channel import EVENT_READ, EVENT_WRITE, Buffer, Channel, Readiness, socket_wait
from deepseek_ray.links.frame import Frame
from deepseek_ray.links.handshake import Identity

_RECHECK_SECONDS = 0.05  # how often a blocked writer looks whether it must read as well


class StreamLink(Link):
    """A link on a stream socket. A medium says how frames are written (`send`) and how bytes are read (`_read`)."""

    def __init__(self, channel: Channel, peer: Identity, medium: str, limits: LinkLimits) -> None:
        self.peer = f"{peer} ({medium})"
        self.peer_node_id = peer.node_id
        self.peer_incarnation = peer.incarnation
        self._channel = channel
        self._limits = limits
        self._lock = threading.RLock()  # guards everything below up to the blank line
        self._moved = threading.Condition(self._lock)  # somebody has read, or the link has failed
        self._num_waiting = 0
        self._inbox: deque[tuple[Frame, int]] = deque()  # frame, bytes of process memory it keeps
        self._inbox_bytes = 0
        self._reading = False
        self._failure: LinkError | None = None
        self._closed = False
        self._readiness: Readiness | None = None

        self._arrived: list[tuple[Frame, int]] = []  # filled by _read, belongs to the thread that reads
        self._send_lock = threading.Lock()  # one frame at a time
        self._write_lock = threading.Lock()  # one record at a time
        self._socket_wait = socket_wait(channel)

    @abstractmethod
    def _read(self) -> None:
        """Read once from the channel; `_deliver` what is complete. Raises LinkError on garbage and at the end."""

    def _on_writable(self) -> None:
        """There is room to write, which somebody watches for; called by the thread that reads."""
        self._socket_wait.watch_output(False)

    def _deliver(self, frame: Frame, private_bytes: int) -> None:
        self._arrived.append((frame, private_bytes))

    def receive(self, timeout: float | None = None) -> Frame | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while not self._inbox:
                self._raise_failure()
                if not self._advance(deadline) and not self._inbox:
                    return None
            frame, private_bytes = self._inbox.popleft()
            self._inbox_bytes -= private_bytes
            if self._readiness is not None:
                self._show_readiness()
            return frame

    def check(self, timeout: float = 0.0) -> None:
        """Read what comes within `timeout` seconds, for a later `receive`. LinkError once the link has failed."""
        with self._lock:
            self._raise_failure()
            self._advance(time.monotonic() + timeout)
            self._raise_failure()

    def fileno(self) -> int:
        with self._lock:
            if self._closed:
                raise LinkClosedError(f"the link to {self.peer} was closed here; it has no descriptor any more")
            if self._readiness is None:
                self._readiness = Readiness(self._socket_wait)
                self._show_readiness()
            return self._readiness.fileno()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._fail(LinkClosedError(f"the link to {self.peer} was closed here"))
        with self._send_lock, self._write_lock, self._lock:  # shut down, so whoever is inside is about to leave
            while self._reading:
                self._wait_for_reader(None)
            if self._readiness is not None:
                self._readiness.close()
                self._readiness = None
            self._socket_wait.close()
            self._channel.close()
            self._free()

    def _free(self) -> None:
        """Let go of what the medium holds; called once, with nobody sending or receiving."""

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(self._failure.message)

    def _fail(self, failure: LinkError) -> None:
        """The link is of no more use: remember the first reason, let the peer see the end, wake up everybody."""
        with self._lock:
            self._failure = self._failure or failure
            self._channel.shut_down()
            if self._readiness is not None:
                self._show_readiness()
            self._moved.notify_all()

    def _show_readiness(self) -> None:
        assert self._readiness is not None
        self._readiness.set(bool(self._inbox) or self._failure is not None)

    def _advance(self, deadline: float | None) -> bool:
        """With the lock held: let the socket move once, in this thread or the one that reads. False: time is up."""
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        if self._reading:
            return self._wait_for_reader(remaining)
        return bool(self._wait_and_read(remaining))

    def _advance_sender(self, deadline: float) -> bool:
        """`_advance` for a thread that waits to send: it does not read on while the inbox is full."""
        if not self._reading and self._inbox_bytes > self._limits.max_inbox_bytes:
            self._wait_for_reader(_RECHECK_SECONDS)
            return time.monotonic() < deadline
        return self._advance(deadline)

    def _wait_and_read(self, seconds: float | None) -> int:
        """With the lock held, and nobody reading: wait for the socket and read once. The events, 0 when time is up."""
        self._reading = True
        self._lock.release()
        failure: LinkError | None = None
        events = 0
        try:
            events = self._socket_wait.wait(seconds)
            if events & EVENT_WRITE:
                self._on_writable()
            if events & EVENT_READ:
                self._read()
        except LinkError as error:
            failure = error
        finally:
            self._lock.acquire()
            self._reading = False
            self._take_arrived()
            if failure is not None:
                self._fail(failure)
            if self._num_waiting:
                self._moved.notify_all()
        return events

    def _wait_for_reader(self, seconds: float | None) -> bool:
        """With the lock held: wait until the thread that reads has done so once. False when time is up."""
        self._num_waiting += 1
        try:
            return self._moved.wait(seconds)
        finally:
            self._num_waiting -= 1

    def _take_arrived(self) -> None:
        if self._arrived:
            for item in self._arrived:
                self._inbox.append(item)
                self._inbox_bytes += item[1]
            self._arrived.clear()
            if self._readiness is not None:
                self._show_readiness()

    def _write(self, parts: list[Buffer], descriptors: Sequence[int] = ()) -> None:
        """Write everything, with the write lock held. A peer that takes nothing for too long is cut off."""
        left = parts
        deadline = 0.0
        while left:
            self._raise_failure()
            try:
                count = self._channel.write(left, descriptors)
            except LinkClosedError:
                self._raise_failure()  # the link was closed here while this thread was writing
                raise
            if count:
                left, descriptors, deadline = _without(left, count), (), 0.0
                continue
            deadline = deadline or time.monotonic() + self._limits.send_timeout_seconds
            self._wait_writable()
            if time.monotonic() > deadline:
                raise self._suspect("took nothing from the socket")

    def _wait_writable(self) -> None:
        """Wait a moment for room in the socket; read meanwhile, if nobody does and there is room for what comes."""
        with self._lock:
            self._raise_failure()
            if not self._reading and self._inbox_bytes <= self._limits.max_inbox_bytes:
                self._socket_wait.watch_output(True)
                self._wait_and_read(_RECHECK_SECONDS)
                return
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLOUT)
        poll.poll(int(_RECHECK_SECONDS * 1000))

    def _suspect(self, what: str) -> LinkError:
        """Cut off a peer that does not take what is sent; the error to raise."""
        error = LinkError(
            f"{self.peer} {what} for {self._limits.send_timeout_seconds:g} s (send_timeout_seconds); it is taken for "
            "dead and the link is closed: connect again, or raise the limit if the peer is only slow"
        )
        self._fail(LinkLostError(error.message))
        return error


def _without(parts: Sequence[Buffer], count: int) -> list[Buffer]:
    """What is left of `parts` after the first `count` bytes."""
    for index, part in enumerate(parts):
        if count < len(part):
            return [memoryview(part)[count:], *parts[index + 1 :]] if count else list(parts[index:])
        count -= len(part)
    return []
