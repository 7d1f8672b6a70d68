"""Real faults under real streams through `deepseek-ray chaos`: promises kept, and mistakes noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepseek_ray.chaos.cases import make_cases, make_references
from deepseek_ray.chaos.cells import CELLS
from deepseek_ray.chaos.history import read_history
from deepseek_ray.chaos.hosts import require_hosts
from deepseek_ray.chaos.run import ChaosSettings, run_cell
from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.errors import ConfigError
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.fakes import BYTE_EOS, write_byte_tokenizer

pytestmark = pytest.mark.cluster

MUTANTS = Path(__file__).parent / "mutants"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; three experts a token, on both shards: the sum of two has the same bits in any order."""
    directory = tmp_path_factory.mktemp("chaos") / "model"
    config = tiny_config(vocab_size=264, eos_token_id=BYTE_EOS, num_experts_per_tok=3, n_group=1)
    write_random_checkpoint(directory, config)
    write_byte_tokenizer(directory)
    return directory


def chaos(model: Path, *arguments: str, **environment: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, rows, and what was said on the way."""
    done = subprocess.run(
        [sys.executable, "-m", "deepseek_ray.cli.main", "chaos", str(model), "--json", "--deadline", "120", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **environment},
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def assert_kept(rows: list[dict[str, Any]], said: str) -> None:
    for row in rows:
        assert (row["failed"], row["wrong"], row["left_over"]) == (0, 0, 0), said
        assert row["calls"] > 0
        if row["cell"] != "control":
            assert row["in_flight"] > 0, "the fault found no stream in mid-generation"


def test_a_killed_shard_with_a_replica_breaks_no_promise(
    ray_cluster: None, trained_model: Path, tmp_path: Path
) -> None:
    cases = make_cases(trained_model, count=28, longest_prompt=24, num_tokens=60)
    references = make_references(trained_model, "float32", cases)
    config = DeploymentConfig(name="chaos-test", model_dir=str(trained_model), dtype="float32")
    settings = ChaosSettings(streams=28, deadline_seconds=120, history_dir=tmp_path)
    (result,) = run_cell(CELLS["kill-shard-replica"], config, cases, references, settings)
    assert result.violations == []
    assert result.in_flight == 28, "the fault found every stream in mid-generation"
    assert len(result.first_token_seconds) == result.calls - 28 > 0
    (seen,) = tmp_path.glob("*.json")
    assert [fault.name for fault in read_history(seen).faults] == ["kill expert_shard"]


def test_the_other_shard_stands_in_for_one_that_hangs(ray_cluster: None, trained_model: Path) -> None:
    cases = make_cases(trained_model, count=8, longest_prompt=24, num_tokens=60)
    references = make_references(trained_model, "float32", cases)
    config = DeploymentConfig(
        name="stand-in-test", model_dir=str(trained_model), dtype="float32", stand_in_after_seconds=1.0
    )
    settings = ChaosSettings(streams=8, deadline_seconds=120)
    (result,) = run_cell(CELLS["stop-shard"], config, cases, references, settings)
    assert result.violations == []
    assert result.in_flight == 8
    assert max(result.stalls) < result.fault_seconds - 5, "they did not wait until it went on"


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_every_fault_breaks_no_promise(trained_model: Path, cell: str) -> None:
    if CELLS[cell].hosts:
        try:
            require_hosts()
        except ConfigError as error:
            pytest.skip(str(error))
    code, rows, said = chaos(trained_model, "--cell", cell, "--runs", "2")
    assert code == 0, said
    assert_kept(rows, said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "cell", "kinds"),
    [
        ("retry", "kill-worker", {"order"}),
        ("combine", "control", {"logprob", "token"}),
        ("shard", "rebalance", {"logprob", "token"}),
    ],
)
def test_the_checker_notices_mistakes(model: Path, mutant: str, cell: str, kinds: set[str]) -> None:
    path = os.pathsep.join(filter(None, [str(MUTANTS), os.environ.get("PYTHONPATH")]))
    code, rows, said = chaos(model, "--cell", cell, MUTANT=mutant, PYTHONPATH=path)
    assert code == 1, said
    assert rows[0]["wrong"] > 0
    assert any(f"    {kind} " in said for kind in kinds), said


@pytest.mark.slow
def test_late_repeated_and_overtaken_answers_break_no_promise(trained_model: Path, tmp_path: Path) -> None:
    """Beside a killed shard, whose calls are answered in parts."""
    path = os.pathsep.join(filter(None, [str(MUTANTS), os.environ.get("PYTHONPATH")]))
    disorder = tmp_path / "disorder"
    environment = {"MUTANT": "disorder", "PYTHONPATH": path, "DISORDER": str(disorder)}
    code, rows, said = chaos(trained_model, "--cell", "kill-shard-replica", "--runs", "2", **environment)
    assert code == 0, said
    assert_kept(rows, said)
    assert {"twice", "late", "very late"} <= set(disorder.read_text().splitlines())


def test_an_unknown_fault_is_named(trained_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deepseek_ray.cli.main", "chaos", str(trained_model), "--cell", "meteor"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "there is no fault 'meteor'; there are control, kill-shard-replica" in done.stderr
