"""The faults that are tried, each with the deployment it strikes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deepseek_ray.chaos.nemesis import Nemesis


@dataclass(frozen=True)
class Cell:
    """One row of the table of failures."""

    title: str
    strike: Callable[[Nemesis], None]
    config: Mapping[str, Any] = field(default_factory=dict)
    """What differs from one attention worker and two expert shards."""
    promised_stall: float | None = None
    """Longest median stall that is promised, seconds."""


CELLS = {
    "control": Cell("nothing happens", strike=lambda nemesis: None),
    "kill-shard-replica": Cell(
        "SIGKILL expert shard, replica there",
        lambda nemesis: nemesis.kill("expert_shard"),
        config={"expert_replicas": 2},
        promised_stall=0.3,
    ),
    "kill-shard-standby": Cell(
        "SIGKILL expert shard, standby there",
        lambda nemesis: nemesis.kill("expert_shard"),
        config={"standby_shards": 1},
        promised_stall=0.3,
    ),
    "kill-shard": Cell("SIGKILL expert shard, none", lambda nemesis: nemesis.kill("expert_shard"), promised_stall=8.0),
    "kill-worker": Cell(
        "SIGKILL attention worker, 2 workers",
        lambda nemesis: nemesis.kill("attention_worker"),
        config={"attention_workers": 2},
        promised_stall=1.5,
    ),
    "kill-worker-copies": Cell(
        "SIGKILL attention worker, 2 workers, KV copies",
        lambda nemesis: nemesis.kill("attention_worker"),
        config={"attention_workers": 2, "kv_copies": True},
        promised_stall=1.5,
    ),
    "kill-router": Cell("SIGKILL router", lambda nemesis: nemesis.kill("router"), promised_stall=0.3),
    "stop-shard-replica": Cell(
        "SIGSTOP expert shard 10 s, replica there",
        lambda nemesis: nemesis.stop("expert_shard", 10.0),
        config={"expert_replicas": 2},
        promised_stall=1.0,
    ),
    "scale": Cell("scale 2 -> 3 -> 2 expert shards", lambda nemesis: nemesis.command("scale", (None, 3), (None, 2))),
    "drain": Cell("drain expert shard", lambda nemesis: nemesis.drain_any_shard()),
    "rebalance": Cell(
        "rebalance to two replicas and back", lambda nemesis: nemesis.command("rebalance", (0, 2), (0, 1))
    ),
}
