"""What people and policies may ask of a running deployment: a plan and a wish in, the next plan out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from deepseek_ray.control.plan import (
    Plan,
    Role,
    add_shards,
    add_workers,
    drain_shard,
    drain_worker,
    require_drainable,
    with_placement,
)
from deepseek_ray.control.shard_figures import Figures, capacities
from deepseek_ray.errors import DeploymentError
from deepseek_ray.expert_parallel import rebalance as placements
from deepseek_ray.expert_parallel.replicas import ShardCapacity

Loads = Mapping[int, NDArray[np.float64]]
"""layer -> tokens of each expert lately [experts]; zeros where nothing is known."""

UNKNOWN: Figures = MappingProxyType({})
"""Shards that have said nothing yet: all alike, with room for everything."""

MAX_MEMBERS = 1024
"""Of a role, for one deployment."""


def scale(
    plan: Plan,
    loads: Loads,
    workers: int | None = None,
    shards: int | None = None,
    figures: Figures = UNKNOWN,
) -> Plan:
    """As many attention workers and expert shards as asked for; None leaves a number as it is.

    The youngest go first. New shards take experts from the busiest. DeploymentError for impossible numbers.
    """
    most_shards = min(MAX_MEMBERS, min(len(experts) for experts in plan.placement.values())) if plan.placement else 1
    _check_number("attention workers", workers, MAX_MEMBERS)
    _check_number("expert shards", shards, most_shards)
    if workers is not None:
        plan = _scale_workers(plan, workers)
    if shards is not None:
        plan = _scale_shards(plan, shards, loads, figures)
    return plan


def drain(plan: Plan, role: str, id: int, loads: Loads, figures: Figures = UNKNOWN) -> Plan:
    """A member ends as soon as nothing needs it. DeploymentError: unknown, or the last of its role."""
    if role == "attention_worker":
        return drain_worker(plan, id)
    if role != "expert_shard":
        raise DeploymentError(f"cannot drain a {role!r}; drain an attention_worker or an expert_shard")
    if id not in plan.shards:
        return drain_shard(plan, id, plan.placement)
    require_drainable(plan, id)
    copies = min(plan.min_replicas, len(plan.shards) - 1)
    change = placements.drain(plan.placement, _capacities(plan, figures), id, _useful(loads), min_replicas=copies)
    return drain_shard(plan, id, change.placement)


def rebalance(
    plan: Plan,
    loads: Loads,
    extra_replicas: int | None = None,
    min_replicas: int | None = None,
    figures: Figures = UNKNOWN,
) -> Plan:
    """Experts where they make the busiest shard less busy, with few moves; see `expert_parallel/rebalance.py`.

    Numbers of replicas that are given hold from now on; None leaves them as they are.
    """
    extra = plan.extra_replicas if extra_replicas is None else extra_replicas
    copies = plan.min_replicas if min_replicas is None else min_replicas
    change = placements.rebalance(
        plan.placement,
        _capacities(plan, figures),
        _useful(loads),
        extra_replicas=extra,
        min_replicas=copies,
    )
    if (extra, copies) != (plan.extra_replicas, plan.min_replicas):
        plan = plan.changed(extra_replicas=extra, min_replicas=copies)
    return with_placement(plan, change.placement)


def replicate(plan: Plan, loads: Loads, layer: int, expert: int, shard: int, figures: Figures = UNKNOWN) -> Plan:
    """One more replica of an expert. DeploymentError: the shard has no room for it."""
    known = _capacities(plan, figures)
    return with_placement(plan, placements.replicate(plan.placement, known, layer, expert, shard).placement)


def move(
    plan: Plan, loads: Loads, layer: int, expert: int, source: int, destination: int, figures: Figures = UNKNOWN
) -> Plan:
    """A replica of an expert from one shard to another. DeploymentError: that one has no room for it."""
    known = _capacities(plan, figures)
    change = placements.move(plan.placement, known, layer, expert, source, destination)
    return with_placement(plan, change.placement)


def _capacities(plan: Plan, figures: Figures) -> list[ShardCapacity]:
    return capacities(plan.placement, plan.shards, figures)


def _scale_workers(plan: Plan, count: int) -> Plan:
    if count > len(plan.workers):
        return add_workers(plan, count - len(plan.workers))
    for worker in _youngest(plan.workers, len(plan.workers) - count):
        plan = drain_worker(plan, worker)
    return plan


def _scale_shards(plan: Plan, count: int, loads: Loads, figures: Figures) -> Plan:
    if count > len(plan.shards):
        plan = add_shards(plan, count - len(plan.shards))
        new = [id for id in plan.shards if not any(id in shards for e in plan.placement.values() for shards in e)]
        change = placements.spread(plan.placement, _capacities(plan, figures), new, _useful(loads))
        return with_placement(plan, change.placement)
    role: Role = "expert_shard"
    for shard in _youngest(plan.shards, len(plan.shards) - count):
        plan = drain(plan, role, shard, loads, figures)
    return plan


def _youngest(ids: Sequence[int], count: int) -> list[int]:
    return sorted(ids, reverse=True)[:count]


def _useful(loads: Loads) -> dict[int, NDArray[np.float64]]:
    """Loads with a little for every expert: one that was idle lately still takes room and may be asked tomorrow."""
    return {layer: tokens + max(float(tokens.mean()) * 0.01, 1e-6) for layer, tokens in loads.items()}


def _check_number(what: str, count: int | None, most: int) -> None:
    if count is not None and not 1 <= count <= most:
        raise DeploymentError(f"{count} {what}; this deployment can have 1 to {most}")
