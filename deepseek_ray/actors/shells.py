"""The Ray side of attention workers and expert shards.

The classes import what they run inside `__init__`: the router creates them and must not load torch for that.
"""

from __future__ import annotations

import os


class AttentionWorkerActor:
    """An attention worker in its own process."""

    def __init__(self, deployment: str, id: int, threads: int) -> None:
        _set_variables(threads)
        from deepseek_ray.actors.attention_worker import AttentionWorker

        self._worker = AttentionWorker(deployment, id, threads)

    def pid(self) -> int:
        return os.getpid()

    def poke(self) -> None:
        """The router has news: report now instead of at the next turn."""
        self._worker.report_now()


class ExpertShardActor:
    """An expert shard in its own process."""

    def __init__(self, deployment: str, id: int, threads: int) -> None:
        _set_variables(threads)
        from deepseek_ray.actors.expert_shard import ExpertShard

        self._shard = ExpertShard(deployment, id, threads)

    def pid(self) -> int:
        return os.getpid()

    def poke(self) -> None:
        """The router has news: report now instead of at the next turn."""
        self._shard.report_now()


def _set_variables(threads: int) -> None:
    """Before torch is loaded. Threads that wait must sleep: spinning ones take the cores of the process they wait for.
    And the death of a peer is the link's matter: torch would end a process whose NCCL call has failed."""
    os.environ.update(OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0")
    os.environ.update(TORCH_NCCL_ASYNC_ERROR_HANDLING="0", TORCH_NCCL_ENABLE_MONITORING="0")
