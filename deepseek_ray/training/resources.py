"""How many cores and which device each worker gets, decided from what the cluster has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import TrainingError

_MOST_THREADS = 16
"""More cores than this rarely make one worker faster; more workers do."""
_GPU_THREADS = 4
"""Cores beside a GPU: the loop, the loader and NCCL."""


@dataclass(frozen=True)
class NodeResources:
    """What a living node offers."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class WorkerResources:
    """What each worker gets."""

    threads: int
    use_gpu: bool

    def describe(self) -> str:
        return f"1 GPU and {self.threads} cores" if self.use_gpu else f"{self.threads} CPU cores"


def plan_workers(config: PretrainConfig, nodes: Sequence[NodeResources]) -> WorkerResources:
    """Device and cores of each worker. Raises TrainingError when the cluster is too small for the run."""
    num_workers, wanted = config.num_workers, config.training.device
    num_gpus = sum(node.gpus for node in nodes)
    if wanted == "cuda" and num_gpus < num_workers:
        raise TrainingError(
            f"training.device is 'cuda' for {num_workers} workers, but the cluster has {num_gpus} GPUs; lower "
            "distributed.data_parallel_size, set training.device to cpu, or add nodes"
        )
    use_gpu = wanted == "cuda" or (wanted == "auto" and num_gpus >= num_workers)
    asked = config.training.threads_per_worker
    candidates = [asked] if asked else range(_GPU_THREADS if use_gpu else _MOST_THREADS, 0, -1)
    for threads in candidates:
        if sum(_room(node, threads, use_gpu) for node in nodes) >= num_workers:
            return WorkerResources(threads, use_gpu)
    raise TrainingError(
        f"{num_workers} workers of {asked or 1} CPU cores{' and 1 GPU' if use_gpu else ''} do not fit: the cluster has "
        f"{sum(node.cpus for node in nodes)} cores and {num_gpus} GPUs on {len(nodes)} nodes; lower "
        "distributed.data_parallel_size or training.threads_per_worker, or add nodes"
    )


def _room(node: NodeResources, threads: int, use_gpu: bool) -> int:
    """Workers that fit on one node."""
    by_cpu = node.cpus // threads
    return min(by_cpu, node.gpus) if use_gpu else by_cpu
