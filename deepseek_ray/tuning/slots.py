"""How many trials run at once, and with how many cores, decided from what the cluster has free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import SweepError
from deepseek_ray.training.resources import NodeResources

_MOST_THREADS = 16
_GPU_THREADS = 4


@dataclass(frozen=True)
class Slots:
    """Room for trials."""

    count: int
    """Trials that run at once; all their workers fit together, so none waits for another."""
    threads: int
    """Cores of each worker."""


def plan_slots(
    base: PretrainConfig,
    nodes: Sequence[NodeResources],
    free: Sequence[NodeResources],
    num_trials: int,
    max_concurrent: int | None,
) -> Slots:
    """As many trials as fit side by side, then as many cores for each as are left.

    `nodes`: what living nodes have, `free`: what of it nobody holds. A trial itself holds nothing: its workers do.
    Raises SweepError when not even one trial fits, with what is missing.
    """
    workers, asked = base.num_workers, base.training.threads_per_worker
    on_gpu = _uses_gpu(base, nodes)
    fewest = asked or 1
    room = _room(free, fewest, on_gpu) // workers
    if room == 0:
        raise SweepError(_what_is_missing(workers, fewest, on_gpu, nodes, free))
    count = min(room, num_trials, max_concurrent or room)
    most = _GPU_THREADS if on_gpu else _MOST_THREADS
    candidates = [asked] if asked else range(most, 0, -1)
    threads = next(threads for threads in candidates if _room(free, threads, on_gpu) // workers >= count)
    return Slots(count, threads)


def _uses_gpu(base: PretrainConfig, nodes: Sequence[NodeResources]) -> bool:
    """As `training/resources.py` decides it for each trial."""
    device = base.training.device
    return device == "cuda" or (device == "auto" and sum(node.gpus for node in nodes) >= base.num_workers)


def _room(nodes: Sequence[NodeResources], threads: int, on_gpu: bool) -> int:
    """Workers that fit."""
    return sum(min(node.cpus // threads, node.gpus) if on_gpu else node.cpus // threads for node in nodes)


def _what_is_missing(
    workers: int, threads: int, on_gpu: bool, nodes: Sequence[NodeResources], free: Sequence[NodeResources]
) -> str:
    need = f"{workers} workers of {threads} CPU cores{' and 1 GPU' if on_gpu else ''}"
    cores, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    have = f"the cluster has {cores} CPU cores and {gpus} GPUs on {len(nodes)} nodes"
    if _room(nodes, threads, on_gpu) >= workers:
        held = f"of which {sum(node.cpus for node in free)} cores and {sum(node.gpus for node in free)} GPUs are free"
        return f"one trial needs {need}; {have}, {held}: wait until other jobs have ended, or add nodes"
    return (
        f"one trial needs {need}; {have}: lower distributed.data_parallel_size or training.threads_per_worker, set "
        "training.device to cpu, or add nodes"
    )
