"""What is done to a deployment: faults of processes on this machine and of hosts, and changes by command."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import ray

from deepseek_ray.actors.deployment import change_deployment, deployment_status
from deepseek_ray.chaos.history import Fault
from deepseek_ray.chaos.hosts import Hosts
from deepseek_ray.control.plan import Role
from deepseek_ray.errors import DeploymentError

CHANGE_SECONDS = 120.0
"""Longest wait for a change by command."""


class Nemesis:
    """Acts on one deployment. `random` chooses among equals; every act is written down."""

    def __init__(
        self,
        deployment: str,
        choose: random.Random,
        hosts: Hosts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`hosts`: where the deployment runs, for the faults of hosts."""
        self._deployment = deployment
        self._hosts = hosts
        self._choose = choose
        self._clock = clock
        self.faults: list[Fault] = []

    def kill(self, role: Role) -> None:
        """SIGKILL to one process of a role."""
        row = self._pick(role)
        self._act(f"kill {role}", row, lambda: _kill(row["pid"]))

    def stop(self, role: Role, seconds: float) -> None:
        """SIGSTOP to one process of a role, SIGCONT after some seconds."""
        row = self._pick(role)
        self._act(f"stop {role} {seconds:g} s", row, lambda: _stop(row["pid"], seconds))

    def power_off(self, role: Role) -> None:
        """End the host of one member at once, its raylet and everything else on it."""
        row = self._pick(role)
        hosts, host = self._host_of(row)
        self._act(f"power off the host of {role}", row, lambda: hosts.power_off(host))

    def cut_off(self, role: Role, seconds: float) -> None:
        """Let no packet to or from the host of one member for some seconds."""
        row = self._pick(role)
        hosts, host = self._host_of(row)

        def cut() -> None:
            hosts.cut(host)
            try:
                time.sleep(seconds)
            finally:
                hosts.heal(host)

        self._act(f"cut off the host of {role} {seconds:g} s", row, cut)

    def command(self, name: str, *wishes: tuple[Any, ...]) -> None:
        """One of the router's commands, several times with other wishes, each waited for."""

        def change() -> None:
            for wish in wishes:
                change_deployment(self._deployment, name, *wish, wait_seconds=CHANGE_SECONDS)

        self._act(f"{name} {', '.join(map(str, wishes))}", None, change)

    def drain_any_shard(self) -> None:
        """Drain one expert shard, then add another, so that there are as many as before."""
        shards = self.ids("expert_shard")
        row = self._pick("expert_shard")

        def change() -> None:
            change_deployment(self._deployment, "drain", "expert_shard", row["id"], wait_seconds=CHANGE_SECONDS)
            change_deployment(self._deployment, "scale", None, len(shards), wait_seconds=CHANGE_SECONDS)

        self._act("drain expert_shard", row, change)

    def ids(self, role: Role) -> list[int]:
        """Of the members of a role that are ready."""
        return [row["id"] for row in self._rows(role)]

    def _host_of(self, row: dict[str, Any]) -> tuple[Hosts, int]:
        assert self._hosts is not None, "a fault of hosts needs a cell with hosts"
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        return self._hosts, self._hosts.host_of(addresses[row["node_id"]])

    def _act(self, name: str, row: dict[str, Any] | None, act: Callable[[], None]) -> None:
        struck = self._clock()
        act()
        target = f"{row['role']}/{row['id']} pid {row['pid']}" if row else self._deployment
        self.faults.append(Fault(name, target, struck, self._clock()))

    def _pick(self, role: Role) -> dict[str, Any]:
        rows = self._rows(role)
        if not rows:
            raise DeploymentError(f"no {role} of {self._deployment!r} is ready, so none can be struck")
        return self._choose.choice(rows)

    def _rows(self, role: Role) -> list[dict[str, Any]]:
        rows = deployment_status(self._deployment)["actors"]
        return [row for row in rows if row["role"] == role and row["state"] == "ready"]


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    if psutil.pid_exists(pid):
        psutil.Process(pid).wait(timeout=30)


def _stop(pid: int, seconds: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)
