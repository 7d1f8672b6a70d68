"""`jobs/pretrain.py` on a real cluster with token authentication, and by itself with what a person types wrong."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_ray.models.load import load_model
from deepseek_ray.training.metrics import read_metrics
from tests.head_node import RAY, HeadNode, head_node

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[HeadNode]:
    with head_node() as head:
        yield head


def submit(
    cluster: HeadNode, *overrides: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    sets = [part for override in overrides for part in ("--set", override)]
    return subprocess.run(
        [str(RAY), "job", "submit", f"--address={cluster.address}", "--working-dir", ".", "--",
         "python", "jobs/pretrain.py", "--config", "configs/tiny.yaml", *sets],
        env=environment or cluster.environment, cwd=REPOSITORY, capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip


@pytest.mark.cluster
def test_a_submitted_job_trains_in_the_environments_python(cluster: HeadNode) -> None:
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
def test_a_job_without_the_token_is_refused(cluster: HeadNode) -> None:
    stranger = {**cluster.environment, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    done = submit(cluster, "training.steps=1", environment=stranger)
    assert done.returncode != 0
    assert "step 1/1" not in done.stdout
    assert "authentication token" in (done.stdout + done.stderr).lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "training.stpes=5"], "unknown key 'training.stpes'; did you mean 'steps'"),
        (["--set", "distributed.strategy=fdsp"], "distributed.strategy is 'fdsp': Input should be 'ddp', 'fsdp'"),
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
