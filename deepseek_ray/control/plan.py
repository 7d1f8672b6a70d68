"""What a deployment should consist of, and how commands and losses change that. Plans are values; nothing is changed in
place. The router keeps the newest one in the cluster's key-value store, so it outlives the router.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.control.shard_figures import capacities
from deepseek_ray.errors import DeploymentError
from deepseek_ray.expert_parallel.placement import Placement, contiguous_placement
from deepseek_ray.expert_parallel.rebalance import rebalance

Role = Literal["router", "attention_worker", "expert_shard"]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Members by id, and which shard shall hold which experts. An id is never used twice."""

    revision: int = 1
    """One more with each change."""
    workers: tuple[int, ...]
    """Attention workers that take requests."""
    shards: tuple[int, ...]
    """Expert shards that hold experts."""
    standbys: tuple[int, ...] = ()
    """Expert shards that hold none and take the place of one that is lost."""
    leaving_workers: tuple[int, ...] = ()
    """Finish what they have, then end."""
    leaving_shards: tuple[int, ...] = ()
    """End when nobody asks them any more."""
    next_worker: int
    next_shard: int
    min_replicas: int = 1
    """Shards that shall hold each expert, as far as there are enough."""
    extra_replicas: int = 0
    """Replicas that a layer may have beyond these."""
    placement: Placement

    @property
    def members(self) -> list[tuple[Role, int]]:
        """Everybody who shall have a process."""
        workers: list[tuple[Role, int]] = [("attention_worker", id) for id in self.workers + self.leaving_workers]
        shards = self.shards + self.standbys + self.leaving_shards
        return workers + [("expert_shard", id) for id in sorted(shards)]

    def includes(self, role: Role, id: int) -> bool:
        return (role, id) in self.members

    def changed(self, **fields: object) -> Plan:
        return msgspec.structs.replace(self, revision=self.revision + 1, **fields)


def initial_plan(moe_layers: Sequence[int], num_experts: int, config: DeploymentConfig) -> Plan:
    """As many members as `config` says, experts in equal runs and then replicated without regard to load.

    DeploymentError: more shards than experts.
    """
    workers, shards, standbys = config.attention_workers, config.expert_shards, config.standby_shards
    placement = contiguous_placement(moe_layers, num_experts, range(shards))
    if config.expert_replicas > 1 and placement:
        placement = rebalance(
            placement, capacities(placement, range(shards), {}), min_replicas=config.expert_replicas
        ).placement
    return Plan(
        min_replicas=config.expert_replicas,
        extra_replicas=config.extra_replicas,
        workers=tuple(range(workers)),
        shards=tuple(range(shards)),
        standbys=tuple(range(shards, shards + standbys)),
        next_worker=workers,
        next_shard=shards + standbys,
        placement=placement,
    )


def initial_members(config: DeploymentConfig) -> list[tuple[Role, int]]:
    """Those of `initial_plan`, without deciding where the experts of a large model go."""
    workers: list[tuple[Role, int]] = [("attention_worker", id) for id in range(config.attention_workers)]
    return workers + [("expert_shard", id) for id in range(config.expert_shards + config.standby_shards)]


def with_placement(plan: Plan, placement: Placement) -> Plan:
    """`plan` itself when nothing moves."""
    return plan if placement == plan.placement else plan.changed(placement=placement)


def add_workers(plan: Plan, count: int) -> Plan:
    new = tuple(range(plan.next_worker, plan.next_worker + count))
    return plan.changed(workers=plan.workers + new, next_worker=plan.next_worker + count)


def drain_worker(plan: Plan, worker: int) -> Plan:
    """The worker takes no new requests and ends when it has none. DeploymentError: unknown, or the last one."""
    if worker in plan.leaving_workers:
        return plan
    _require_known(worker, plan.workers, "attention worker")
    if len(plan.workers) == 1:
        raise DeploymentError(
            f"attention worker {worker} is the only one; add another first (scale --attention-workers 2)"
        )
    return plan.changed(workers=_without(plan.workers, worker), leaving_workers=(*plan.leaving_workers, worker))


def add_shards(plan: Plan, count: int) -> Plan:
    """New shards that hold nothing yet; placing experts on them is the next step."""
    new = tuple(range(plan.next_shard, plan.next_shard + count))
    return plan.changed(shards=plan.shards + new, next_shard=plan.next_shard + count)


def drain_shard(plan: Plan, shard: int, placement: Placement) -> Plan:
    """The shard ends when `placement`, which gives it nothing, is in force. DeploymentError: unknown, or the last."""
    if shard in plan.leaving_shards:
        return plan
    if shard in plan.standbys:
        return plan.changed(standbys=_without(plan.standbys, shard), leaving_shards=(*plan.leaving_shards, shard))
    require_drainable(plan, shard)
    return plan.changed(
        shards=_without(plan.shards, shard), leaving_shards=(*plan.leaving_shards, shard), placement=placement
    )


def require_drainable(plan: Plan, shard: int) -> None:
    """DeploymentError when the shard is unknown, or the only one that holds experts."""
    _require_known(shard, (*plan.shards, *plan.standbys), "expert shard")
    if plan.shards == (shard,):
        raise DeploymentError(f"expert shard {shard} is the only one; add another first (scale --expert-shards 2)")


def take_over(plan: Plan, lost: int) -> Plan:
    """A standby gets the experts of a lost shard, whose next process is then the standby. Unchanged without one."""
    if lost in plan.standbys or not plan.standbys or lost not in plan.shards:
        return plan
    standby = plan.standbys[0]
    placement = {
        layer: [tuple(sorted(standby if shard == lost else shard for shard in shards)) for shards in experts]
        for layer, experts in plan.placement.items()
    }
    return plan.changed(
        shards=tuple(sorted((*_without(plan.shards, lost), standby))),
        standbys=(*plan.standbys[1:], lost),
        placement=placement,
    )


def without_member(plan: Plan, role: Role, id: int) -> Plan:
    """A leaving member has ended."""
    if role == "attention_worker":
        return plan.changed(leaving_workers=_without(plan.leaving_workers, id))
    return plan.changed(leaving_shards=_without(plan.leaving_shards, id))


def _without(ids: tuple[int, ...], id: int) -> tuple[int, ...]:
    return tuple(other for other in ids if other != id)


def _require_known(id: int, ids: Sequence[int], what: str) -> None:
    if id not in ids:
        raise DeploymentError(f"there is no {what} {id}; there are {', '.join(map(str, ids))}")
