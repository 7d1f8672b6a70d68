"""A Ray cluster of its own over several hosts of this machine: this machine is the head, each host one node."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray

from deepseek_ray.chaos.hosts import Hosts
from deepseek_ray.errors import DeploymentError

ROLE_LABEL = "deepseek-ray/role"
_RAY = str(Path(sys.executable).with_name("ray"))
_START_SECONDS = 90.0
_VERDICT_SECONDS = 15.0
"""Ray's health checks come every 3 s and wait 10 s for an answer."""
_TIGHT_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""They find the death of a node within two seconds. Ray's own take 20 and more, and forgive a network that is away for
a while."""


class HostCluster:
    """Nodes of a Ray cluster, one per host; the head is this machine. `close` ends every process of it.

    They demand the token that this process's RAY_AUTH_MODE and RAY_AUTH_TOKEN say, if they say one.
    """

    def __init__(self, hosts: Hosts, roles: Sequence[str], tight_health_checks: bool = False) -> None:
        """`roles`: value of the label `deepseek-ray/role` of each host's node."""
        self.hosts = hosts
        self._roles = list(roles)
        self._tight_health_checks = tight_health_checks
        # A short path: Ray puts sockets in it, and their paths may have 107 bytes.
        self._directory = Path(tempfile.mkdtemp(prefix="drh", dir="/tmp"))
        self._environment = {**os.environ, **(_TIGHT_HEALTH_CHECKS if tight_health_checks else {})}
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._port = _free_port(hosts.address(0))
        try:
            for host in range(hosts.count + 1):
                self.start(host)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """host:port of the cluster's GCS."""
        return f"{self.hosts.address(0)}:{self._port}"

    def start(self, host: int) -> None:
        """Start the node of a host that has none, and wait until it has joined."""
        own = self._directory / str(host)
        (own / "ray").mkdir(parents=True, exist_ok=True)
        log = own / "node.log"
        with log.open("w") as output:
            self._nodes[host] = subprocess.Popen(
                self.hosts.command(host, self._start_command(host)),
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + _START_SECONDS
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if self._nodes[host].poll() is not None or time.monotonic() > deadline:
                raise DeploymentError(f"the Ray node of host {host} did not start: {log.read_text(errors='replace')}")
            time.sleep(0.1)

    def restore(self) -> None:
        """Every node alive again, from the joined cluster's view: those that have ended are started anew, by a fault or
        because the cluster took them for dead. Waits for a verdict that was on its way when the cable was back."""
        if not self._tight_health_checks:
            time.sleep(_VERDICT_SECONDS)
        deadline = time.monotonic() + _START_SECONDS
        while missing := self._missing():
            if time.monotonic() > deadline:
                raise DeploymentError(f"the Ray nodes of hosts {missing} are not back after {_START_SECONDS:g} s")
            for host in missing:
                if self._nodes[host].poll() is not None:
                    self.hosts.power_off(host)  # whatever a node left that ended itself
                    self.start(host)
            time.sleep(0.2)

    def _missing(self) -> list[int]:
        alive = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        return [
            host
            for host, node in self._nodes.items()
            if host and (node.poll() is not None or self.hosts.address(host) not in alive)
        ]

    def close(self) -> None:
        self.hosts.close()
        for node in self._nodes.values():
            _end(node)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _start_command(self, host: int) -> list[str]:
        """Every host sees its own directory under the same path, as hosts do: Ray keeps a node's address there."""
        command = [_RAY, "start", "--block", f"--node-ip-address={self.hosts.address(host)}", "--disable-usage-stats"]
        seen = self._directory / "0" / "ray"
        if host == 0:
            command += ["--head", f"--port={self._port}", f"--temp-dir={seen}", "--include-dashboard=false"]
            client = _free_port(self.hosts.address(0))
            return [*command, f"--ray-client-server-port={client}", "--num-cpus=2", f"--labels={ROLE_LABEL}=head"]
        command += [f"--address={self.address}", "--num-cpus=2", f"--labels={ROLE_LABEL}={self._roles[host - 1]}"]
        mount = ["mount", "--bind", str(self._directory / str(host) / "ray"), str(seen)]
        return ["sh", "-c", f"{shlex.join(mount)} && exec {shlex.join(command)}"]


@contextmanager
def host_cluster(roles: Sequence[str], tight_health_checks: bool = False) -> Iterator[HostCluster]:
    """A head and one node per role, each on a host of its own; everything of it is gone afterwards."""
    with Hosts(len(roles)) as hosts:
        cluster = HostCluster(hosts, roles, tight_health_checks)
        try:
            yield cluster
        finally:
            cluster.close()


def _free_port(address: str) -> int:
    with socket.create_server((address, 0)) as probe:
        return probe.getsockname()[1]


def _end(node: subprocess.Popen[bytes]) -> None:
    """A node's processes, children included, by process id."""
    try:
        processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in reversed(processes):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)
    node.wait(10)
