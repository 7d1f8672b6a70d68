"""A server's claim on this machine: one live server per name, one per port, and nothing left of dead ones."""

from __future__ import annotations

import multiprocessing
import os
import socket
import stat
from pathlib import Path

import msgspec
import psutil
import pytest

from deepseek_ray.errors import DeploymentError
from deepseek_ray.serving.claim import ServerClaim
from deepseek_ray.serving.port import ReservedPort, is_loopback, url_host
from deepseek_ray.serving.state_file import ServerState, live_servers, state_directory
from tests.ports import free_port


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "deepseek_ray"


def test_the_file_is_private_says_where_and_goes_with_the_claim(directory: Path) -> None:
    port = free_port()
    claim = ServerClaim("one", "127.0.0.1", port)
    (file,) = directory.glob("*.json")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert live_servers()[0].address is None
    claim.publish("10.0.0.1:6379", "token")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (state,) = live_servers()
    assert (state.name, state.pid, state.port) == ("one", os.getpid(), port)
    assert (state.address, state.auth_mode) == ("10.0.0.1:6379", "token")
    claim.release()
    claim.release()
    assert live_servers() == []
    assert list(directory.iterdir()) == []


def test_a_name_is_claimed_once_while_its_process_lives() -> None:
    first = ServerClaim("one", "127.0.0.1", free_port())
    with pytest.raises(DeploymentError, match=rf"'one' is being served already \(process {os.getpid()}.*--name"):
        ServerClaim("one", "127.0.0.1", free_port())
    other = ServerClaim("two", "127.0.0.1", free_port())
    assert [state.name for state in live_servers()] == ["one", "two"]
    first.release()
    ServerClaim("one", "127.0.0.1", free_port()).release()
    other.release()


@pytest.mark.parametrize("remains", ["dead process", "reused pid", "garbage"])
def test_what_a_dead_server_left_counts_for_nothing(remains: str) -> None:
    ended = multiprocessing.get_context("spawn").Process()
    ended.start()
    ended.join()
    assert ended.pid is not None
    pid = ended.pid if remains == "dead process" else os.getpid()
    state = ServerState(name="one", pid=pid, process_started=1.0, host="127.0.0.1", port=1)
    file = state_directory() / "one.json"
    file.write_bytes(b"{not json" if remains == "garbage" else msgspec.json.encode(state))
    assert live_servers() == []
    claim = ServerClaim("one", "127.0.0.1", free_port())
    assert [found.pid for found in live_servers()] == [os.getpid()]
    claim.release()


def test_a_later_servers_file_is_not_removed_by_an_earlier_one() -> None:
    claim = ServerClaim("one", "127.0.0.1", free_port())
    me = psutil.Process()
    later = ServerState(name="one", pid=me.pid, process_started=me.create_time(), host="later", port=2)
    (state_directory() / "one.json").write_bytes(msgspec.json.encode(later))
    claim.release()
    assert [state.host for state in live_servers()] == ["later"]


def test_a_used_port_gives_the_name_back(directory: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(DeploymentError, match="is in use by another process"),
    ):
        ServerClaim("one", "127.0.0.1", taken.getsockname()[1])
    assert list(directory.iterdir()) == []


def test_the_port_of_a_joined_cluster_is_not_reserved_before_serve_is_known() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        claim = ServerClaim("one", "127.0.0.1", taken.getsockname()[1], address="10.0.0.1:6379")
        with pytest.raises(DeploymentError, match="in use"):
            claim.reserve_port()
        claim.release()


def test_a_reserved_port_keeps_out_other_servers_but_not_serves_own_proxy(tmp_path: Path) -> None:
    port = free_port()
    reserved = ReservedPort("127.0.0.1", port, tmp_path)
    with pytest.raises(DeploymentError, match=f"port {port} on 127.0.0.1 is in use by a server that is starting"):
        ReservedPort("127.0.0.1", port, tmp_path)
    with socket.socket() as proxy, socket.socket() as client:
        proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as Serve's proxies do
        proxy.bind(("127.0.0.1", port))
        proxy.listen()
        client.connect(("127.0.0.1", port))
        proxy.accept()[0].close()
        reserved.release()
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            with pytest.raises(DeploymentError, match=f"is in use by process {os.getpid()}"):
                ReservedPort(host, port, tmp_path)
    again = ReservedPort("127.0.0.1", port, tmp_path)  # connections that are closing do not count
    again.release()
    again.release()
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize(
    ("host", "shown", "loopback"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("localhost", "localhost", True),
        ("0.0.0.0", "127.0.0.1", False),
        ("::", "[::1]", False),
        ("::1", "[::1]", True),
        ("10.0.0.7", "10.0.0.7", False),
    ],
)
def test_hosts(host: str, shown: str, loopback: bool) -> None:
    assert (url_host(host), is_loopback(host)) == (shown, loopback)
