"""A Ray head node of its own for tests: token authentication on, everything under one temporary directory."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.ports import free_ports, node_ports

RAY = Path(sys.executable).with_name("ray")
_HEAD_ID = "f" * 51 + "00000"  # Ray's fake provider expects this one
_AUTOSCALER = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
}
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class HeadNode:
    """A head node that demands a token."""

    address: str
    """Of the dashboard, where jobs are submitted."""
    gcs_address: str
    """What drivers join."""
    environment: dict[str, str]
    """With the token, and a PATH on which `python` is not the environment's."""
    directory: Path


@contextmanager
def head_node(
    variables: Mapping[str, str] | None = None, node_type: Mapping[str, Any] | None = None
) -> Iterator[HeadNode]:
    """`ray start --head` with 2 CPUs; every process of it is gone afterwards. `variables`: more of its environment.

    `node_type`: what the autoscaler may start, `{"resources": ..., "labels": ..., "max_workers": n}`; the nodes are
    further processes here (Ray's fake provider).
    """
    # A short path: Ray puts sockets in it, and their paths may have 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="dr-", dir="/tmp"))
    (directory / "home").mkdir()
    (directory / "bin").mkdir()
    (directory / "bin" / "python").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    environment = {
        "PATH": f"{directory / 'bin'}:/usr/bin:/bin",
        "HOME": str(directory / "home"),
        "LANG": "C.UTF-8",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TMPDIR": str(directory / "ray"),
        **(variables or {}),
    }
    gcs, dashboard, client = free_ports(3)
    command = [
        str(RAY), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", *node_ports(),
        f"--temp-dir={directory / 'ray'}", "--num-cpus=2", "--disable-usage-stats",
    ]  # fmt: skip
    if node_type is not None:
        environment |= _AUTOSCALER
        command.append(f"--autoscaling-config={_write_autoscaling(directory, f'127.0.0.1:{gcs}', node_type)}")
    with (directory / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=directory)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        _wait_until_up(address, environment["RAY_AUTH_TOKEN"], head, directory / "head.log")
        yield HeadNode(address, f"127.0.0.1:{gcs}", environment, directory)
        assert head.poll() is None, f"the head node ended early: {(directory / 'head.log').read_text()}"
    finally:
        _stop(head)
        shutil.rmtree(directory, ignore_errors=True)


def _write_autoscaling(directory: Path, gcs_address: str, node_type: Mapping[str, Any]) -> Path:
    file = directory / "autoscaling.yaml"
    types = {
        "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
        "ray.worker": {"node_config": {}, "min_workers": 0, **node_type},
    }
    values = {
        "cluster_name": "autoscaled",
        "max_workers": node_type["max_workers"],
        "idle_timeout_minutes": 60,
        "provider": {
            "type": "external",  # the provider's own type wants a file that the wheel lacks
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs_address,
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "auth": {},
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }
    file.write_text(yaml.safe_dump(values))
    return file


def submit_job(
    head: HeadNode, *command: str, environment: Mapping[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """`ray job submit` of a command in the repository's root, as a person types it; waits for the job's end."""
    submit = [str(RAY), "job", "submit", f"--address={head.address}", "--working-dir", ".", "--", *command]
    return subprocess.run(
        submit, env=environment or head.environment, cwd=REPOSITORY, capture_output=True, text=True, check=False,
        timeout=timeout,
    )  # fmt: skip


def _wait_until_up(address: str, token: str, head: subprocess.Popen[bytes], log: Path) -> None:
    """Until it takes a job: the dashboard is up before the agent that starts jobs."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert head.poll() is None, log.read_text()
        with suppress(httpx.TransportError):
            headers = {"Authorization": f"Bearer {token}"}
            reply = httpx.post(f"{address}/api/jobs/", json={"entrypoint": "true"}, headers=headers, timeout=30)
            if reply.status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"no job can be submitted to {address} within 90 s: {log.read_text()}")


def _stop(head: subprocess.Popen[bytes]) -> None:
    """End the head node and everything it started, by process id."""
    if head.poll() is not None:  # it did not start, and ended what it had started
        return
    processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    head.terminate()
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=10)
