"""The whole shape on one cluster with token authentication: a job trains, a sweep searches, Serve serves the winner
while another job trains."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from openai import OpenAI

from deepseek_ray.models.load import load_model
from deepseek_ray.training.metrics import read_metrics
from tests.head_node import RAY, REPOSITORY, HeadNode, head_node, submit_job
from tests.ports import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.apart]

NUM_TRIALS = 2
SECOND_STEPS = 40
SWEEP = """
import json, sys
from deepseek_ray import search_hyperparameters
from deepseek_ray.config.load import load_pretrain_config
from tune_spaces.pretraining import space

config = load_pretrain_config("configs/tiny.yaml", sys.argv[3:])
result = search_hyperparameters(config, space(batch_sizes=(16, 32)), num_trials=int(sys.argv[2]), seed=1,
                                storage=sys.argv[1], name="sweep")
print(json.dumps({"checkpoint": str(result.best_checkpoint), "metrics": result.best_metrics,
                  "trials": len(result.dataframe())}))
"""


class OneCluster:
    """The cluster and what its user types there."""

    def __init__(self, head: HeadNode) -> None:
        self.head = head
        self.storage = head.directory / "runs"
        self.http_port = free_port()
        corpus = head.directory / "corpus.txt"
        corpus.write_text("\n".join(f"line {number} of the text says {number * number}" for number in range(3000)))
        self.overrides = [
            "schedule.warmup_steps=2",
            "training.threads_per_worker=1",
            "data.source=text",
            f"data.paths=[{corpus}]",
            "data.document_bytes=4000",
            "data.vocab_size=512",
            f"data.cache_dir={head.directory / 'cache'}",
            f"storage_path={self.storage}",
        ]

    def run(self, *command: str) -> str:
        """Standard output of a command on the head node; it has to succeed."""
        done = subprocess.run(
            command, env=self.head.environment, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=400
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, *options: str, overrides: list[str]) -> str:
        sets = [part for override in [*self.overrides, *overrides] for part in ("--set", override)]
        return self.run(
            str(RAY), "job", "submit", f"--address={self.head.address}", "--working-dir", ".", *options, "--",
            "python", "jobs/pretrain.py", "--config", "configs/tiny.yaml", *sets,
        )  # fmt: skip

    def job_status(self, submission_id: str) -> str:
        headers = {"Authorization": f"Bearer {self.head.environment['RAY_AUTH_TOKEN']}"}
        reply = httpx.get(f"{self.head.address}/api/jobs/{submission_id}", headers=headers, timeout=30)
        return reply.raise_for_status().json()["status"]

    def sweep(self) -> dict[str, Any]:
        """`search_hyperparameters` from a driver that joins the cluster by RAY_ADDRESS."""
        environment = {**self.head.environment, "RAY_ADDRESS": self.head.gcs_address}
        command = [
            sys.executable, "-c", SWEEP, str(self.storage), str(NUM_TRIALS), *self.overrides, "training.steps=6",
            "training.validation_interval=2",
        ]  # fmt: skip
        done = subprocess.run(
            command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=400
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def deploy(self, model_dir: str) -> None:
        """`serve deploy` of the file beside the application, with the model's directory filled in."""
        values = yaml.safe_load((REPOSITORY / "serve_apps" / "openai.yaml").read_text())
        values["http_options"] = {"host": "127.0.0.1", "port": self.http_port}
        (application,) = values["applications"]
        application["args"]["models"] = [{"model_dir": model_dir, "served_model_name": "winner", "threads": 1}]
        file = self.head.directory / "serve.yaml"
        file.write_text(yaml.safe_dump(values))
        self.run(str(RAY.with_name("serve")), "deploy", "-a", self.head.address, str(file))

    def wait_until_ready(self, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{self.http_port}/ready", timeout=10).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, f"not ready after {seconds} s"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[OneCluster]:
    with head_node({"PYTHONPATH": str(REPOSITORY)}) as head:  # Serve's replicas import serve_apps
        yield OneCluster(head)


def test_a_submitted_job_trains_in_the_environments_python(cluster: OneCluster) -> None:
    said = cluster.submit(overrides=["name=first", "training.steps=6"])
    if sys.prefix != sys.base_prefix:  # in a virtual environment the bare `python` lacks the packages
        assert f"starting again in the cluster's {sys.executable}" in said
    assert "step 6/6" in said
    run_dir = cluster.storage / "first"
    assert [line["step"] for line in read_metrics(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert load_model(run_dir / "checkpoints" / "step-00000006").config.n_routed_experts == 4


def test_a_job_without_the_token_is_refused(cluster: OneCluster) -> None:
    stranger = {**cluster.head.environment, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = ["python", "jobs/pretrain.py", "--config", "configs/tiny.yaml", "--set", "training.steps=1"]
    done = submit_job(cluster.head, *command, environment=stranger)
    assert done.returncode != 0
    assert "step 1/1" not in done.stdout
    assert "authentication token" in (done.stdout + done.stderr).lower()


@pytest.mark.timeout(900)
def test_training_search_and_serving_share_one_cluster(cluster: OneCluster) -> None:
    found = cluster.sweep()
    assert found["trials"] == NUM_TRIALS
    assert found["metrics"]["validation_loss"] > 0

    cluster.deploy(found["checkpoint"])
    cluster.wait_until_ready()

    second = ["name=second", f"training.steps={SECOND_STEPS}", "training.checkpoint_interval=0"]
    cluster.submit("--no-wait", "--submission-id=second", overrides=second)
    with OpenAI(base_url=f"http://127.0.0.1:{cluster.http_port}/v1", api_key="none", max_retries=0) as client:
        answers_beside_training = 0
        while (status := cluster.job_status("second")) in ("PENDING", "RUNNING"):
            steps = len(read_metrics(cluster.storage / "second"))
            answer = client.completions.create(model="winner", prompt="line 7 of", max_tokens=16, temperature=0)
            assert answer.usage is not None
            assert answer.usage.completion_tokens > 0
            answers_beside_training += 0 < steps < SECOND_STEPS
        assert status == "SUCCEEDED"
        assert answers_beside_training > 0
        assert [model.id for model in client.models.list()] == ["winner"]
    assert len(read_metrics(cluster.storage / "second")) == SECOND_STEPS
