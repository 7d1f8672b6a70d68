"""TCP links where Ray's TLS switch is on."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deepseek_ray.errors import LinkClosedError, LinkError
from deepseek_ray.links.base import Link
from deepseek_ray.links.connect import listen
from deepseek_ray.links.frame import Frame, FrameKind
from deepseek_ray.links.handshake import prove_as_client
from deepseek_ray.links.listener import Listener
from tests.links.strangers import ME, assert_serves, dial, read_to_the_end, wait_for_rejections

Serve = Callable[..., Listener]
Pair = Callable[..., tuple[Link, Link]]


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
