"""The Ray side of attention workers and expert shards.

The classes import what they run inside `__init__`: the router creates them and must not load torch for that.
"""

from __future__ import annotations

import os


class AttentionWorkerActor:
    """An attention worker in its own process."""

    def __init__(self, deployment: str, id: int, threads: int) -> None:
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
        from deepseek_ray.actors.expert_shard import ExpertShard

        self._shard = ExpertShard(deployment, id, threads)

    def pid(self) -> int:
        return os.getpid()

    def poke(self) -> None:
        """The router has news: report now instead of at the next turn."""
        self._shard.report_now()
