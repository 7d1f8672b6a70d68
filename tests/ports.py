"""Ports for servers that tests start.

Below the kernel's range for outgoing connections (32768 on Linux): from there a port that was free when it was chosen
may be taken when the server binds it, seconds later on a loaded machine. A Ray node whose agent loses its port so ends.
"""

from __future__ import annotations

import random
import socket
from contextlib import suppress

_PORTS = range(20_000, 32_000)
_GENERATOR = random.SystemRandom()
"""Two processes of the suite must not try the same ports in the same order, whatever a test seeded."""

_OF_A_NODE = (
    "node-manager", "object-manager", "metrics-export", "runtime-env-agent", "dashboard-agent-grpc",
    "dashboard-agent-listen",
)  # fmt: skip


def free_port() -> int:
    """A TCP port that nothing listens on."""
    (port,) = free_ports(1)
    return port


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports that nothing listens on."""
    ports: list[int] = []
    for port in _GENERATOR.sample(_PORTS, len(_PORTS)):
        if len(ports) == count:
            return ports
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
    raise OSError(f"fewer than {count} free ports from {_PORTS.start} to {_PORTS.stop - 1}")


def node_ports() -> list[str]:
    """Options of `ray start`: a port for every server of a node that would otherwise draw one."""
    return [f"--{name}-port={port}" for name, port in zip(_OF_A_NODE, free_ports(len(_OF_A_NODE)), strict=True)]
