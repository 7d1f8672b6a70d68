"""The faults that are tried, each with the deployment it strikes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deepseek_ray.chaos.host_cluster import ROLE_LABEL
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
    hosts: tuple[str, ...] = ()
    """Role of each host beside this machine, which is the cluster's head; none: a cluster of this machine alone."""
    tight_health_checks: bool = False
    """Of the cluster of hosts: it takes a silent node for dead within two seconds."""


_SHARDS_AWAY = {"attention_labels": {ROLE_LABEL: "head"}, "expert_labels": {ROLE_LABEL: "experts"}}
_WORKERS_AWAY = {
    "attention_workers": 2,
    "attention_labels": {ROLE_LABEL: "attention"},
    "expert_labels": {ROLE_LABEL: "head"},
}
_EXPERT_HOSTS = ("experts", "experts")
_ATTENTION_HOSTS = ("attention", "attention")

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
    "stop-worker": Cell(
        "SIGSTOP attention worker 20 s, 2 workers",
        lambda nemesis: nemesis.stop("attention_worker", 20.0),
        config={"attention_workers": 2},
        promised_stall=8.0,
    ),
    "kill-router": Cell("SIGKILL router", lambda nemesis: nemesis.kill("router"), promised_stall=0.3),
    "stop-shard-replica": Cell(
        "SIGSTOP expert shard 10 s, replica there",
        lambda nemesis: nemesis.stop("expert_shard", 10.0),
        config={"expert_replicas": 2},
        promised_stall=1.0,
    ),
    "stop-shard": Cell(
        "SIGSTOP expert shard 20 s, none",
        lambda nemesis: nemesis.stop("expert_shard", 20.0),
        promised_stall=15.0,
    ),
    "power-off-shard": Cell(
        "power cut of an expert shard's host, 3 nodes",
        lambda nemesis: nemesis.power_off("expert_shard"),
        config=_SHARDS_AWAY,
        promised_stall=15.0,
        hosts=_EXPERT_HOSTS,
        tight_health_checks=True,
    ),
    "power-off-worker": Cell(
        "power cut of an attention worker's host, 3 nodes",
        lambda nemesis: nemesis.power_off("attention_worker"),
        config=_WORKERS_AWAY,
        promised_stall=15.0,
        hosts=_ATTENTION_HOSTS,
        tight_health_checks=True,
    ),
    "cut-off-shard-5": Cell(
        "partition 5 s, expert shard's host",
        lambda nemesis: nemesis.cut_off("expert_shard", 5.0),
        config=_SHARDS_AWAY,
        hosts=_EXPERT_HOSTS,
    ),
    "cut-off-shard-60": Cell(
        "partition 60 s, expert shard's host",
        lambda nemesis: nemesis.cut_off("expert_shard", 60.0),
        config=_SHARDS_AWAY,
        promised_stall=15.0,
        hosts=_EXPERT_HOSTS,
    ),
    "cut-off-worker-5": Cell(
        "partition 5 s, attention worker's host",
        lambda nemesis: nemesis.cut_off("attention_worker", 5.0),
        config=_WORKERS_AWAY,
        hosts=_ATTENTION_HOSTS,
    ),
    "cut-off-worker-60": Cell(
        "partition 60 s, attention worker's host",
        lambda nemesis: nemesis.cut_off("attention_worker", 60.0),
        config=_WORKERS_AWAY,
        hosts=_ATTENTION_HOSTS,
    ),
    "scale": Cell("scale 2 -> 3 -> 2 expert shards", lambda nemesis: nemesis.command("scale", (None, 3), (None, 2))),
    "drain": Cell("drain expert shard", lambda nemesis: nemesis.drain_any_shard()),
    "rebalance": Cell(
        "rebalance to two replicas and back", lambda nemesis: nemesis.command("rebalance", (0, 2), (0, 1))
    ),
}
