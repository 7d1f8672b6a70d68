"""On Ray Train: killed workers start again by themselves, killed drivers by hand, and the loss curve stays the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from training_runs import small_config, small_data

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import ConfigError, TrainingError
from deepseek_ray.training.loop import train
from deepseek_ray.training.metrics import read_metrics
from deepseek_ray.training.progress import LOG_FILE
from deepseek_ray.training.ranks import Ranks
from deepseek_ray.training.result import RESULT_FILE
from deepseek_ray.training.trainer import _lock, absolute_run_dir

_DRIVER = """
import sys
from pathlib import Path
from training_runs import small_data
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import DeepSeekRayError
from deepseek_ray.training import trainer

trainer.prepare_data = lambda config: small_data(Path(sys.argv[1]))
try:
    print(trainer.pretrain(PretrainConfig.model_validate_json(sys.argv[2])).describe())
except DeepSeekRayError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@contextmanager
def driver(tmp_path: Path, config: PretrainConfig, number: int) -> Iterator[subprocess.Popen[str]]:
    """A driver process with a local Ray of its own; it and all it started are gone afterwards."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TMPDIR": os.environ.get("RAY_TMPDIR", "/tmp"),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, str(tmp_path / f"corpus{number}"), config.model_dump_json()],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    descendants: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            descendants = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        process.wait(30)
        for descendant in descendants:
            try:
                descendant.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(descendants, timeout=30)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = read_metrics(run_dir)
        if lines and lines[-1]["step"] >= step:
            return
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.01)
    raise AssertionError(f"no step {step} in {run_dir} within 120 s")


def train_worker(process: subprocess.Popen[str]) -> psutil.Process:
    found = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::RayTrainWorker")
    ]
    assert len(found) == 1, found
    return found[0]


def losses(run_dir: Path) -> list[Any]:
    return [
        (line["step"], line["loss"], line["gradient_norm"], line.get("validation_loss"))
        for line in read_metrics(run_dir)
    ]


@pytest.mark.cluster
def test_killed_worker_and_killed_driver_leave_the_curve_as_it_was(tmp_path: Path) -> None:
    config = small_config(
        storage_path=str(tmp_path / "ray"),
        training={"steps": 160, "checkpoint_interval": 10, "validation_interval": 40, "threads_per_worker": 1},
    )
    run_dir = config.run_dir
    with driver(tmp_path, config, 1) as process:
        wait_for_step(run_dir, 25, process)
        first = train_worker(process)
        first.send_signal(signal.SIGKILL)
        first.wait(30)
        reached = read_metrics(run_dir)[-1]["step"]
        assert 25 <= reached < 160, "the worker must die in mid-run"
        wait_for_step(run_dir, reached + 20, process)  # Ray Train started another worker by itself
        assert train_worker(process).pid != first.pid
        process.kill()
        process.wait(30)
    reached = read_metrics(run_dir)[-1]["step"]
    assert reached < 160, "the driver must die in mid-run"
    with driver(tmp_path, config, 2) as process:
        output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "step 160/160" in output
    assert "going on after step" in output
    assert (run_dir / LOG_FILE).read_text().count("going on after step") == 2
    assert (run_dir / RESULT_FILE).exists()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(config, tmp_path / "undisturbed", small_data(tmp_path / "corpus3"), Ranks())
    finally:
        torch.set_num_threads(threads)
    assert losses(run_dir) == losses(tmp_path / "undisturbed")


def test_a_loop_that_diverges_raises_naming_the_learning_rate(tmp_path: Path) -> None:
    config = small_config(optimizer={"lr": 1e30}, schedule={"floor": 1.0, "warmup_steps": 0})
    with pytest.raises(TrainingError, match=r"step \d+: .*learning rate 1e\+30.*lower optimizer\.lr"):
        train(config, tmp_path / "run", small_data(tmp_path / "corpus"), Ranks())


@pytest.mark.slow
@pytest.mark.cluster
def test_a_run_that_diverges_stops_at_once_with_one_clear_message(tmp_path: Path) -> None:
    config = small_config(
        storage_path=str(tmp_path), optimizer={"lr": 1e30}, schedule={"floor": 1.0, "warmup_steps": 0}
    )
    with driver(tmp_path, config, 1) as process:
        output, _ = process.communicate(timeout=180)
    assert process.returncode == 1
    last = output.strip().splitlines()[-1]
    assert last.startswith("TrainingError: step ")
    assert "learning rate 1e+30" in last
    assert "lower optimizer.lr" in last
    assert "Traceback" not in output
    assert not (config.run_dir / LOG_FILE).read_text()  # no second try


def test_a_second_driver_of_the_same_run_is_refused(tmp_path: Path) -> None:
    with (
        _lock(tmp_path / "run"),
        pytest.raises(TrainingError, match=r"run 'run' in .* is being trained by another process"),
        _lock(tmp_path / "run"),
    ):
        raise AssertionError("the second lock must not be given")
    with _lock(tmp_path / "run"):
        pass  # free again


def test_a_run_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot be written .*set storage_path"), _lock(tmp_path / "file" / "run"):
        pass


def test_a_relative_storage_path_is_refused_in_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = small_config(storage_path="runs")
    assert absolute_run_dir(config) == tmp_path / "runs" / "small"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match=r"storage_path is 'runs', relative to the working directory of a Ray job"):
        absolute_run_dir(config)
