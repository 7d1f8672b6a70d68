"""The router actor: membership, placement, admission and the life of a deployment. No torch here.

It keeps nothing that its members or the key-value store cannot tell it again: a restarted router takes the next
generation, and one report interval later it knows the deployment as well as the last one did.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import ray

from deepseek_ray.actors.launch import create_members, end_deployment, missing_labels
from deepseek_ray.actors.metrics_export import MetricsExporter
from deepseek_ray.actors.record import (
    DeploymentDescription,
    newest_generation,
    read_plan,
    read_record,
    require_record,
    take_generation,
    take_life,
    write_plan,
)
from deepseek_ray.actors.router_metrics import export_router
from deepseek_ray.control import commands
from deepseek_ray.control.admission import Admission
from deepseek_ray.control.autoscale import AutoscalePolicy, Observer
from deepseek_ray.control.lease import Leases
from deepseek_ray.control.membership import Membership
from deepseek_ray.control.plan import Plan, Role, initial_plan
from deepseek_ray.control.reports import Directive, MemberReport, WorkerView
from deepseek_ray.errors import DeploymentError
from deepseek_ray.expert_parallel.load import ExpertLoad

logger = logging.getLogger(__name__)

_HOUSEKEEPING_SECONDS = 1.0
_LOAD_WINDOW_SECONDS = 60.0


class Router:
    """Coordinates one deployment. An async actor: its methods interleave, none blocks."""

    def __init__(self, deployment: str) -> None:
        self._name = deployment
        self._record = require_record(deployment)
        config = self._record.config
        self._restarts = take_life(deployment, "router", 0) - 1
        self._node_id: str = ray.get_runtime_context().get_node_id()
        plan = read_plan(self._record) or initial_plan(self._record.moe_layers, self._record.num_experts, config)
        self._membership = Membership(
            generation=take_generation(deployment),
            plan=plan,
            started=time.monotonic(),
            drain_seconds=config.drain_seconds,
            kv_copies=config.kv_copies,
            stand_in_after_seconds=config.stand_in_after_seconds,
        )
        self._load = ExpertLoad(self._record.moe_layers, self._record.num_experts, _LOAD_WINDOW_SECONDS)
        self._admission = Admission(config.engine.max_num_seqs + config.engine.max_waiting, config.kv_copies)
        self._leases = Leases(config.orphan_timeout_seconds, started=time.monotonic())
        self._exporter = MetricsExporter(model_name=self._record.description.served_model_name)
        self._rebalanced = time.monotonic()
        self._observer = Observer()
        self._autoscale = AutoscalePolicy(config.autoscale) if config.autoscale else None
        self._handles: dict[tuple[Role, int], Any] = {}
        self._enacted = (0, 0)
        """Revision of the plan and epoch of the table that members were told of."""
        self._enact()
        self._housekeeping: asyncio.Task[None] | None = None

    async def sync(self, report: MemberReport) -> Directive:
        """A member's report; the answer says what it should be."""
        self._start_housekeeping()
        now = time.monotonic()
        directive = self._membership.observe(report, now)
        if report.expert_tokens:
            self._load.observe(report.id, report.incarnation, report.expert_tokens, now)
        self._enact()
        return directive

    async def admit(self, request_id: str, tokens: int, seconds: float, avoid: list[tuple[int, int]]) -> WorkerView:
        """The worker that takes a request of about `tokens` tokens and at most `seconds`.

        `avoid` lists (id, incarnation) of workers that just failed this request. Raises OverloadedError or
        UnavailableError.
        """
        now = time.monotonic()
        return self._admission.admit(request_id, tokens, seconds, self._membership.workers(now), now, avoid)

    async def release(self, request_id: str) -> None:
        self._admission.release(request_id)

    async def workers(self) -> list[WorkerView]:
        return self._membership.workers(time.monotonic())

    async def hangs(self, id: int, incarnation: int) -> bool:
        """Whether an attention worker is silent here too, and another one could go on with its requests."""
        return self._membership.hangs(id, incarnation, time.monotonic())

    async def renew_lease(self, owner: str) -> bool:
        """False when the deployment is ending already."""
        self._start_housekeeping()
        self._leases.renew(owner, time.monotonic())
        return not self._membership.closing

    async def release_lease(self, owner: str) -> None:
        self._leases.release(owner)

    async def ready(self) -> bool:
        return self._membership.ready(time.monotonic())

    async def waiting_for(self) -> list[str]:
        missing = self._membership.waiting_for(time.monotonic())
        return [*missing_labels(self._record.config), *missing] if missing else []

    async def failure(self) -> str | None:
        return self._membership.failure()

    async def describe(self) -> DeploymentDescription:
        return self._record.description

    async def status(self) -> dict[str, Any]:
        """What `deepseek-ray status --json` prints."""
        me = {
            "role": "router",
            "id": 0,
            "pid": os.getpid(),
            "node_id": self._node_id,
            "state": "draining" if self._membership.closing else "ready",
            "restarts": self._restarts,
        }
        return {"epoch": self._membership.epoch, "actors": [me, *self._membership.status(time.monotonic())]}

    async def scale(self, workers: int | None, shards: int | None) -> dict[str, Any]:
        """See `control/commands.py`. Commands return the new status, before the change is complete."""
        return await self._command(commands.scale, workers=workers, shards=shards)

    async def drain(self, role: str, id: int) -> dict[str, Any]:
        return await self._command(commands.drain, role=role, id=id)

    async def rebalance(self, extra_replicas: int | None, min_replicas: int | None) -> dict[str, Any]:
        return await self._command(commands.rebalance, extra_replicas=extra_replicas, min_replicas=min_replicas)

    async def replicate(self, layer: int, expert: int, shard: int) -> dict[str, Any]:
        return await self._command(commands.replicate, layer=layer, expert=expert, shard=shard)

    async def move(self, layer: int, expert: int, source: int, destination: int) -> dict[str, Any]:
        return await self._command(commands.move, layer=layer, expert=expert, source=source, destination=destination)

    async def settled(self) -> bool:
        """Whether every change that was asked for has happened."""
        return self._membership.settled(time.monotonic())

    async def experts(self) -> dict[str, Any]:
        """layer -> for each expert its tokens in the last minute and the shards that answer for it."""
        loads, table = self._load.loads(time.monotonic()), self._membership.table
        return {
            "epoch": table.epoch,
            "window_seconds": _LOAD_WINDOW_SECONDS,
            "layers": {
                layer: [
                    {"expert": expert, "tokens": int(loads[layer][expert]), "shards": list(shards)}
                    for expert, shards in enumerate(experts)
                ]
                for layer, experts in table.replicas.items()
            },
        }

    async def stats(self) -> dict[str, Any]:
        """Figures of every member, by `role/id`, and the router's own."""
        return {**self._membership.stats(), "router/0": {"in_flight": self._admission.in_flight}}

    async def _command(self, change: Callable[..., Plan], **wish: Any) -> dict[str, Any]:
        """Change the plan; what cannot be done raises DeploymentError and changes nothing.

        In a thread: placing the experts of a large model takes seconds. If the plan has changed meanwhile - a shard was
        lost, say - the decision is made again.
        """
        loads, figures = self._load.loads(time.monotonic()), self._membership.shard_figures()
        while True:
            plan = self._membership.plan
            changed = await asyncio.to_thread(change, plan, loads=loads, figures=figures, **wish)
            if self._membership.plan is plan:
                break
        self._membership.replan(changed, time.monotonic())
        self._enact()
        return await self.status()

    async def _rebalance_now_and_then(self, now: float) -> None:
        interval = self._record.config.rebalance_interval_seconds
        if interval is not None and now - self._rebalanced > interval and self._membership.settled(now):
            self._rebalanced = now
            await self.rebalance(None, None)

    async def _follow_the_load(self, now: float) -> None:
        plan = self._membership.plan
        seen = self._observer.observe(self._membership.stats(), len(plan.workers), len(plan.shards), now)
        if self._autoscale is None or seen is None or not self._membership.settled(now):
            return
        if (decision := self._autoscale.decide(seen, now)) is not None:
            logger.info("autoscaling: %s after %s", decision, seen)
            await self.scale(decision.workers, decision.shards)

    def _enact(self) -> None:
        """Make a changed plan real, and let members ask at once for what has changed."""
        plan, now = self._membership.plan, (self._membership.plan.revision, self._membership.epoch)
        if now == self._enacted:
            return
        if plan.revision != self._enacted[0] and not self._keep(plan):
            return
        self._enacted = now
        for handle in self._handles.values():
            handle.poke.remote()

    def _keep(self, plan: Plan) -> bool:
        """Store a plan and create its new members. False when this router was replaced and must not command."""
        if not write_plan(self._record, self._membership.generation, plan):
            logger.warning("router of generation %d was replaced; it commands no more", self._membership.generation)
            return False
        self._handles = {member: handle for member, handle in self._handles.items() if member in plan.members}
        missing = [member for member in plan.members if member not in self._handles]
        self._handles |= create_members(self._record.config, missing)
        return True

    def _start_housekeeping(self) -> None:
        """With the first call: the event loop does not run yet in `__init__`."""
        if self._housekeeping is None:
            self._housekeeping = asyncio.get_running_loop().create_task(self._keep_house())

    async def _keep_house(self) -> None:
        """Once a second: losses, members that leave, figures; the end when there is no record or no owner any more."""
        while True:
            await asyncio.sleep(_HOUSEKEEPING_SECONDS)
            now = time.monotonic()
            self._membership.tick(now, self._admission.in_flight_of)
            self._enact()
            try:
                await self._rebalance_now_and_then(now)
                await self._follow_the_load(now)
            except DeploymentError as error:  # what the limits ask for is impossible; the house is kept all the same
                logger.warning("%s", error)
            export_router(self._exporter, self._membership, self._admission, now)
            record = read_record(self._name)
            replaced = record is None or record.instance != self._record.instance
            orphaned = self._leases.orphaned(now)
            if not replaced and not orphaned:
                continue
            if newest_generation(self._name) > self._membership.generation:
                logger.warning("%s has a newer router; this one ends alone", self._name)
                os._exit(0)
            logger.warning("deployment %s ends: %s", self._name, "no owner" if orphaned else "its record is gone")
            self._membership.closing = True
            members = self._membership.plan.members
            await asyncio.to_thread(end_deployment, self._record, delete=not replaced, members=members)
