"""`serve deploy` as a user runs it: several models, keys, and deploying again while requests run."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
import yaml
from openai import OpenAI
from ray import serve

from deepseek_ray.actors.deployment import deployment_status
from deepseek_ray.actors.record import list_deployments
from tests.encoders import WIDTH, write_encoder
from tests.ports import free_ports

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(500)]

ROOT = Path(__file__).resolve().parents[2]
SERVE = Path(sys.executable).with_name("serve")
PROMPT = "def __init__(self, "
KEY = "key-of-the-tests"
CAPACITY = 4
"""Sequences that the engine of "first" runs or queues: max_num_seqs + max_waiting."""


@dataclass
class Deployed:
    """The application and the person who deploys it."""

    directory: Path
    model_dir: Path
    dashboard: str
    session_directory: Path
    port: int
    first: dict[str, Any] = field(default_factory=dict)
    """Settings of the model "first" that differ from the beginning."""
    second: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def deploy(self) -> None:
        model = {"model_dir": str(self.model_dir), "dtype": "float32", "expert_shards": 1, "threads": 1}
        engine = {"max_num_seqs": 2, "max_waiting": CAPACITY - 2}
        values = yaml.safe_load((ROOT / "serve_apps" / "openai.yaml").read_text())
        values["http_options"]["port"] = self.port
        (application,) = values["applications"]
        application["args"] = {
            "models": [
                {**model, "name": "one", "served_model_name": "first", "engine": engine, **self.first},
                {**model, "name": "two", "served_model_name": "second", "engine": engine, **self.second},
            ],
            "api": {"api_key_file": str(self.directory / "keys"), "max_replicas": 2, "upscale_delay_seconds": 0},
        }
        encoder = yaml.safe_load((ROOT / "serve_apps" / "embeddings.yaml").read_text())["applications"][0]
        encoder["args"] = {"model_dir": str(self.directory / "encoder"), "threads": 1}
        values["applications"].append(encoder)
        file = self.directory / "serve.yaml"
        file.write_text(yaml.safe_dump(values))
        command = [str(SERVE), "deploy", "-a", self.dashboard, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what} within {seconds} s: {serve.status()}"
            time.sleep(0.1)

    def wait_deployed(self) -> None:
        """Until the controller has done all that the last file asks for."""
        self.wait(lambda: {self.status(name) for name in ("openai", "embeddings")} == {"RUNNING"}, "all runs")

    def status(self, application: str) -> str:
        return serve.status().applications[application].status

    def num_ingresses(self) -> int:
        return serve.status().applications["openai"].deployments["openai"].replica_states.get("RUNNING", 0)

    def is_ready(self) -> bool:
        try:
            return httpx.get(self.url + "/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def client(self, key: str = KEY) -> OpenAI:
        return OpenAI(base_url=self.url + "/v1", api_key=key, _strict_response_validation=True, max_retries=0)

    def names(self) -> list[str]:
        return [model.id for model in self.client().models.list()]

    def post(self, num_tokens: int, model: str = "first") -> httpx.Response:
        body = {"model": model, "prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.post(self.url + "/v1/completions", json=body, headers=headers, timeout=200)

    def pieces(self, num_tokens: int) -> Iterator[str]:
        """Text of a streamed completion as it comes."""
        stream = self.client().completions.create(
            model="first", prompt=PROMPT, max_tokens=num_tokens, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return (chunk.choices[0].text for chunk in stream)


def engines() -> dict[str, set[int]]:
    """Name of each engine's deployment, and the pids of its processes."""
    return {name: {row["pid"] for row in deployment_status(name)["actors"]} for name in list_deployments()}


@contextmanager
def asking(deployed: Deployed, num_tokens: int, num_clients: int = 1) -> Iterator[list[int]]:
    """Clients that ask one question after the other until the end of the block; yields the statuses."""
    statuses: list[int] = []
    stopped = threading.Event()

    def ask() -> None:
        while not stopped.is_set():
            statuses.append(deployed.post(num_tokens).status_code)

    threads = [threading.Thread(target=ask) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


@pytest.fixture(scope="module")
def deployed(trained_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    directory = tmp_path_factory.mktemp("deploy")
    (directory / "keys").write_text(f"# of the tests\n{KEY}\n")
    write_encoder(directory / "encoder")
    dashboard_port, port = free_ports(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        context = ray.init(
            address="local", include_dashboard=True, dashboard_port=dashboard_port, log_to_driver=False, num_cpus=2
        )
        try:
            running = Deployed(
                directory, trained_model, f"http://{context.dashboard_url}", Path(context["session_dir"]), port
            )
            running.deploy()
            running.wait(running.is_ready, "the API is ready")
            running.wait_deployed()
            yield running
        finally:
            ray.shutdown()


def test_a_request_chooses_among_the_models(deployed: Deployed) -> None:
    client = deployed.client()
    assert deployed.names() == ["first", "second"]
    texts = {
        name: client.completions.create(model=name, prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text
        for name in ("first", "second")
    }
    assert texts["first"] == texts["second"] != ""
    assert len(engines()) == 2
    missing = deployed.post(1, model="third")
    assert missing.status_code == 404
    assert "'first', 'second'" in missing.json()["error"]["message"]


def test_an_encoder_answers_beside_the_models(deployed: Deployed) -> None:
    client = OpenAI(
        base_url=deployed.url + "/embeddings/v1", api_key="none", _strict_response_validation=True, max_retries=0
    )
    reply = client.embeddings.create(model="encoder", input=["abc", "def"], encoding_format="float")
    assert [len(item.embedding) for item in reply.data] == [WIDTH, WIDTH]


def test_without_a_key_there_is_only_health(deployed: Deployed) -> None:
    assert httpx.get(deployed.url + "/health").status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        refused = httpx.get(deployed.url + "/v1/models", headers=headers)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"


def test_more_load_brings_another_ingress_and_admission_stays_one(deployed: Deployed) -> None:
    with asking(deployed, num_tokens=480, num_clients=CAPACITY) as statuses:
        deployed.wait(lambda: deployed.num_ingresses() == 2, "two processes answer")
    assert set(statuses) == {200}
    with ThreadPoolExecutor(3 * CAPACITY) as pool:  # sent long before the first is answered
        replies = list(pool.map(deployed.post, [480] * 3 * CAPACITY))
    refused = [reply for reply in replies if reply.status_code == 429]
    assert [reply.status_code for reply in replies].count(200) == CAPACITY
    assert len(refused) == 2 * CAPACITY
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)


def test_deploying_another_ingress_keeps_the_engines_and_the_streams(deployed: Deployed) -> None:
    before = engines()
    expected = deployed.post(480).json()["choices"][0]["text"]
    pieces = deployed.pieces(480)
    begin = next(pieces)
    deployed.second["served_model_name"] = "renamed"
    deployed.deploy()
    deployed.wait(lambda: deployed.names() == ["first", "renamed"], "the new name is served")
    assert begin + "".join(pieces) == expected
    deployed.wait_deployed()
    assert engines() == before
    assert deployed.post(4, model="renamed").status_code == 200


def test_another_engine_takes_over_and_no_request_fails(deployed: Deployed) -> None:
    before = engines()
    (old,) = [name for name in before if name.startswith("one.")]
    expected = deployed.post(480).json()["choices"][0]["text"]
    deployed.first["attention_workers"] = 2
    with asking(deployed, num_tokens=16) as statuses:
        pieces = deployed.pieces(480)
        begin = next(pieces)
        deployed.deploy()
        deployed.wait(lambda: len(list_deployments()) == 3, "the new engine starts beside the old")
        assert begin + "".join(pieces) == expected
        deployed.wait(lambda: old not in list_deployments(), "the old engine ends")
        done = len(statuses)
        deployed.wait(lambda: len(statuses) > done + 2, "requests go on")
    assert set(statuses) == {200}
    after = engines()
    (new,) = [name for name in after if name.startswith("one.")]
    assert len(after) == 2
    assert len(after[new]) == 4  # router, two workers, one shard
    assert {name: pids for name, pids in after.items() if name != new} == {
        name: pids for name, pids in before.items() if name != old
    }
    deployed.wait(lambda: not any(psutil.pid_exists(pid) for pid in before[old]), "its processes are gone", 20)


def test_the_key_is_nowhere_but_in_its_file(deployed: Deployed) -> None:
    command = [str(SERVE), "config", "-a", deployed.dashboard]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "first" in shown
    assert KEY not in shown
    logs = deployed.session_directory / "logs"
    texts = {path: path.read_text(errors="replace") for path in logs.rglob("*") if path.is_file()}
    assert any(text and "openai" in path.name for path, text in texts.items())
    assert not [path for path, text in texts.items() if KEY in text]


def test_shutdown_ends_the_engines(deployed: Deployed) -> None:
    pids = set().union(*engines().values())
    subprocess.run([str(SERVE), "shutdown", "-y", "-a", deployed.dashboard], check=True, timeout=100)
    deployed.wait(lambda: not list_deployments() and not any(map(psutil.pid_exists, pids)), "the engines end", 60)
