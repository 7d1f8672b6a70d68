"""Who belongs to a deployment, what each member should do, and whether the whole can generate.

Level-triggered: members report what they are, again and again, and each report is answered with what they should be.
A restarted router therefore learns everything within one report interval; what it cannot learn is in the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from deepseek_ray.control.peers import next_in_ring
from deepseek_ray.control.plan import Plan, Role, take_over, without_member
from deepseek_ray.control.reports import Directive, MemberReport, MemberState, ShardAddress, WorkerView
from deepseek_ray.control.routes import held_by, published_placement, unreachable_experts
from deepseek_ray.control.shard_figures import ShardFigures
from deepseek_ray.control.stand_ins import StandIns
from deepseek_ray.expert_parallel.placement import Placement, experts_of_shard
from deepseek_ray.expert_parallel.table import RoutingTable

GRACE_SECONDS = 10.0
"""How long a shard or all workers may be away before the deployment calls itself not ready."""
SUSPECT_SECONDS = 5.0
"""A member that has not reported for this long counts as lost."""
HEARING_SECONDS = 2.0
"""A router that just started publishes no table before it heard all shards, or this long: what they hold decides it."""


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
    plan: Plan
    """Changed by losses here, by commands from outside; `replan` after a change from outside."""
    started: float = 0.0
    drain_seconds: float = 30.0
    """How long a worker that leaves may finish what it has."""
    kv_copies: bool = False
    """Whether workers copy their cache blocks to a peer."""
    stand_in_after_seconds: float | None = None
    """How long a shard is away before others load its experts; None: never."""
    closing: bool = False
    epoch: int = 1
    _members: dict[tuple[Role, int], _Member] = field(default_factory=dict)
    _leaving_since: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._published: Placement = self.plan.placement
        self._addresses: dict[int, ShardAddress] = {}
        self._wanted: dict[int, dict[int, list[int]]] = {}  # of each shard, under the plan of `_wanted_revision`
        self._wanted_revision = self.plan.revision
        self._stand_ins = StandIns(self.stand_in_after_seconds)

    @property
    def table(self) -> RoutingTable:
        return RoutingTable(self.generation, self.epoch, self._published)

    def observe(self, report: MemberReport, now: float) -> Directive:
        """Take in a report; answer with what the member should do. A loss that it tells of may change the plan."""
        if self.closing or not self.plan.includes(report.role, report.id):
            return Directive(generation=self.generation, exit=True)
        key = (report.role, report.id)
        before = self._members.get(key)
        if before and report.incarnation < before.report.incarnation:
            return Directive(generation=self.generation, replaced=True)
        last_ready = now if report.state == "ready" else (before.last_ready if before else None)
        self._members[key] = _Member(report, now, last_ready)
        if report.role == "expert_shard":
            if before is None or not _same_for_routing(before.report, report):
                self._publish(now)
            return self._direct_shard(report, now)
        self._replace_lost(report.lost_shards, now)
        peer = self._peer_of(report.id, now) if self.kv_copies else None
        if report.table_version != self.table.version and self._has_heard(now):
            return Directive(generation=self.generation, table=self.table, shards=self._addresses, peer=peer)
        return Directive(generation=self.generation, peer=peer)

    def replan(self, plan: Plan, now: float) -> None:
        """A command has changed the plan."""
        self.plan = plan
        self._publish(now)

    def tick(self, now: float, in_flight: Callable[[int], int]) -> None:
        """Time has passed: silent shards count as lost, members that leave and are done are dropped from the plan.

        in_flight(worker): requests that were admitted to it and not released.
        """
        for id in self.plan.shards:
            member = self._members.get(("expert_shard", id))
            if member is not None and now - member.last_seen > SUSPECT_SECONDS:
                self._replace_lost({id: member.report.incarnation}, now)
        self._stand_ins.update(self.plan, self._last_ready_shards(), self.shard_figures(), now)
        for id in self.plan.leaving_workers:
            since = self._leaving_since.setdefault(id, now)
            if in_flight(id) == 0 or now - since > self.drain_seconds:
                self._forget("attention_worker", id)
        for id in self.plan.leaving_shards:
            named = any(id in shards for experts in self._published.values() for shards in experts)
            if not named and self._settled(now):
                self._forget("expert_shard", id)
        if self._live_shards(now).keys() != self._addresses.keys():
            self._publish(now)

    def settled(self, now: float) -> bool:
        """Whether the plan is in force: every member there, every expert where it should be, all workers told."""
        return (
            self._published == self.plan.placement
            and not self.plan.leaving_workers
            and not self.plan.leaving_shards
            and self._settled(now)
            and all(self._served(role, id, now) for role, id in self.plan.members)
            and all(self._wanted_of(id) == held for id, held in self.held_by_shards().items())
        )

    def shard_addresses(self) -> dict[int, ShardAddress]:
        return self._addresses

    def held_by_shards(self) -> dict[int, dict[int, list[int]]]:
        """Shard -> layer -> experts, of every shard that has reported."""
        return {id: member.report.held for (role, id), member in self._members.items() if role == "expert_shard"}

    def workers(self, now: float) -> list[WorkerView]:
        """Attention workers that take requests now."""
        views = []
        for id in self.plan.workers:
            member = self._members.get(("attention_worker", id))
            if member and self._state(member, now) == "ready" and member.report.endpoints:
                views.append(WorkerView(id, member.report.incarnation, member.report.endpoints))
        return views

    def hangs(self, id: int, incarnation: int, now: float) -> bool:
        """Whether this life of an attention worker is over or silent, while others take requests."""
        member = self._members.get(("attention_worker", id))
        if member is None:
            lost = now - self.started > SUSPECT_SECONDS
        else:
            lost = member.report.incarnation > incarnation or self._state(member, now) == "lost"
        return lost and any((view.id, view.incarnation) != (id, incarnation) for view in self.workers(now))

    def _peer_of(self, worker: int, now: float) -> WorkerView | None:
        ready = {view.id: view for view in self.workers(now)}
        peer = next_in_ring(worker, ready)
        return None if peer is None else ready[peer]

    def ready(self, now: float) -> bool:
        """Can generate: every expert and one worker answer, or did so less than GRACE_SECONDS ago."""
        return not self.closing and not self.waiting_for(now)

    def waiting_for(self, now: float) -> list[str]:
        """What keeps the deployment from being ready, in words."""
        away = [id for id in self.plan.shards if not self._served("expert_shard", id, now)]
        missing = []
        if away:
            there = frozenset(self.plan.shards) - frozenset(away)
            if unreachable_experts(self._published, self.held_by_shards(), there):
                missing = [f"expert shard {id}" for id in away]
        if not any(self._served("attention_worker", id, now) for id in self.plan.workers):
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
        return [self._row(role, id, now) for role, id in self.plan.members]

    def stats(self) -> dict[str, dict[str, float]]:
        """`role/id` -> the figures that member reported last."""
        return {f"{role}/{id}": member.report.stats for (role, id), member in sorted(self._members.items())}

    def shard_figures(self) -> dict[int, ShardFigures]:
        """What each shard said of itself last. Machine memory is named by the node."""
        return {
            id: ShardFigures(
                seconds_per_expert=stats.get("seconds_per_expert", 0.0),
                expert_bytes=stats.get("expert_bytes", 0.0),
                memory_bytes=stats.get("memory_bytes", 0.0),
                memory=f"shard {id}" if stats.get("memory_is_own") else node,
            )
            for id, node, stats in (
                (id, member.report.node_id, member.report.stats)
                for (role, id), member in self._members.items()
                if role == "expert_shard"
            )
        }

    def _direct_shard(self, report: MemberReport, now: float) -> Directive:
        held = held_by(report.id, self._wanted_of(report.id), self._published, report.held, self._settled(now))
        is_new = report.state in ("starting", "loading")
        return Directive(generation=self.generation, held=held if is_new or held != report.held else None)

    def _wanted_of(self, shard: int) -> dict[int, list[int]]:
        """layer -> experts that a shard shall hold: the plan's, and those of shards that are away."""
        planned, lent = self._planned_of(shard), self._stand_ins.of(shard)
        if not lent:
            return planned
        return planned | {layer: sorted({*planned.get(layer, ()), *experts}) for layer, experts in lent.items()}

    def _planned_of(self, shard: int) -> dict[int, list[int]]:
        """layer -> experts that the plan gives a shard; looked up in every report, so it is kept."""
        if self._wanted_revision != self.plan.revision:
            self._wanted, self._wanted_revision = {}, self.plan.revision
        if shard not in self._wanted:
            self._wanted[shard] = experts_of_shard(self.plan.placement, shard)
        return self._wanted[shard]

    def _publish(self, now: float) -> None:
        """Raise the epoch if workers should be told something else than before."""
        live = self._live_shards(now)
        published = published_placement(self.plan.placement, {id: report.held for id, report in live.items()})
        addresses = {
            id: ShardAddress(report.incarnation, report.endpoints) for id, report in live.items() if report.endpoints
        }
        if (published, addresses) != (self._published, self._addresses):
            self._published, self._addresses = published, addresses
            self.epoch += 1

    def _live_shards(self, now: float) -> dict[int, MemberReport]:
        return {
            id: member.report
            for (role, id), member in self._members.items()
            if role == "expert_shard" and self._state(member, now) == "ready"
        }

    def _last_ready_shards(self) -> dict[int, float]:
        """When each shard was last ready; of those a restarted router has not heard, when it started."""
        times: dict[int, float] = {}
        for id in self.plan.shards:
            member = self._members.get(("expert_shard", id))
            if member is not None and member.last_ready is not None:
                times[id] = member.last_ready
            elif member is None and self.generation > 1:
                times[id] = self.started
        return times

    def _settled(self, now: float) -> bool:
        """Whether every worker that may still ask shards has the published table."""
        return self._has_heard(now) and all(
            member.report.table_version == self.table.version
            for (role, _), member in self._members.items()
            if role == "attention_worker" and self._state(member, now) == "ready"
        )

    def _has_heard(self, now: float) -> bool:
        heard = all(("expert_shard", id) in self._members for id in self.plan.shards)
        return heard or now - self.started > HEARING_SECONDS

    def _replace_lost(self, lost: dict[int, int], now: float) -> None:
        """Give the experts of lost shards to standbys that are ready for them."""
        for id, incarnation in lost.items():
            member = self._members.get(("expert_shard", id))
            if member is None or member.report.incarnation != incarnation or id not in self.plan.shards:
                continue
            ready = self._live_shards(now)
            plan = self.plan
            if any(standby in ready for standby in plan.standbys):
                order = sorted(plan.standbys, key=lambda standby: standby not in ready)
                self.plan = take_over(msgspec.structs.replace(plan, standbys=tuple(order)), id)
                self._publish(now)

    def _forget(self, role: Role, id: int) -> None:
        """A leaving member is done: its next report is answered with the way out."""
        self.plan = without_member(self.plan, role, id)
        self._members.pop((role, id), None)
        self._leaving_since.pop(id, None)

    def _row(self, role: Role, id: int, now: float) -> dict[str, str | int]:
        member = self._members.get((role, id))
        if member is None:
            return {"role": role, "id": id, "pid": 0, "node_id": "", "state": "starting", "restarts": 0}
        report = member.report
        return {
            "role": role,
            "id": id,
            "pid": report.pid,
            "node_id": report.node_id,
            "state": self._shown_state(role, id, member, now),
            "restarts": report.restarts,
        }

    def _shown_state(self, role: Role, id: int, member: _Member, now: float) -> MemberState:
        state = self._state(member, now)
        if state != "ready":
            return state
        leaving = self.plan.leaving_workers if role == "attention_worker" else self.plan.leaving_shards
        if id in leaving:
            return "draining"
        return "standby" if role == "expert_shard" and id in self.plan.standbys else state

    def _state(self, member: _Member, now: float) -> MemberState:
        return "lost" if now - member.last_seen > SUSPECT_SECONDS else member.report.state

    def _served(self, role: Role, id: int, now: float) -> bool:
        member = self._members.get((role, id))
        return member is not None and member.last_ready is not None and now - member.last_ready < GRACE_SECONDS


def _same_for_routing(a: MemberReport, b: MemberReport) -> bool:
    return (a.incarnation, a.state, a.held) == (b.incarnation, b.state, b.held)
