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
    """Device and cores of each worker. Raises TrainingError when the cluster is too small for the run.

    An elastic run is planned for as many workers as fit now, and needs room for the fewest.
    """
    per_model = config.num_workers // config.distributed.data_sizes[-1]
    sizes = [per_model * size for size in config.distributed.data_sizes]
    for num_workers in reversed(sizes):
        if planned := _plan(config, num_workers, nodes):
            return planned
    raise TrainingError(_what_is_missing(config, sizes[0], nodes))


def _plan(config: PretrainConfig, num_workers: int, nodes: Sequence[NodeResources]) -> WorkerResources | None:
    use_gpu = _uses_gpu(config, num_workers, nodes)
    asked = config.training.threads_per_worker
    for threads in [asked] if asked else range(_GPU_THREADS if use_gpu else _MOST_THREADS, 0, -1):
        if sum(_room(node, threads, use_gpu) for node in nodes) >= num_workers:
            return WorkerResources(threads, use_gpu)
    return None


def _uses_gpu(config: PretrainConfig, num_workers: int, nodes: Sequence[NodeResources]) -> bool:
    wanted = config.training.device
    return wanted == "cuda" or (wanted == "auto" and sum(node.gpus for node in nodes) >= num_workers)


def _what_is_missing(config: PretrainConfig, num_workers: int, nodes: Sequence[NodeResources]) -> str:
    cores, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    if config.training.device == "cuda" and gpus < num_workers:
        return (
            f"training.device is 'cuda' for {num_workers} workers, but the cluster has {gpus} GPUs; lower "
            "distributed.data_parallel_size, set training.device to cpu, or add nodes"
        )
    on_gpu = " and 1 GPU" if _uses_gpu(config, num_workers, nodes) else ""
    return (
        f"{num_workers} workers of {config.training.threads_per_worker or 1} CPU cores{on_gpu} do not fit: the cluster "
        f"has {cores} cores and {gpus} GPUs on {len(nodes)} nodes; lower distributed.data_parallel_size or "
        "training.threads_per_worker, or add nodes"
    )


def _room(node: NodeResources, threads: int, use_gpu: bool) -> int:
    """Workers that fit on one node."""
    by_cpu = node.cpus // threads
    return min(by_cpu, node.gpus) if use_gpu else by_cpu
