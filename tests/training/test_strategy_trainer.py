"""Sharded strategies through Ray Train: the same loop, workers that Ray starts, a size that Ray chooses."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from training_runs import small_config, small_data

from deepseek_ray.training import trainer
from deepseek_ray.training.loop import train
from deepseek_ray.training.metrics import read_metrics
from deepseek_ray.training.ranks import Ranks
from deepseek_ray.training.state import read_state

STEPS = {"steps": 6, "micro_batch_size": 2, "checkpoint_interval": 3, "validation_interval": 0}


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "distributed",
    [
        {"strategy": "fsdp", "data_parallel_size": [1, 2]},
        pytest.param({"strategy": "deepspeed", "zero_stage": 3, "data_parallel_size": 2}, marks=pytest.mark.slow),
    ],
    ids=["fsdp, elastic", "deepspeed"],
)
def test_ray_trains_what_one_worker_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distributed: dict[str, Any]
) -> None:
    data = small_data(tmp_path / "corpus")
    monkeypatch.setattr(trainer, "prepare_data", lambda config: data)
    train(small_config(training=STEPS), tmp_path / "alone", data, Ranks())
    printed = io.StringIO()
    config = small_config(storage_path=str(tmp_path), training=STEPS, distributed=distributed)
    result = trainer.pretrain(config, printed)
    lines, expected = read_metrics(config.run_dir), read_metrics(tmp_path / "alone")
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    state = read_state(Path(result.checkpoint))
    assert state.config["distributed"]["data_parallel_size"] == 2  # the size that ran
    assert "DeepSpeed" not in printed.getvalue()
    assert "Warning" not in printed.getvalue()
