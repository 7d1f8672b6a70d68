"""What members and the router tell each other, and whom they name."""

from __future__ import annotations

from typing import Literal

import msgspec

from deepseek_ray.control.plan import Role
from deepseek_ray.expert_parallel.table import RoutingTable
from deepseek_ray.links.base import Endpoints

MemberState = Literal["starting", "loading", "ready", "failed", "lost", "standby", "draining"]


class MemberReport(msgspec.Struct, kw_only=True, frozen=True):
    """What a member says about itself. A new process has a new `incarnation`."""

    role: Role
    id: int
    incarnation: int
    pid: int
    node_id: str
    restarts: int
    state: MemberState
    endpoints: Endpoints | None = None
    error: str | None = None
    """With state "failed": why, in one sentence for the person who started the deployment."""
    table_version: tuple[int, int] = (0, 0)
    """Newest routing table a worker has."""
    held: dict[int, list[int]] = {}
    """Of a shard: layer -> experts it answers for."""
    lost_shards: dict[int, int] = {}
    """Of a worker: shard -> incarnation of the process that it cannot reach."""
    expert_tokens: dict[int, list[int]] = {}
    """Of a worker, now and then: layer -> tokens sent to each expert since its process started."""
    stats: dict[str, float] = {}


class ShardAddress(msgspec.Struct, frozen=True):
    """Where a live shard process listens."""

    incarnation: int
    endpoints: Endpoints


class WorkerView(msgspec.Struct, frozen=True):
    """An attention worker that takes requests."""

    id: int
    incarnation: int
    endpoints: Endpoints


class Directive(msgspec.Struct, kw_only=True, frozen=True):
    """What the router tells a member in answer to its report."""

    generation: int
    exit: bool = False
    """The member shall end for good."""
    replaced: bool = False
    """This process shall end: another one is the member now. A node that was cut off may still run the old one."""
    held: dict[int, list[int]] | None = None
    """For a shard that holds something else: layer -> experts it shall hold."""
    table: RoutingTable | None = None
    """For a worker whose table is older than the router's."""
    shards: dict[int, ShardAddress] = {}
    """With `table`: the shards that answer now."""
    peer: WorkerView | None = None
    """For a worker, where blocks are copied: who keeps copies of its full cache blocks; None while there is nobody."""
