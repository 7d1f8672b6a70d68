"""The loop without Ray: a run that dies anywhere and starts again has the curve of an undisturbed one, bit for bit."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import small_config, small_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek_ray.data.prepare import PreparedData
from deepseek_ray.errors import CheckpointError, DataError, TrainingError
from deepseek_ray.models.load import load_model
from deepseek_ray.training import checkpoint as checkpoint_module
from deepseek_ray.training import loop
from deepseek_ray.training.checkpoint import find_damage
from deepseek_ray.training.loop import train
from deepseek_ray.training.metrics import read_metrics
from deepseek_ray.training.ranks import Ranks
from deepseek_ray.training.step import TrainStep

MEASURED = ("step", "loss", "mtp_loss", "balance_loss", "gradient_norm", "learning_rate", "max_violation",
            "validation_loss", "validation_bits_per_byte", "expert_counts")  # fmt: skip


class Killed(Exception):
    """Stands for the death of the process in tests that stay in one."""


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """Everything in metrics.jsonl but times and speeds."""
    return [{name: line.get(name) for name in MEASURED} for line in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: PreparedData) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    train(small_config(), run_dir, data, Ranks())
    return run_dir


def die_in_step(monkeypatch: pytest.MonkeyPatch, fatal_step: int) -> None:
    """The next time `fatal_step` is trained, its work is done but nothing of it is recorded."""
    run = TrainStep.run

    def run_or_die(self: TrainStep, step: int, batches: Any) -> Any:
        measured = run(self, step, batches)
        if step == fatal_step:
            monkeypatch.setattr(TrainStep, "run", run)
            raise Killed
        return measured

    monkeypatch.setattr(TrainStep, "run", run_or_die)


def test_the_curve_is_complete(undisturbed: Path) -> None:
    lines = read_metrics(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 8, 12]
    assert all(line["tokens"] == 8 * 24 and line["tokens_per_second"] > 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]


@pytest.mark.parametrize("fatal_step", [1, 4, 7, 12])
def test_resume_is_bitwise(
    tmp_path: Path, data: PreparedData, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, fatal_step: int
) -> None:
    die_in_step(monkeypatch, fatal_step)
    with pytest.raises(Killed):
        train(small_config(), tmp_path, data, Ranks())
    torch.manual_seed(999)  # whatever the process did in between
    result = train(small_config(), tmp_path, data, Ranks())
    assert curve(tmp_path) == curve(undisturbed)
    assert result.step == 12
    ours, theirs = load_model(result.checkpoint), load_model(undisturbed / "checkpoints" / "step-00000012")
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


_DIE_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from training_runs import small_config, small_data
from deepseek_ray.training import checkpoint
from deepseek_ray.training.loop import train
from deepseek_ray.training.ranks import Ranks
import torch

torch.set_num_threads(1)
step_of_death, part = int(sys.argv[3]), sys.argv[4]
original = getattr(checkpoint, part)

def die(path, *rest):
    if f"step-{step_of_death:08d}" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(path, *rest)

setattr(checkpoint, part, die)
train(small_config(), Path(sys.argv[1]), small_data(Path(sys.argv[2])), Ranks())
"""


@pytest.mark.parametrize("part", ["_seal", "_sync_directory"])
def test_kill_while_a_checkpoint_is_written(tmp_path: Path, undisturbed: Path, part: str) -> None:
    """SIGKILL before the manifest is written, and when all is written but not yet renamed into place."""
    program = [sys.executable, "-c", _DIE_WHILE_SAVING, str(tmp_path / "run"), str(tmp_path / "corpus"), "8", part]
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run(program, check=False, env={"PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == -signal.SIGKILL
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [".writing-step-00000008", "step-00000004"]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 9))
    train(small_config(), tmp_path / "run", small_data(tmp_path / "again"), Ranks())
    assert curve(tmp_path / "run") == curve(undisturbed)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000008", "step-00000012"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, data: PreparedData, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    die_in_step(monkeypatch, 10)
    with pytest.raises(Killed):
        train(small_config(), tmp_path, data, Ranks())
    damaged = tmp_path / "checkpoints" / "step-00000008" / "trainer" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    train(small_config(), tmp_path, data, Ranks())
    assert "ignoring checkpoint" in caplog.text
    assert "optimizer.safetensors" in caplog.text
    assert curve(tmp_path) == curve(undisturbed)
    assert find_damage(tmp_path / "checkpoints" / "step-00000008") is None


def test_a_full_disk_stops_the_run_and_keeps_the_old_checkpoint(
    tmp_path: Path, data: PreparedData, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    free = iter((2**40, 1000))
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module.shutil, "disk_usage", lambda path: usage(0, 0, next(free, 1000)))
        with pytest.raises(TrainingError, match=r"no room for the checkpoint of step 8.*keep_checkpoints"):
            train(small_config(), tmp_path, data, Ranks())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    train(small_config(), tmp_path, data, Ranks())
    assert curve(tmp_path) == curve(undisturbed)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.TrainStep, "_update", _poisoned(loop.TrainStep._update))
    with pytest.raises(
        TrainingError, match=r"step 6: the loss is nan at learning rate .*resumes from the newest checkpoint"
    ):
        train(small_config(), tmp_path, data, Ranks())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def _poisoned(update: Any) -> Any:
    def poisoned(self: TrainStep, step: int, sums: torch.Tensor, counts: torch.Tensor) -> Any:
        return update(self, step, sums * math.nan if step == 6 else sums, counts)

    return poisoned


def test_a_finished_run_is_not_trained_again(data: PreparedData, undisturbed: Path) -> None:
    before = curve(undisturbed)
    result = train(small_config(), undisturbed, data, Ranks())
    assert (result.step, result.tokens_per_second) == (12, 0.0)
    assert result.validation_loss == before[-1]["validation_loss"]
    assert curve(undisturbed) == before


def test_a_finished_run_goes_on_when_steps_are_raised(tmp_path: Path, data: PreparedData, undisturbed: Path) -> None:
    train(small_config(training={"steps": 4}, schedule={"floor": 1.0}), tmp_path, data, Ranks())
    train(small_config(training={"steps": 6}, schedule={"floor": 1.0}), tmp_path, data, Ranks())
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": {"rope_theta": 500.0}}, CheckpointError, r"another model: rope_theta was 10000.0 and is 500.0"),
        ({"data": {"seed": 5}}, DataError, r"a training set with seed 0, this run's has 5"),
        ({"data": {"sequence_length": 20}}, DataError, r"num_samples"),
    ],
)
def test_resuming_with_something_else_is_refused(
    data: PreparedData, undisturbed: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(small_config(**change), undisturbed, data, Ranks())


def test_transformers_loads_and_agrees(data: PreparedData, undisturbed: Path) -> None:
    checkpoint = undisturbed / "checkpoints" / "step-00000012"
    ids = torch.randint(5, data.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        difference = (load_model(checkpoint).eval()(ids).logits - theirs(ids).logits).abs().max()
    assert difference <= 1e-4
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert (
        tokenizer.decode(tokenizer("the sum of all rows").input_ids, skip_special_tokens=True) == "the sum of all rows"
    )
    assert json.loads((checkpoint / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
