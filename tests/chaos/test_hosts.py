"""Hosts in network namespaces, and a TCP link between two of them when the cable is pulled. Needs root."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec
import psutil
import pytest

import deepseek_ray.chaos.hosts as hosts_module
from deepseek_ray.chaos.hosts import Hosts, require_hosts
from deepseek_ray.errors import ConfigError, LinkClosedError, LinkLostError
from deepseek_ray.links.base import Endpoints, Link
from deepseek_ray.links.connect import connect
from deepseek_ray.links.frame import Frame, FrameKind

SECRET = b"s" * 32
NOTICED_SECONDS = 15.0
"""Twice what the sockets are told."""

# On the host: listens, prints where, answers every frame with itself on all links.
PEER = """
import sys, threading, msgspec
from deepseek_ray.links.connect import listen

def serve(link):
    while True:
        with link.receive() as frame:
            link.send(frame)

listener = listen("there", sys.argv[1], "d", b"s" * 32, "tcp")
print(msgspec.json.encode(listener.endpoints).decode(), flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept(None),), daemon=True).start()
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    try:
        made = Hosts(1)
    except ConfigError as error:
        pytest.skip(f"no hosts here: {error}")
    with made:
        yield made


@pytest.fixture(scope="module")
def peer(hosts: Hosts) -> Iterator[Endpoints]:
    command = hosts.command(1, [sys.executable, "-c", PEER, hosts.address(1)])
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield msgspec.json.decode(process.stdout.readline(), type=Endpoints)
        process.kill()


def dial(peer: Endpoints) -> Link:
    link = connect(peer, "here", "d", SECRET, "tcp")
    link.send(Frame(FrameKind.MESSAGE, b"x"))
    with link.receive(10) as frame:  # type: ignore[union-attr]
        assert frame.payload == b"x"
    return link


def until_the_end(link: Link) -> tuple[type[Exception], float]:
    """Which error ends a link, and after how many seconds."""
    started = time.monotonic()
    try:
        while time.monotonic() - started < NOTICED_SECONDS:
            link.receive(NOTICED_SECONDS)
    except LinkClosedError as error:
        return type(error), time.monotonic() - started
    return TimeoutError, NOTICED_SECONDS


def test_a_cut_cable_ends_links_soon_and_blames_no_process(hosts: Hosts, peer: Endpoints) -> None:
    """One link has a frame on its way that nobody confirms, the other one is idle."""
    with dial(peer) as busy, dial(peer) as idle, ThreadPoolExecutor(2) as threads:
        hosts.cut(1)
        try:
            with suppress(LinkLostError):  # on a busy machine the kernel may know already
                busy.send(Frame(FrameKind.MESSAGE, b"y"))
            ends = list(threads.map(until_the_end, (busy, idle)))
        finally:
            hosts.heal(1)
        for kind, seconds in ends:
            assert kind is LinkLostError
            assert seconds < NOTICED_SECONDS
    with dial(peer) as link:
        assert link.peer_incarnation == peer.incarnation, "the same process answers again"


def test_a_short_cut_loses_no_frame(hosts: Hosts, peer: Endpoints) -> None:
    with dial(peer) as link:
        hosts.cut(1)
        link.send(Frame(FrameKind.MESSAGE, b"y"))
        assert link.receive(0.5) is None
        hosts.heal(1)
        with link.receive(10) as frame:  # type: ignore[union-attr]
            assert frame.payload == b"y"


def test_a_power_cut_ends_everything_on_the_host_and_nothing_else(hosts: Hosts, peer: Endpoints) -> None:
    here = psutil.Process()
    before = hosts.processes(1)
    assert before
    with dial(peer) as link:
        hosts.power_off(1)
        assert not any(process.is_running() and process.status() != "zombie" for process in before)
        assert until_the_end(link)[0] in (LinkClosedError, LinkLostError)
    assert here.is_running()
    assert hosts.processes(1) == []


def test_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts_module, "_PREFIX", "drtest")
    monkeypatch.setattr(hosts_module, "_NETWORK", "10.63.0")
    try:
        hosts = Hosts(2)
    except ConfigError as error:
        pytest.skip(f"no hosts here: {error}")
    process = subprocess.Popen(hosts.command(2, ["sleep", "60"]))
    hosts.close()
    assert not psutil.pid_exists(process.pid)
    listing = subprocess.run("ip link; ip netns list", shell=True, capture_output=True, text=True, check=True).stdout
    assert "drtest" not in listing


def test_without_root_it_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="need Linux, root and the `ip` command"):
        require_hosts()
