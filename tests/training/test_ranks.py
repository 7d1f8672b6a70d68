"""Two workers over gloo against one worker: same samples, same counts, same curve up to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_runs import small_config, small_data

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.data.prepare import PreparedData
from deepseek_ray.models.load import load_model
from deepseek_ray.training.loop import train
from deepseek_ray.training.metrics import read_metrics
from deepseek_ray.training.ranks import Ranks

_WORKER = """
import sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from training_runs import small_data
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import DeepSeekRayError
from deepseek_ray.training.loop import train
from deepseek_ray.training.ranks import Ranks

run_dir, corpus, store, rank, config = sys.argv[1:6]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2,
                        timeout=timedelta(seconds=60))
ranks = Ranks(int(rank), 2)
data = small_data(Path(corpus) / rank)
try:
    train(PretrainConfig.model_validate_json(config), Path(run_dir), data, ranks)
except DeepSeekRayError as error:
    print(type(error).__name__, error)
dist.destroy_process_group()
"""


def two_workers(tmp_path: Path, run_dir: Path, config: PretrainConfig, prelude: str = "") -> list[str]:
    """Train with two processes; what each of them printed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    store = tmp_path / "store"
    store.unlink(missing_ok=True)
    arguments = [str(run_dir), str(tmp_path / "corpora"), str(store)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", prelude + _WORKER, *arguments, str(rank), config.model_dump_json()],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        answers = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    return answers


def two_worker_config(**training: Any) -> PretrainConfig:
    return small_config(training={"micro_batch_size": 2, **training}, distributed={"data_parallel_size": 2})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory, data: PreparedData) -> Path:
    """One worker with the micro-batches that the two workers have: 4 x 2 sequences instead of 2 x 2 x 2."""
    run_dir = tmp_path_factory.mktemp("one")
    train(small_config(training={"micro_batch_size": 2}), run_dir, data, Ranks())
    return run_dir


def assert_same_curve(run_dir: Path, expected_dir: Path) -> None:
    """Equal to 1e-4: the sums over workers are rounded in another order, and 12 steps at lr 1e-2 carry that on."""
    lines, expected = read_metrics(run_dir), read_metrics(expected_dir)
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == list(range(1, 13))
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["mtp_loss"] == pytest.approx(other["mtp_loss"], rel=1e-4)
        assert line["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-2)
        assert line.get("validation_loss", 0) == pytest.approx(other.get("validation_loss", 0), rel=1e-4)
    # Before the first update nothing was rounded yet: the summed counts are exactly those of one worker.
    assert lines[0]["max_violation"] == expected[0]["max_violation"]


def test_two_workers_equal_one(tmp_path: Path, one_worker: Path) -> None:
    two_workers(tmp_path, tmp_path / "run", two_worker_config())
    assert_same_curve(tmp_path / "run", one_worker)
    one = load_model(one_worker / "checkpoints" / "step-00000012").moe_modules[0].correction_bias
    two = load_model(tmp_path / "run" / "checkpoints" / "step-00000012").moe_modules[0].correction_bias
    assert one is not None
    assert two is not None
    assert one.count_nonzero() > 0
    assert (one - two).abs().max() <= 2 * 1e-2 + 1e-6  # at most one step's sign differs, where a count met the mean


def test_resume_at_another_world_size_continues_the_sample_order(
    tmp_path: Path, data: PreparedData, one_worker: Path
) -> None:
    """Six steps by two workers, six more by one: every sample is taken where the undisturbed single worker takes it."""
    half = two_worker_config(steps=12, checkpoint_interval=6)
    stop_after_six = (
        "import deepseek_ray.training.loop as loop\n"
        "save = loop._Run.save\n"
        "def save_and_stop(self):\n"
        "    save(self)\n"
        "    raise loop.TrainingError('stopped after step 6')\n"
        "loop._Run.save = save_and_stop\n"
    )
    answers = two_workers(tmp_path, tmp_path / "run", half, prelude=stop_after_six)
    assert all("stopped after step 6" in answer for answer in answers)
    train(small_config(training={"micro_batch_size": 2}), tmp_path / "run", data, Ranks())
    assert_same_curve(tmp_path / "run", one_worker)


def test_every_worker_stops_when_rank_zero_cannot_save(tmp_path: Path) -> None:
    no_space = (
        "import collections, shutil\n"
        "usage = collections.namedtuple('usage', 'total used free')\n"
        "shutil.disk_usage = lambda path: usage(0, 0, 1000)\n"
    )
    first, second = two_workers(tmp_path, tmp_path / "run", two_worker_config(), prelude=no_space)
    assert first.startswith("TrainingError no room for the checkpoint of step 4")
    assert second.startswith("TrainingError rank 0 stopped the run: no room for the checkpoint of step 4")
