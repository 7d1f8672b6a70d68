"""SIGKILL of a real process at the other end: it is seen at once, and nothing of it is left."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import msgspec
import pytest

from deepseek_ray.errors import LinkClosedError
from deepseek_ray.links.base import Link, LinkLimits
from deepseek_ray.links.frame import Frame, FrameKind
from deepseek_ray.links.listener import Listener

SEEN_WITHIN_SECONDS = 2.0
PAYLOAD = random.Random(0).randbytes(300_000)
both_media = pytest.mark.parametrize("medium", ["shared_memory", "tcp"])

# Connects, greets, then does what it is told: hold frames, or send an endless frame, until it is killed.
CHILD = """
import sys, msgspec
from deepseek_ray.links.base import Endpoints
from deepseek_ray.links.connect import connect
from deepseek_ray.links.frame import Frame, FrameKind

medium, secret, what = sys.argv[1], bytes.fromhex(sys.argv[2]), sys.argv[3]
endpoints = msgspec.json.decode(sys.stdin.readline(), type=Endpoints)
link = connect(endpoints, "node-a", "test", secret, medium)
link.send(Frame(FrameKind.MESSAGE, what.encode()))
if what == "echo":
    while True:
        with link.receive() as frame:
            link.send(Frame(FrameKind.EXPERT_REPLY, frame.payload))
if what == "send":
    while True:
        link.send(Frame(FrameKind.EXPERT_CALL, bytes(100 << 20)))
if what == "hold":
    held = [link.receive() for _ in range(3)]
    link.send(Frame(FrameKind.MESSAGE, b"held"))
sys.stdin.readline()  # "nothing": reads no frame
"""

Child = tuple[subprocess.Popen[str], Link]


@pytest.fixture
def start_child(serve: Callable[..., Listener], secret: bytes) -> Iterator[Callable[[str, str], Child]]:
    """A factory of children with a link to each; all are dead and reaped afterwards."""
    children: list[Child] = []

    def start(medium: str, what: str) -> Child:
        listener = serve(medium, LinkLimits(num_slots=4, send_timeout_seconds=20))
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, medium, secret.hex(), what], stdin=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(listener.endpoints).decode() + "\n")
        process.stdin.flush()
        link = listener.accept(30)
        assert link is not None
        children.append((process, link))
        greeting = link.receive(20)
        assert greeting is not None
        assert greeting.payload == what.encode()
        return process, link

    yield start
    for process, link in children:
        process.kill()
        process.wait(10)
        assert process.stdin is not None
        process.stdin.close()
        link.close()


def kill(process: subprocess.Popen[str]) -> float:
    process.send_signal(signal.SIGKILL)
    return time.monotonic()


def send_until_the_end(link: Link) -> None:
    while True:
        link.send(Frame(FrameKind.EXPERT_CALL, PAYLOAD))


@both_media
def test_the_end_is_seen_at_once_and_what_arrived_stays_readable(
    start_child: Callable[[str, str], Child], medium: str
) -> None:
    process, link = start_child(medium, "echo")
    for _ in range(20):
        link.send(Frame(FrameKind.EXPERT_CALL, PAYLOAD))
        frame = link.receive(20)
        assert frame is not None
        assert frame.payload == PAYLOAD
        frame.release()
    link.send(Frame(FrameKind.EXPERT_CALL, PAYLOAD))
    kept = link.receive(20)
    assert kept is not None
    killed = kill(process)
    with pytest.raises(LinkClosedError):
        link.receive(20)
    assert time.monotonic() - killed < SEEN_WITHIN_SECONDS
    assert kept.payload == PAYLOAD  # lies in memory that the dead process made
    kept.release()
    with pytest.raises(LinkClosedError):
        send_until_the_end(link)


@both_media
def test_death_in_the_middle_of_a_large_frame(start_child: Callable[[str, str], Child], medium: str) -> None:
    process, link = start_child(medium, "send")
    first = link.receive(20)
    assert first is not None
    assert select.select([link.fileno()], [], [], 20)[0]  # the second has begun, and cannot end before it is read
    killed = kill(process)
    with pytest.raises(LinkClosedError):
        link.receive(20)
    assert time.monotonic() - killed < SEEN_WITHIN_SECONDS


@both_media
@pytest.mark.parametrize("what", ["hold", "nothing"])
def test_death_of_a_reader_ends_a_send_that_waits_for_it(
    start_child: Callable[[str, str], Child], medium: str, what: str
) -> None:
    """The sender is stuck in the middle of a frame: no slot is free, the socket is full."""
    process, link = start_child(medium, what)
    if what == "hold":
        for _ in range(3):
            link.send(Frame(FrameKind.EXPERT_CALL, PAYLOAD))
        held = link.receive(20)
        assert held is not None
        assert held.payload == b"held"
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(link.send, Frame(FrameKind.EXPERT_CALL, bytes(50 << 20)))
        assert not wait([sending], timeout=0.2).done
        killed = kill(process)
        with pytest.raises(LinkClosedError):
            sending.result(20)
    assert time.monotonic() - killed < SEEN_WITHIN_SECONDS


def test_no_memory_of_a_dead_peer_is_left(start_child: Callable[[str, str], Child]) -> None:
    """Both memfds are mapped while the link lives; after the kill and `close` nobody on this machine has them."""
    process, link = start_child("shared_memory", "echo")
    link.send(Frame(FrameKind.EXPERT_CALL, PAYLOAD))
    frame = link.receive(20)
    assert frame is not None
    frame.release()
    assert num_mapped(os.getpid()) == num_mapped(process.pid) == 2
    kill(process)
    with pytest.raises(LinkClosedError):
        link.receive(20)
    del frame
    link.close()
    process.wait(10)
    assert num_mapped(os.getpid()) == 0


def num_mapped(pid: int) -> int:
    return sum("deepseek_ray_link" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
