"""After a shutdown, and after `kill -9` of the driver, nothing of a deployment is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from deepseek_ray.actors.offline import ActorsBackend
from deepseek_ray.actors.record import NAMESPACE, list_deployments, read_record
from deepseek_ray.config.engine import DeploymentConfig

pytestmark = pytest.mark.cluster

ORPHAN_SECONDS = 3.0
DRIVER = """
import json, sys, time
from deepseek_ray.actors.offline import ActorsBackend
from deepseek_ray.config.engine import DeploymentConfig

config = DeploymentConfig(model_dir=sys.argv[1], dtype="float32", orphan_timeout_seconds=float(sys.argv[2]))
backend = ActorsBackend(config)
status = backend.deployment.status()
print(json.dumps({"name": backend.deployment.name, "pids": [row["pid"] for row in status["actors"]]}), flush=True)
time.sleep(600)
"""


def unix_sockets(deployment: str) -> list[str]:
    """Abstract sockets that listen under the deployment's name."""
    return [line for line in Path("/proc/net/unix").read_text().splitlines() if deployment in line]


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"after {seconds} s: {what}"
        time.sleep(0.1)


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


@pytest.fixture
def driver(trained_model: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str, list[int]]]]:
    started: list[subprocess.Popen[str]] = []

    def start(**environment: str) -> tuple[subprocess.Popen[str], str, list[int]]:
        import json
        import os

        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(trained_model), str(ORPHAN_SECONDS)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        started.append(process)
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        return process, said["name"], said["pids"]

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_shutdown_leaves_nothing(ray_cluster: None, trained_model: Path) -> None:
    memory = shared_memory()
    backend = ActorsBackend(DeploymentConfig(model_dir=str(trained_model), dtype="float32"))
    name = backend.deployment.name
    pids = [row["pid"] for row in backend.deployment.status()["actors"]]
    assert len(pids) == 4
    assert unix_sockets(name)
    backend.shutdown()
    backend.shutdown()
    assert gone(pids)
    assert not unix_sockets(name)
    assert shared_memory() <= memory
    assert read_record(name) is None
    assert not [row for row in ray.util.list_named_actors(all_namespaces=True) if row["namespace"] == NAMESPACE]


def test_kill_of_a_driver_that_joined_a_cluster(ray_cluster: None, driver: Callable[..., tuple]) -> None:
    process, name, pids = driver(RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    assert not gone(pids)
    assert name in list_deployments()
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: gone(pids), ORPHAN_SECONDS + 12, "actors outlive their owner")
    assert name not in list_deployments()
    wait_until(lambda: not unix_sockets(name), 5, f"sockets are left: {unix_sockets(name)}")


def test_kill_of_a_driver_takes_the_cluster_it_started(driver: Callable[..., tuple]) -> None:
    process, name, pids = driver()
    family = {child.pid: child.name() for child in psutil.Process(process.pid).children(recursive=True)}
    assert set(pids) <= set(family)
    # Ray's own two agents look for their GCS for a minute before they end; that is Ray's to change.
    watched = [pid for pid, title in family.items() if title not in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")]
    assert len(watched) >= len(pids) + 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: gone(watched), 20, "processes of the cluster outlive the driver that started it")
    wait_until(lambda: not unix_sockets(name), 5, f"sockets are left: {unix_sockets(name)}")
