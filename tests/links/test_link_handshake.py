"""Who is let in, who is not, and that the listener lives on either way."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from deepseek_ray.errors import LinkClosedError, LinkError
from deepseek_ray.links import handshake
from deepseek_ray.links.base import Endpoints, Link, LinkLimits
from deepseek_ray.links.connect import connect, listen
from deepseek_ray.links.frame import Frame, FrameKind, encode_header
from deepseek_ray.links.handshake import Identity, new_secret, prove_as_client, prove_as_server
from deepseek_ray.links.listener import Listener
from tests.links.strangers import ME, assert_serves, dial, read_to_the_end, wait_for_rejections

Serve = Callable[..., Listener]
Pair = Callable[..., tuple[Link, Link]]
QUICK = LinkLimits(handshake_timeout_seconds=0.3)
both_media = pytest.mark.parametrize("medium", ["shared_memory", "tcp"])


@both_media
def test_both_ends_know_whom_they_talk_to(serve: Serve, secret: bytes, medium: str) -> None:
    listener = serve(medium, incarnation=11)
    with connect(listener.endpoints, "node-a", "test", secret, medium, incarnation=22) as link:
        accepted = listener.accept(10)
        assert accepted is not None
        with accepted:
            assert (link.peer_incarnation, accepted.peer_incarnation) == (11, 22)
            assert link.peer == f"pid {os.getpid()} on node node-a ({'TCP' if medium == 'tcp' else 'shared memory'})"


@both_media
def test_another_secret_is_refused_at_both_ends(serve: Serve, secret: bytes, medium: str) -> None:
    listener = serve(medium)
    with pytest.raises(LinkError, match="does not hold the secret of deployment 'test'"):
        connect(listener.endpoints, "node-a", "test", new_secret(), medium)
    wait_for_rejections(listener, 1)
    assert "may hold another secret" in listener.last_rejection
    assert listener.accept(0) is None
    assert_serves(listener, secret, medium)


@pytest.mark.parametrize("wrong", ["secret", "deployment", "medium"])
def test_the_server_checks_a_client_that_does_not_check_the_server(
    secret: bytes, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, me = handshake._check_mac, threading.current_thread()

    def only_in_the_server(*arguments: Any) -> None:
        if threading.current_thread() is not me:
            check(*arguments)

    monkeypatch.setattr(handshake, "_check_mac", only_in_the_server)
    right = {"secret": secret, "deployment": "test", "medium": "tcp", "identity": ME}
    other = {"secret": new_secret(), "deployment": "other", "medium": "shared_memory"}
    ours, theirs = socket.socketpair()
    deadline = time.monotonic() + 10

    def serve_once() -> Identity:
        with ours:  # closed afterwards, so the client sees the end
            return prove_as_server(ours, **right, deadline=deadline)

    with theirs, ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve_once)
        with pytest.raises(LinkError, match="closed the connection"):
            prove_as_client(theirs, **{**right, wrong: other[wrong]}, deadline=deadline)
        with pytest.raises(LinkError, match="does not hold the secret"):
            serving.result(10)


def test_a_proof_sent_back_to_its_sender_is_refused(secret: bytes) -> None:
    ours, theirs = socket.socketpair()
    deadline = time.monotonic() + 10
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        proving = pool.submit(
            prove_as_server, ours, secret=secret, deployment="test", medium="tcp", identity=ME, deadline=deadline
        )
        hello = handshake._hello(ME)
        theirs.sendall(hello)
        answer = b""
        while len(answer) < len(hello) + handshake.MAC_BYTES:
            answer += theirs.recv(4096)
        theirs.sendall(answer[-handshake.MAC_BYTES :])
        with pytest.raises(LinkError, match="does not hold the secret"):
            proving.result(10)


@both_media
def test_a_silent_client_blocks_nobody_and_is_dropped(serve: Serve, secret: bytes, medium: str) -> None:
    listener = serve(medium, QUICK)
    with dial(listener.endpoints, medium) as silent:
        assert_serves(listener, secret, medium)
        read_to_the_end(silent)
    wait_for_rejections(listener, 1)
    assert "in time" in listener.last_rejection


def test_a_client_that_drips_bytes_is_dropped_in_time(serve: Serve) -> None:
    listener = serve("tcp", QUICK)
    start = time.monotonic()
    with dial(listener.endpoints, "tcp") as dripping:
        dripping.settimeout(0.02)
        with suppress(ConnectionError):
            while True:
                dripping.sendall(b"D")
                with suppress(TimeoutError):
                    if not dripping.recv(1):
                        break
    assert time.monotonic() - start < 3


def test_a_flood_of_silent_clients_leaves_room_for_others(serve: Serve, secret: bytes) -> None:
    listener = serve("tcp", LinkLimits(handshake_timeout_seconds=30, max_pending_handshakes=4))
    flood = [dial(listener.endpoints, "tcp") for _ in range(20)]
    try:
        assert_serves(listener, secret, "tcp")
        wait_for_rejections(listener, 16)
    finally:
        for sock in flood:
            sock.close()


@both_media
def test_garbage_instead_of_a_handshake_is_refused(serve: Serve, secret: bytes, medium: str) -> None:
    listener = serve(medium, QUICK)
    chance = random.Random(4)
    pieces = [b"GET / HTTP/1.1\r\n\r\n" * 4, b"DSRLINK1" + b"\xff" * 200, b"DSRLINK1" + bytes(200)]
    pieces += [chance.randbytes(chance.randrange(300)) for _ in range(20)]
    for piece in pieces:
        with dial(listener.endpoints, medium) as sock, suppress(OSError):
            sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)
            read_to_the_end(sock)
    wait_for_rejections(listener, len(pieces))
    assert listener.accept(0) is None
    assert_serves(listener, secret, medium)


def drain(link: Link) -> None:
    while (frame := link.receive(10)) is not None:  # a change in a field without a check leaves a valid frame
        frame.release()


def garbage(chance: random.Random, medium: str) -> bytes:
    """Random bytes, or a valid stream with a few bytes changed."""
    if chance.random() < 0.3:
        return b"\x00" + chance.randbytes(chance.randrange(100, 500))
    header = encode_header(Frame(FrameKind.EXPERT_CALL), 10)
    prefix = bytes([chance.randrange(7), chance.choice((0, 0, 1, 255)), *chance.randbytes(6)])
    data = bytearray((b"" if medium == "tcp" else prefix) + header + chance.randbytes(200))
    for _ in range(chance.randrange(1, 4)):
        data[chance.randrange(16)] = chance.randrange(256)
    return bytes(data)


@both_media
def test_garbage_from_a_proved_peer_ends_the_link_and_nothing_else(serve: Serve, secret: bytes, medium: str) -> None:
    listener = serve(medium)
    chance = random.Random(5)
    num_refused = 0
    for _ in range(60):
        with dial(listener.endpoints, medium) as sock:
            deadline = time.monotonic() + 10
            prove_as_client(sock, secret=secret, deployment="test", medium=medium, identity=ME, deadline=deadline)
            link = listener.accept(10)
            assert link is not None
            sock.sendall(garbage(chance, medium))
            sock.shutdown(socket.SHUT_WR)
            with link, pytest.raises(LinkError) as caught:
                drain(link)
            num_refused += not isinstance(caught.value, LinkClosedError)
    assert num_refused > 40
    assert_serves(listener, secret, medium)


@pytest.mark.parametrize("num_descriptors", [1, 3, 20])
def test_descriptors_that_nobody_asked_for_are_closed(serve: Serve, secret: bytes, num_descriptors: int) -> None:
    """The autouse check of open descriptors is the assertion."""
    listener = serve("shared_memory")
    with dial(listener.endpoints, "shared_memory") as sock:
        deadline = time.monotonic() + 10
        prove_as_client(sock, secret=secret, deployment="test", medium="shared_memory", identity=ME, deadline=deadline)
        link = listener.accept(10)
        assert link is not None
        socket.send_fds(sock, [b"\x05\x00\x08\x00\x00\x10\x00\x00"], [0] * num_descriptors)
        with link, pytest.raises(LinkError, match=r"descriptors|memory of"):
            link.receive(10)


def test_auto_is_shared_memory_on_one_node_and_tcp_between_nodes(serve: Serve, secret: bytes) -> None:
    endpoints = serve().endpoints
    with connect(endpoints, "node-a", "test", secret) as near, connect(endpoints, "node-b", "test", secret) as far:
        assert "shared memory" in near.peer
        assert "TCP" in far.peer


def test_auto_takes_tcp_where_the_unix_socket_does_not_answer(serve: Serve, secret: bytes) -> None:
    endpoints = msgspec.structs.replace(serve().endpoints, unix_name="deepseek_ray/nobody")
    with connect(endpoints, "node-a", "test", secret) as link:
        assert "TCP" in link.peer
    with pytest.raises(LinkError, match="shared_memory: cannot connect"):
        connect(endpoints, "node-a", "test", secret, "shared_memory")


def test_a_transport_that_cannot_work_is_refused_before_dialling(serve: Serve, secret: bytes) -> None:
    with pytest.raises(LinkError, match="shared memory needs one node"):
        connect(serve("shared_memory").endpoints, "node-b", "test", secret)
    with pytest.raises(LinkError, match="TCP a listener that takes it"):
        connect(serve("shared_memory").endpoints, "node-a", "test", secret, "tcp")


def test_a_restarted_listener_is_not_taken_for_the_old_one(serve: Serve, secret: bytes) -> None:
    endpoints = msgspec.structs.replace(serve(incarnation=2).endpoints, incarnation=1)
    with pytest.raises(LinkError, match="incarnation 2, not 1"):
        connect(endpoints, "node-a", "test", secret)


def test_nobody_there_is_said_within_the_time_out(secret: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoints = Endpoints(
            node_id="node-a", unix_name=None, tcp_host="127.0.0.1", tcp_port=silent.getsockname()[1], incarnation=1
        )
        start = time.monotonic()
        with pytest.raises(LinkError, match=r"within 0\.3 s.*in time"):
            connect(endpoints, "node-a", "test", secret, timeout=0.3)
        assert time.monotonic() - start < 3
    with pytest.raises(LinkError, match="Connection refused"):
        connect(endpoints, "node-a", "test", secret, timeout=5)


def test_bad_arguments_are_refused(secret: bytes) -> None:
    with pytest.raises(LinkError, match="3 bytes, it must have 32"):
        listen("node-a", "127.0.0.1", "test", b"abc")
    with pytest.raises(LinkError, match=r"cannot listen on '203\.0\.113\.1'"):
        listen("node-a", "203.0.113.1", "test", secret)
    with pytest.raises(LinkError, match="num_slots is 256; it must be between 1 and 255"):
        LinkLimits(num_slots=256)


def test_closing_a_listener_ends_what_nobody_has_accepted(serve: Serve, secret: bytes) -> None:
    listener = serve("tcp")
    with connect(listener.endpoints, "node-a", "test", secret) as link, dial(listener.endpoints, "tcp") as silent:
        with ThreadPoolExecutor(1) as pool:
            taken = listener.accept(10)
            waiting = pool.submit(listener.accept)
            second = connect(listener.endpoints, "node-a", "test", secret)
            third = connect(listener.endpoints, "node-a", "test", secret)
            other = waiting.result(10)
            listener.close()
            listener.close()
        read_to_the_end(silent)
        assert taken is not None
        assert other is not None
        for ours in (taken, other, link, second, third):
            ours.close()
        for _ in range(2):
            with pytest.raises(LinkClosedError, match="closed here"):
                listener.accept()
