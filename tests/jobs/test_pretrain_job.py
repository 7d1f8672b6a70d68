"""`jobs/pretrain.py` by itself with what a person types wrong; tests/end_to_end/test_one_cluster.py submits it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.head_node import REPOSITORY


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
