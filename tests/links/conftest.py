"""Pairs of linked ends in one process, and a check that each test leaves no descriptor, thread or file behind."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from deepseek_ray.actors.tensor_link import TensorPlace
from deepseek_ray.links.base import Link, LinkLimits, Transport
from deepseek_ray.links.connect import connect, listen
from deepseek_ray.links.handshake import new_secret
from deepseek_ray.links.listener import Listener

Pair = Callable[..., tuple[Link, Link]]


def open_descriptors() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue  # the descriptor of listdir itself
    return sorted(found)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    gc.collect()
    before = open_descriptors(), threading.active_count(), sorted(os.listdir("/dev/shm"))
    yield
    gc.collect()
    after = open_descriptors(), threading.active_count(), sorted(os.listdir("/dev/shm"))
    assert after == before


@pytest.fixture
def secret() -> bytes:
    return new_secret()


@pytest.fixture
def serve(secret: bytes) -> Iterator[Callable[..., Listener]]:
    """A factory of listeners on node "node-a"."""
    listeners: list[Listener] = []

    def make(transport: Transport = "auto", limits: LinkLimits | None = None, **others: object) -> Listener:
        listeners.append(listen("node-a", "127.0.0.1", "test", secret, transport, limits=limits, **others))
        return listeners[-1]

    yield make
    for listener in listeners:
        listener.close()


@pytest.fixture
def link_pair(serve: Callable[..., Listener], secret: bytes) -> Iterator[Pair]:
    """A factory of two ends of one link."""
    links: list[Link] = []

    def make(medium: str, **limits: float) -> tuple[Link, Link]:
        """`medium`: a transport, or one with "+tensors"."""
        ours = LinkLimits(**limits)
        transport, _, extra = medium.partition("+")
        here, there = (TensorPlace("gloo:client"), TensorPlace("gloo:server")) if extra else (None, None)
        listener = serve(transport, ours, tensors=there)
        links.append(connect(listener.endpoints, "node-a", "test", secret, transport, limits=ours, tensors=here))
        accepted = listener.accept(10)
        assert accepted is not None
        links.append(accepted)
        return links[-2], links[-1]

    yield make
    for link in links:
        link.close()
