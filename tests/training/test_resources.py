"""Which device and how many cores each worker gets."""

from __future__ import annotations

from typing import Any

import pytest
from training_runs import small_config

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import TrainingError
from deepseek_ray.training.resources import NodeResources, WorkerResources, plan_workers


def config(workers: int = 1, **training: Any) -> PretrainConfig:
    training = {"threads_per_worker": None, "global_batch_size": 8, "micro_batch_size": 1, **training}
    return small_config(training=training, distributed={"data_parallel_size": workers})


def cpu(*cores: int) -> list[NodeResources]:
    return [NodeResources(count, 0) for count in cores]


@pytest.mark.parametrize(
    ("workers", "nodes", "expected"),
    [
        (1, cpu(2), WorkerResources(2, False)),  # one worker takes both cores
        (2, cpu(2), WorkerResources(1, False)),
        (1, cpu(96), WorkerResources(16, False)),  # no more than 16
        (4, cpu(8, 8), WorkerResources(4, False)),
        (2, cpu(1, 6), WorkerResources(3, False)),  # the small node is left out
        (2, [NodeResources(16, 2)], WorkerResources(4, True)),
        (4, [NodeResources(16, 2)], WorkerResources(4, False)),  # a GPU for every worker or for none
    ],
)
def test_auto(workers: int, nodes: list[NodeResources], expected: WorkerResources) -> None:
    assert plan_workers(config(workers), nodes) == expected


def test_asked_for_threads_and_device_are_kept() -> None:
    assert plan_workers(config(threads_per_worker=3), cpu(8)) == WorkerResources(3, False)
    assert plan_workers(config(device="cpu"), [NodeResources(8, 1)]) == WorkerResources(8, False)


@pytest.mark.parametrize(
    ("asked", "nodes", "message"),
    [
        (config(8), cpu(2), r"8 workers of 1 CPU cores do not fit: the cluster has 2 cores.*lower"),
        (config(threads_per_worker=4), cpu(2), r"1 workers of 4 CPU cores do not fit"),
        (config(2, device="cuda"), [NodeResources(8, 1)], r"'cuda' for 2 workers, but the cluster has 1 GPUs"),
    ],
)
def test_a_cluster_that_is_too_small(asked: PretrainConfig, nodes: list[NodeResources], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        plan_workers(asked, nodes)
