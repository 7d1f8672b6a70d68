"""Several hosts on this machine: network namespaces on a bridge, whose cables can be pulled. Needs root and iproute2.

This machine's own namespace is host 0; it has the bridge. Nothing of it is left after `close`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import psutil

from deepseek_ray.errors import ConfigError

_NETWORK = f"10.{64 + os.getpid() % 64}.{os.getpid() // 64 % 256}"
"""Two of these at once on one machine must not share addresses."""
_PREFIX = f"dr{os.getpid()}"
_GONE_SECONDS = 30.0


class Hosts:
    """`count` hosts beside this one. Processes of a host are those that were started with `command`."""

    def __init__(self, count: int) -> None:
        require_hosts()
        self.count = count
        try:
            self._create()
        except BaseException:
            self.close()
            raise

    def address(self, host: int) -> str:
        """IPv4 address of a host; 0 is this machine."""
        return f"{_NETWORK}.{host + 1}"

    def host_of(self, address: str) -> int:
        return int(address.rpartition(".")[2]) - 1

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """The command that runs `command` on a host. It sees its own network and may mount without others seeing it."""
        return list(command) if host == 0 else ["ip", "netns", "exec", _host(host), *command]

    def cut(self, host: int) -> None:
        """Pull a host's cable: no packet comes or goes, and nobody is told."""
        _ip("link", "set", _port(host), "down")

    def heal(self, host: int) -> None:
        _ip("link", "set", _port(host), "up")

    def processes(self, host: int) -> list[psutil.Process]:
        """Everything that runs on a host other than this one."""
        found = []
        for pid in _ip("netns", "pids", _host(host)).split():
            try:
                found.append(psutil.Process(int(pid)))
            except psutil.NoSuchProcess:
                continue
        return found

    def power_off(self, host: int) -> None:
        """End everything that runs on a host as a power cut does: SIGKILL, and no word to anybody."""
        self.cut(host)
        processes = self.processes(host)
        for process in processes:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=_GONE_SECONDS)
        self.heal(host)

    def close(self) -> None:
        """End what still runs on the hosts, and remove them."""
        there = _ip("netns", "list").split()
        for host in range(1, self.count + 1):
            if _host(host) in there:
                self.power_off(host)
            _delete_link(_port(host))  # before its namespace, which goes when its last connection has
            if _host(host) in there:
                _ip("netns", "delete", _host(host))
        _delete_link(_PREFIX)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _create(self) -> None:
        _ip("link", "add", _PREFIX, "type", "bridge")
        _ip("address", "add", f"{self.address(0)}/24", "dev", _PREFIX)
        _ip("link", "set", _PREFIX, "up")
        for host in range(1, self.count + 1):
            name = _host(host)
            _ip("netns", "add", name)
            _ip("link", "add", _port(host), "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", _port(host), "master", _PREFIX, "up")
            _ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "route", "add", "default", "via", self.address(0))


def require_hosts() -> None:
    """Raises ConfigError where this process cannot make hosts."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        raise ConfigError(
            "faults between hosts need Linux, root and the `ip` command (package iproute2): they are network "
            "namespaces of this machine; leave these faults out, or run as root"
        )


def _host(host: int) -> str:
    return f"{_PREFIX}h{host}"


def _port(host: int) -> str:
    """The bridge's end of a host's cable."""
    return f"{_PREFIX}p{host}"


def _delete_link(name: str) -> None:
    if os.path.exists(f"/sys/class/net/{name}"):
        _ip("link", "delete", name)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout
