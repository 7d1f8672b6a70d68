"""What the section `distributed:` refuses, and how an elastic run becomes one of a certain size."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from training_runs import small_config

from deepseek_ray.errors import ConfigError
from deepseek_ray.training.ranks import Ranks
from deepseek_ray.training.resources import NodeResources, plan_workers
from deepseek_ray.training.strategies import parallelism_for, require_backend


@pytest.mark.parametrize(
    ("distributed", "message"),
    [
        ({"data_parallel_size": 0}, r"data_parallel_size is 0; give a number from 1"),
        ({"data_parallel_size": [2, 1]}, r"data_parallel_size is \[2, 1\].*least <= most"),
        ({"data_parallel_size": [0, 2]}, r"data_parallel_size is \[0, 2\]"),
        ({"data_parallel_size": [1, 7]}, r"batch_size is 8, not a multiple of micro_batch_size 1 times 3, 5, 6, 7"),
        ({"data_parallel_size": [1, 2], "gradient_accumulation_steps": 4}, r"gradient_accumulation_steps is 4.*pair"),
        ({"data_parallel_size": [1, 2], "strategy": "tensor", "tensor_parallel_size": 2}, r"cannot change its number"),
        ({"offload": True}, r"offload is true, but strategy 'ddp'.*'deepspeed'"),
        ({"strategy": "deepspeed", "zero_stage": 4}, r"zero_stage is 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(distributed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(training={"micro_batch_size": 1}, distributed=distributed)


def test_an_elastic_run_keeps_its_batch_at_every_size() -> None:
    elastic = small_config(training={"micro_batch_size": 2}, distributed={"data_parallel_size": [1, 2]})
    assert [elastic.with_workers(size).accumulation_steps for size in (1, 2)] == [4, 2]
    assert [elastic.with_workers(size).num_workers for size in (1, 2)] == [1, 2]
    assert elastic.num_workers == 2
    with pytest.raises(ConfigError, match=r"asks for 2 workers .* 3 were started"):
        parallelism_for(elastic.with_workers(3), Ranks(0, 3))


def test_an_elastic_run_takes_what_the_cluster_has() -> None:
    training = {"micro_batch_size": 1, "threads_per_worker": 2}
    elastic = small_config(training=training, distributed={"data_parallel_size": [1, 2]})
    assert plan_workers(elastic, [NodeResources(2, 0)]).threads == 2  # room for one worker
    with pytest.raises(Exception, match=r"1 workers of 2 CPU cores do not fit: the cluster has 1 cores"):
        plan_workers(elastic, [NodeResources(1, 0)])


def test_a_mesh_that_is_not_the_world_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"asks for 2 workers \(data_parallel_size 2\), but 1 were started"):
        parallelism_for(small_config(distributed={"data_parallel_size": 2}), Ranks())


def test_without_deepspeed_the_strategy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(distributed={"strategy": "deepspeed"})
    require_backend(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'deepseek-ray\[deepspeed\]'"):
        require_backend(config)
