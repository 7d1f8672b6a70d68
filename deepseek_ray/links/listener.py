"""The accepting side: one thread takes connections, a short-lived one per connection runs its handshake.

So a silent or hostile client costs a thread for `handshake_timeout_seconds` and blocks nobody; beyond
`max_pending_handshakes` the oldest, the one most likely to be silent, is dropped.
"""

from __future__ import annotations

import logging
import os
import queue
import selectors
import socket
import ssl
import threading
import time
from types import TracebackType
from typing import Self

from deepseek_ray.errors import LinkClosedError, LinkError
from deepseek_ray.links.base import Endpoints, Link, LinkLimits, TensorWay
from deepseek_ray.links.channel import cut_off
from deepseek_ray.links.handshake import Identity, prove_as_server
from deepseek_ray.links.shared_memory import SharedMemoryLink
from deepseek_ray.links.tcp import TcpLink, shake_tls, tune, wrap

logger = logging.getLogger(__name__)
_PAUSE_SECONDS = 0.1  # after accept() failed, as it does while descriptors are short


class Listener:
    """Made by `connect.listen`. Owns the listening sockets and the links that nobody has accepted yet."""

    def __init__(
        self,
        endpoints: Endpoints,
        unix: socket.socket | None,
        tcp: socket.socket | None,
        tls: ssl.SSLContext | None,
        deployment: str,
        secret: bytes,
        limits: LinkLimits,
        tensors: TensorWay | None = None,
    ) -> None:
        self.endpoints = endpoints
        self.num_rejected = 0
        """Connections that failed the handshake."""
        self.last_rejection = ""
        """Why the last of them did."""
        self._identity = Identity(node_id=endpoints.node_id, pid=os.getpid(), incarnation=endpoints.incarnation)
        self._tls = tls
        self._deployment = deployment
        self._secret = secret
        self._limits = limits
        self._tensors = tensors
        self._ready: queue.SimpleQueue[Link | None] = queue.SimpleQueue()  # None: closed
        self._lock = threading.Lock()
        self._pending: dict[threading.Thread, socket.socket] = {}  # unfinished handshakes, oldest first
        self._threads: set[threading.Thread] = set()  # theirs, and those of handshakes that were cut off
        self._closed = False
        self._wake_read, self._wake_write = socket.socketpair()
        self._sockets = {sock: medium for sock, medium in ((unix, "shared_memory"), (tcp, "tcp")) if sock is not None}
        for sock in self._sockets:
            sock.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="link-listener", daemon=True)
        self._thread.start()

    def accept(self, timeout: float | None = None) -> Link | None:
        """The next link whose peer has proved itself; None when none came within `timeout` seconds (None waits for
        ever). Raises LinkClosedError once the listener is closed."""
        try:
            link = self._ready.get(timeout=timeout) if timeout is None or timeout > 0 else self._ready.get_nowait()
        except queue.Empty:
            return None
        if link is None:
            self._ready.put(None)  # for the next caller
            raise LinkClosedError("the listener was closed here")
        return link

    def close(self) -> None:
        """Stop listening; drop unfinished handshakes and links that nobody accepted. Harmless to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._wake_write.close()
        self._thread.join()
        with self._lock:
            for sock in self._pending.values():
                cut_off(sock)
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        while not self._ready.empty():
            if (link := self._ready.get()) is not None:
                link.close()
        self._ready.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector, self._wake_read:
            selector.register(self._wake_read, selectors.EVENT_READ)
            for sock in self._sockets:
                selector.register(sock, selectors.EVENT_READ)
            while not self._closed:
                for key, _ in selector.select():
                    if key.fileobj is not self._wake_read:
                        self._take_connection(key.fileobj)  # type: ignore[arg-type]
        for sock in self._sockets:
            sock.close()

    def _take_connection(self, listening: socket.socket) -> None:
        try:
            sock, _ = listening.accept()
        except BlockingIOError:
            return  # the client is gone again
        except OSError as error:
            logger.warning("a connection cannot be accepted: %s", error)
            time.sleep(_PAUSE_SECONDS)
            return
        thread = threading.Thread(
            target=self._shake_hands, args=(sock, self._sockets[listening]), name="link-handshake", daemon=True
        )
        with self._lock:
            if len(self._pending) >= self._limits.max_pending_handshakes:
                cut_off(self._pending.pop(next(iter(self._pending))))
            self._pending[thread] = sock
            self._threads.add(thread)
        thread.start()

    def _shake_hands(self, sock: socket.socket, medium: str) -> None:
        deadline = time.monotonic() + self._limits.handshake_timeout_seconds
        me = threading.current_thread()
        try:
            if medium == "tcp":
                tune(sock)
                sock = wrap(sock, self._tls, server=True)
                with self._lock:
                    if me in self._pending:
                        self._pending[me] = sock  # wrapping leaves the first socket object empty
                shake_tls(sock, deadline)
            peer = prove_as_server(
                sock,
                secret=self._secret,
                deployment=self._deployment,
                medium=medium,
                identity=self._identity,
                deadline=deadline,
            )
            link = finish(sock, medium, peer, self._limits)
            self._ready.put(self._with_tensors(link, peer.tensors) if peer.tensors else link)
        except (LinkError, OSError) as error:
            sock.close()
            self._count_rejection(f"{medium}: {error}")
        finally:
            with self._lock:
                self._pending.pop(me, None)
                self._threads.discard(me)

    def _with_tensors(self, link: Link, backend: str) -> Link:
        if self._tensors is None or self._tensors.name.partition(":")[0] != backend:
            raise LinkError(f"the peer wants tensors by {backend!r}, here is {self.endpoints.tensors!r}")
        return self._tensors.join(link, True, self._limits)

    def _count_rejection(self, reason: str) -> None:
        with self._lock:
            self.num_rejected += 1
            self.last_rejection = reason
            closed = self._closed
        if not closed:
            logger.warning("a connection was refused; %s", reason)


def finish(sock: socket.socket, medium: str, peer: Identity, limits: LinkLimits) -> Link:
    """The link on a socket whose two ends have proved themselves."""
    return SharedMemoryLink(sock, peer, limits) if medium == "shared_memory" else TcpLink(sock, peer, limits)
