"""An elastic run on a cluster whose nodes come and go: it grows, shrinks and ends with the curve of one worker."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from training_runs import small_config, small_data

from deepseek_ray.training import trainer
from deepseek_ray.training.checkpoint import CheckpointStore
from deepseek_ray.training.loop import CHECKPOINTS_DIR, train
from deepseek_ray.training.metrics import read_metrics
from deepseek_ray.training.progress import LOG_FILE
from deepseek_ray.training.ranks import Ranks
from deepseek_ray.training.state import read_state

STEPS = 80
# Micro-batches of one sequence make a step long enough for nodes to come and go within a few of them.
TRAINING = {"steps": STEPS, "global_batch_size": 16, "micro_batch_size": 1, "checkpoint_interval": 2, "max_failures": 3,
            "validation_interval": 0, "keep_checkpoints": 3}  # fmt: skip


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without cores and one node with a single core; this process is connected to it."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        started.add_node(num_cpus=1)
        ray.init(address=started.address, log_to_driver=False)
        yield started
    finally:
        ray.shutdown()
        started.shutdown()


def wait_for(happened: Callable[[], Any], what: str, thread: threading.Thread, limit_s: float = 600) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():
        assert thread.is_alive(), f"the run ended before {what}"
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(3000)
def test_a_run_follows_its_cluster(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker; a second node: two workers; that node killed: one worker. Every step counts once, losses to 1e-5.

    Seen over 80 steps: 3e-8. Ray Train waits up to a minute for a lost node before it starts with fewer workers.
    """
    data = small_data(tmp_path / "corpus")
    monkeypatch.setattr(trainer, "prepare_data", lambda config: data)
    values: dict[str, Any] = {"optimizer": {"lr": 1e-3}, "training": TRAINING}
    config = small_config(
        storage_path=str(tmp_path), distributed={"data_parallel_size": [1, 2], "resize_interval_s": 1}, **values
    )
    store = CheckpointStore(config.run_dir / CHECKPOINTS_DIR, keep=3)
    results: list[Any] = []
    run = threading.Thread(target=lambda: results.append(trainer.pretrain(config, io.StringIO())), daemon=True)

    def newest_is_of(workers: int, after: int) -> bool:
        newest = store.latest()
        if newest is None or newest[0] <= after:
            return False
        return read_state(newest[1]).config["distributed"]["data_parallel_size"] == workers

    run.start()
    wait_for(lambda: newest_is_of(1, after=0), "a checkpoint of one worker", run)
    second = cluster.add_node(num_cpus=1)
    wait_for(lambda: newest_is_of(2, after=0), "a checkpoint of two workers", run)
    reached = read_metrics(config.run_dir)[-1]["step"]
    assert reached < STEPS, "the node must die in mid-run"
    cluster.remove_node(second, allow_graceful=False)
    wait_for(lambda: newest_is_of(1, after=reached), "a checkpoint of the worker that is left", run)
    run.join(timeout=600)
    assert results and results[0].step == STEPS, (config.run_dir / LOG_FILE).read_text()
    train(small_config(**values), tmp_path / "alone", data, Ranks())
    lines, expected = read_metrics(config.run_dir), read_metrics(tmp_path / "alone")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    assert (config.run_dir / LOG_FILE).read_text().count("going on after step") >= 2
