"""Who belongs to a deployment, what each member should do, and whether the whole can generate.

Level-triggered: members report what they are, again and again, and each report is answered with what they should be.
A restarted router therefore learns everything within one report interval and needs no history.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from deepseek_ray.expert_parallel.placement import contiguous_placement, experts_of_shard
from deepseek_ray.expert_parallel.table import RoutingTable
from deepseek_ray.links.base import Endpoints

Role = Literal["router", "attention_worker", "expert_shard"]
MemberState = Literal["starting", "loading", "ready", "failed", "lost"]

GRACE_SECONDS = 10.0
"""How long a shard or all workers may be away before the deployment calls itself not ready."""
SUSPECT_SECONDS = 5.0
"""A member that has not reported for this long counts as lost."""


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
    stats: dict[str, float] = {}


class ShardAddress(msgspec.Struct, frozen=True):
    """Where a live shard process listens."""

    incarnation: int
    endpoints: Endpoints


class Directive(msgspec.Struct, kw_only=True, frozen=True):
    """What the router tells a member in answer to its report."""

    generation: int
    exit: bool = False
    held: dict[int, list[int]] | None = None
    """For a shard: layer -> experts it shall hold."""
    table: RoutingTable | None = None
    """For a worker whose table is older than the router's."""
    shards: dict[int, ShardAddress] = {}
    """With `table`: the shards that answer now."""


class WorkerView(msgspec.Struct, frozen=True):
    """An attention worker that takes requests."""

    id: int
    incarnation: int
    endpoints: Endpoints


@dataclass
class _Member:
    report: MemberReport
    last_seen: float
    last_ready: float | None
    """When it last was ready; None if it never was."""


@dataclass
class Membership:
    """The router's picture of one deployment. Times are monotonic seconds given by the caller."""

    generation: int
    moe_layers: tuple[int, ...]
    num_experts: int
    num_shards: int
    num_workers: int
    closing: bool = False
    epoch: int = 1
    _members: dict[tuple[Role, int], _Member] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._owners = contiguous_placement(self.moe_layers, self.num_experts, self.num_shards)

    @property
    def table(self) -> RoutingTable:
        return RoutingTable(self.generation, self.epoch, self._owners)

    def observe(self, report: MemberReport, now: float) -> Directive:
        """Take in a report; answer with what the member should do."""
        if self.closing:
            return Directive(generation=self.generation, exit=True)
        key = (report.role, report.id)
        before = self._members.get(key)
        if before and report.incarnation < before.report.incarnation:
            return Directive(generation=self.generation, exit=True)  # a process that was already replaced
        ready = report.state == "ready"
        last_ready = now if ready else (before.last_ready if before else None)
        self._members[key] = _Member(report, now, last_ready)
        if report.role == "expert_shard":
            if ready and not (before and _same_life(before.report, report)):
                self.epoch += 1
            return Directive(generation=self.generation, held=experts_of_shard(self._owners, report.id))
        if report.table_version != self.table.version:
            return Directive(generation=self.generation, table=self.table, shards=self.shard_addresses())
        return Directive(generation=self.generation)

    def shard_addresses(self) -> dict[int, ShardAddress]:
        return {
            id: ShardAddress(member.report.incarnation, member.report.endpoints)
            for (role, id), member in self._members.items()
            if role == "expert_shard" and member.report.state == "ready" and member.report.endpoints
        }

    def workers(self, now: float) -> list[WorkerView]:
        """Attention workers that take requests now."""
        return [
            WorkerView(id, member.report.incarnation, member.report.endpoints)
            for (role, id), member in sorted(self._members.items())
            if role == "attention_worker" and self._state(member, now) == "ready" and member.report.endpoints
        ]

    def ready(self, now: float) -> bool:
        """Can generate: every shard and one worker answer, or did so less than GRACE_SECONDS ago."""
        return not self.closing and not self.waiting_for(now)

    def waiting_for(self, now: float) -> list[str]:
        """What keeps the deployment from being ready, in words."""
        missing = [f"expert shard {id}" for id in range(self.num_shards) if not self._served("expert_shard", id, now)]
        if not any(self._served("attention_worker", id, now) for id in range(self.num_workers)):
            missing.append("an attention worker")
        return missing

    def failure(self) -> str | None:
        """Why a member says it can never be ready, if one does."""
        for (role, id), member in sorted(self._members.items()):
            if member.report.state == "failed":
                return f"{role.replace('_', ' ')} {id}: {member.report.error}"
        return None

    def status(self, now: float) -> list[dict[str, str | int]]:
        """One row per expected member, as `deepseek-ray status` prints it."""
        expected: list[tuple[Role, int]] = [("attention_worker", id) for id in range(self.num_workers)]
        expected += [("expert_shard", id) for id in range(self.num_shards)]
        return [self._row(role, id, now) for role, id in expected]

    def stats(self) -> dict[str, dict[str, float]]:
        """`role/id` -> the figures that member reported last."""
        return {f"{role}/{id}": member.report.stats for (role, id), member in sorted(self._members.items())}

    def _row(self, role: Role, id: int, now: float) -> dict[str, str | int]:
        member = self._members.get((role, id))
        if member is None:
            return {"role": role, "id": id, "pid": 0, "node_id": "", "state": "starting", "restarts": 0}
        report = member.report
        state = self._state(member, now)
        return {
            "role": role,
            "id": id,
            "pid": report.pid,
            "node_id": report.node_id,
            "state": state,
            "restarts": report.restarts,
        }

    def _state(self, member: _Member, now: float) -> MemberState:
        return "lost" if now - member.last_seen > SUSPECT_SECONDS else member.report.state

    def _served(self, role: Role, id: int, now: float) -> bool:
        member = self._members.get((role, id))
        return member is not None and member.last_ready is not None and now - member.last_ready < GRACE_SECONDS


def _same_life(a: MemberReport, b: MemberReport) -> bool:
    return a.incarnation == b.incarnation and a.state == b.state
