"""`jobs/pretrain.py` on a real cluster with token authentication, and by itself with what a person types wrong."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from deepseek_ray.models.load import load_model
from deepseek_ray.training.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")


@dataclass(frozen=True)
class Cluster:
    """A head node that demands a token."""

    address: str
    """Of the dashboard, where jobs are submitted."""
    environment: dict[str, str]
    """With the token, and a PATH on which `python` is not the environment's."""
    directory: Path


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
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
    }
    gcs, dashboard, client = free_ports(3)
    command = [
        str(RAY), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--temp-dir={directory / 'ray'}",
        "--num-cpus=2", "--disable-usage-stats",
    ]  # fmt: skip
    with (directory / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=directory)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        _wait_until_up(address, head, directory / "head.log")
        yield Cluster(address, environment, directory)
    finally:
        _stop(head)
        shutil.rmtree(directory, ignore_errors=True)


def _wait_until_up(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    """The dashboard answers 401 to a caller without a token as soon as it is up."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert head.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=5)
        except urllib.error.HTTPError as error:
            if error.code == 401:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"no dashboard at {address} within 90 s: {log.read_text()}")


def _stop(head: subprocess.Popen[bytes]) -> None:
    """End the head node and everything it started, by process id."""
    processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    head.terminate()
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=10)


def submit(
    cluster: Cluster, *overrides: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    sets = [part for override in overrides for part in ("--set", override)]
    return subprocess.run(
        [str(RAY), "job", "submit", f"--address={cluster.address}", "--working-dir", ".", "--",
         "python", "jobs/pretrain.py", "--config", "configs/tiny.yaml", *sets],
        env=environment or cluster.environment, cwd=REPOSITORY, capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip


@pytest.mark.cluster
def test_a_submitted_job_trains_in_the_environments_python(cluster: Cluster) -> None:
    corpus = cluster.directory / "corpus.txt"
    corpus.write_text("\n".join(f"line {number} of the text says {number * number}" for number in range(3000)))
    done = submit(
        cluster,
        "training.steps=6",
        "schedule.warmup_steps=2",
        "data.source=text",
        f"data.paths=[{corpus}]",
        "data.document_bytes=4000",
        "data.vocab_size=512",
        f"data.cache_dir={cluster.directory / 'cache'}",
        f"storage_path={cluster.directory / 'runs'}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if sys.prefix != sys.base_prefix:  # in a virtual environment the bare `python` lacks the packages
        assert f"starting again in the cluster's {sys.executable}" in done.stdout
    assert "step 6/6" in done.stdout
    run_dir = cluster.directory / "runs" / "tiny"
    assert [line["step"] for line in read_metrics(run_dir)] == [1, 2, 3, 4, 5, 6]
    model = load_model(run_dir / "checkpoints" / "step-00000006")
    assert model.config.n_routed_experts == 4


@pytest.mark.cluster
def test_a_job_without_the_token_is_refused(cluster: Cluster) -> None:
    stranger = {**cluster.environment, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    done = submit(cluster, "training.steps=1", environment=stranger)
    assert done.returncode != 0
    assert "step 1/1" not in done.stdout
    assert "authentication token" in (done.stdout + done.stderr).lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "training.stpes=5"], "unknown key 'training.stpes'; did you mean 'steps'"),
        (["--set", "distributed.strategy=fsdp"], "distributed.strategy is 'fsdp'; available: ddp"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], message: str) -> None:
    command = [sys.executable, "jobs/pretrain.py", "--config", "configs/tiny.yaml", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: configs/tiny.yaml with --set: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_python_without_the_packages_says_what_to_do(tmp_path: Path) -> None:
    python = Path(sys.base_prefix) / "bin" / "python3"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(python), "-S", "jobs/pretrain.py", "--config", "configs/tiny.yaml"]
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "lacks ray, torch, pydantic" in done.stderr
    assert "/path/to/.venv/bin/python jobs/pretrain.py" in done.stderr
