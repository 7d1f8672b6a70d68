"""`ray start` with the options of `deploy/on-prem.yaml`, on one machine: the token is asked for and roles are found."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import yaml
from manifests import REPOSITORY, ROLE

from tests.ports import free_ports, node_ports

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
RAY = Path(sys.executable).with_name("ray")
_NODES = f"""
import json, ray
ray.init(address="auto", log_to_driver=False)

@ray.remote(num_cpus=0, label_selector={{"{ROLE}": "experts"}}, resources={{"experts": 1}})
def role():
    return ray.get_runtime_context().get_node_labels()["{ROLE}"]

found = ray.get(role.remote(), timeout=120)  # waits until the worker has joined
print(json.dumps([{{node["Labels"]["{ROLE}"]: node["Resources"] for node in ray.nodes()}}, found]))
"""


@dataclass(frozen=True)
class Nodes:
    environment: dict[str, str]
    dashboard: str
    token: str = field(repr=False)

    def python(self, code: str, **changes: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **changes}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180
        )


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    home = tmp_path_factory.mktemp("home")
    gcs, dashboard, client = free_ports(3)
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    environment = {**kept, "HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    generated = subprocess.run(
        [RAY, "get-auth-token", "--generate"], env=environment, capture_output=True, text=True, check=True
    )
    temp = f"/tmp/by_hand_{os.getpid()}"
    head = [
        f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--temp-dir={temp}",
        "--node-ip-address=127.0.0.1",
    ]  # fmt: skip
    worker = [f"--address=127.0.0.1:{gcs}", "--node-ip-address=127.0.0.1"]
    started = []
    try:
        for options, own in (("head", head), ("worker", worker)):
            command = [RAY, "start", *_options(options), *own, *node_ports(), "--block"]
            log = (home / f"{options}.log").open("w")
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            _wait_for(gcs, started[-1], home / f"{options}.log")
        yield Nodes(environment, f"http://127.0.0.1:{dashboard}", generated.stdout.split()[-1])
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(60)
        subprocess.run(["rm", "-rf", temp], check=True)


def test_work_finds_nodes_by_their_role(nodes: Nodes) -> None:
    done = nodes.python(_NODES)
    assert done.returncode == 0, done.stderr
    found, role = json.loads(done.stdout.splitlines()[-1])
    assert role == "experts"
    assert found["experts"]["experts"] == 1
    assert "CPU" not in found["head"]


def test_the_dashboard_asks_for_the_token(nodes: Nodes) -> None:
    url = f"{nodes.dashboard}/api/jobs/"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer wrong"}).status_code == 403
    assert httpx.get(url, headers={"Authorization": f"Bearer {nodes.token}"}).status_code == 200
    assert httpx.get(f"{nodes.dashboard}/api/gcs_healthz").status_code == 200, "probes ask without a token"


def test_joining_without_the_token_fails(nodes: Nodes, tmp_path: Path) -> None:
    done = nodes.python("import ray; ray.init(address='auto')", RAY_AUTH_MODE="disabled", HOME=str(tmp_path))
    assert done.returncode != 0
    assert "auth" in done.stderr.lower()


def _options(node: str) -> list[str]:
    """What the file gives to `ray start`, less what this machine decides: addresses, ports, the role's detection."""
    config = yaml.safe_load((REPOSITORY / "deploy" / "on-prem.yaml").read_text())
    line = config[f"{node}_start_ray_commands"][-1].partition("ray start")[2].replace("$role", "experts")
    ours = ("--port", "--address", "--object-manager-port", "--node-manager-port", "--autoscaling-config")
    return [option for option in shlex.split(line) if option.partition("=")[0] not in ours]


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())
