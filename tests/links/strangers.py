"""Connections as a stranger would open them, and whether the listener serves others meanwhile."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

from deepseek_ray.links.base import Endpoints
from deepseek_ray.links.connect import connect
from deepseek_ray.links.frame import Frame, FrameKind
from deepseek_ray.links.handshake import Identity
from deepseek_ray.links.listener import Listener

ME = Identity(node_id="node-a", pid=os.getpid(), incarnation=0)


def dial(endpoints: Endpoints, medium: str) -> socket.socket:
    """A bare connection, as a stranger would open it."""
    if medium == "tcp":
        return socket.create_connection((endpoints.tcp_host, endpoints.tcp_port), 10)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(10)
    sock.connect(f"\0{endpoints.unix_name}")
    return sock


def read_to_the_end(sock: socket.socket) -> None:
    with suppress(ConnectionError):
        while sock.recv(4096):
            pass


def wait_for_rejections(listener: Listener, count: int) -> None:
    deadline = time.monotonic() + 10
    while listener.num_rejected < count:
        assert time.monotonic() < deadline, f"{listener.num_rejected} of {count} rejections"
        time.sleep(0.005)


def assert_serves(listener: Listener, secret: bytes, medium: str) -> None:
    with connect(listener.endpoints, "node-a", "test", secret, medium) as link:
        accepted = listener.accept(10)
        assert accepted is not None
        with accepted:
            link.send(Frame(FrameKind.PING, sequence=5))
            frame = accepted.receive(10)
            assert frame is not None
            assert frame.sequence == 5
