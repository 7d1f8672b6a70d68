"""Who is let in, who is not, and that the listener lives on either way."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deepseek_ray.errors import LinkClosedError, LinkError
from deepseek_ray.links import handshake
from deepseek_ray.links.base import Endpoints, Link, LinkLimits
from deepseek_ray.links.channel import SocketWait
from deepseek_ray.links.connect import connect, listen
from deepseek_ray.links.frame import Frame, FrameKind, encode_header
from deepseek_ray.links.handshake import Identity, new_secret, prove_as_client, prove_as_server
from deepseek_ray.links.listener import Listener

Serve = Callable[..., Listener]
Pair = Callable[..., tuple[Link, Link]]
ME = Identity(node_id="node-a", pid=os.getpid(), incarnation=0)
QUICK = LinkLimits(handshake_timeout_seconds=0.3)
both_media = pytest.mark.parametrize("medium", ["shared_memory", "tcp"])


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


@pytest.fixture
def certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's TLS switch with a self-signed certificate that is its own authority."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=node"),
        ],
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", str(certificate))
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", str(key))
    monkeypatch.setenv("RAY_TLS_CA_CERT", str(certificate))


@pytest.mark.usefixtures("certificates")
def test_tls_carries_frames_both_ways_at_once(link_pair: Pair) -> None:
    ends = link_pair("tcp")
    assert "(TLS)" in ends[0].peer
    payloads = [random.Random(seed).randbytes(6_000_001) for seed in (0, 1)]

    def send_then_receive(i: int) -> None:
        for _ in range(2):
            ends[i].send(Frame(FrameKind.EXPERT_CALL, [payloads[i][:100], payloads[i][100:]]))
            ends[i].send(Frame(FrameKind.PING))
        for _ in range(2):
            frame = ends[i].receive(20)
            assert frame is not None
            assert frame.payload == payloads[1 - i]
            ping = ends[i].receive(20)
            assert ping is not None
            assert ping.kind is FrameKind.PING

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(send_then_receive, (0, 1)))
    ends[0].close()
    with pytest.raises(LinkClosedError):
        ends[1].receive(10)


@pytest.mark.usefixtures("certificates")
def test_bytes_that_tls_holds_back_are_not_forgotten(link_pair: Pair) -> None:
    """Header and payload are 80 bytes more than one read takes; the rest is decrypted, and the socket is empty."""
    client, server = link_pair("tcp")
    payload = random.Random(0).randbytes(1 << 16)
    client.send(Frame(FrameKind.EXPERT_CALL, payload))
    frame = server.receive(10)
    assert frame is not None
    assert frame.payload == payload


@pytest.mark.usefixtures("certificates")
def test_with_tls_on_a_plain_client_is_refused(serve: Serve, secret: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = serve("tcp")
    with dial(listener.endpoints, "tcp") as silent:  # must not hold up anything either, closing included
        with monkeypatch.context() as plain:
            plain.setenv("RAY_USE_TLS", "0")
            sock = dial(listener.endpoints, "tcp")
            deadline = time.monotonic() + 5
            with sock, pytest.raises(LinkError):
                prove_as_client(sock, secret=secret, deployment="test", medium="tcp", identity=ME, deadline=deadline)
        wait_for_rejections(listener, 1)
        assert "TLS" in listener.last_rejection
        assert_serves(listener, secret, "tcp")
        start = time.monotonic()
        listener.close()
        assert time.monotonic() - start < 3
        read_to_the_end(silent)


def test_a_missing_certificate_is_named(secret: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", "/nowhere/certificate.pem")
    with pytest.raises(LinkError, match=r"RAY_TLS_SERVER_CERT is '/nowhere/certificate\.pem'"):
        listen("node-a", "127.0.0.1", "test", secret)


def test_links_work_without_epoll(link_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to wait on systems other than Linux, which Linux has as well."""
    monkeypatch.setattr("deepseek_ray.links.stream.socket_wait", SocketWait)
    client, server = link_pair("tcp")
    payload = random.Random(0).randbytes(20 << 20)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(client.send, Frame(FrameKind.EXPERT_CALL, payload))
        frame = server.receive(20)
        assert frame is not None
        assert frame.payload == payload
        sending.result(20)
    assert server.receive(0) is None
    client.close()
    with pytest.raises(LinkClosedError):
        server.receive(10)
