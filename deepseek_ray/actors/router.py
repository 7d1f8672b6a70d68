"""The router actor: membership, placement, admission and the life of a deployment. No torch here.

It keeps nothing that its members cannot tell it again: a restarted router takes the next generation, and one report
interval later it knows the deployment as well as the last one did.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

import ray

from deepseek_ray.actors.launch import create_members, end_deployment
from deepseek_ray.actors.metrics_export import MetricsExporter
from deepseek_ray.actors.record import DeploymentDescription, read_record, require_record, take_generation, take_life
from deepseek_ray.actors.router_metrics import export_router
from deepseek_ray.control.admission import Admission
from deepseek_ray.control.lease import Leases
from deepseek_ray.control.membership import Directive, MemberReport, Membership, WorkerView

logger = logging.getLogger(__name__)

_HOUSEKEEPING_SECONDS = 1.0


class Router:
    """Coordinates one deployment. An async actor: its methods interleave, none blocks."""

    def __init__(self, deployment: str) -> None:
        self._name = deployment
        self._record = require_record(deployment)
        config = self._record.config
        self._restarts = take_life(deployment, "router", 0) - 1
        self._node_id: str = ray.get_runtime_context().get_node_id()
        self._membership = Membership(
            generation=take_generation(deployment),
            moe_layers=self._record.moe_layers,
            num_experts=self._record.num_experts,
            num_shards=config.expert_shards,
            num_workers=config.attention_workers,
        )
        self._admission = Admission(max_in_flight=config.engine.max_num_seqs + config.engine.max_waiting)
        self._leases = Leases(config.orphan_timeout_seconds, started=time.monotonic())
        self._exporter = MetricsExporter(model_name=self._record.description.served_model_name)
        create_members(config)
        self._housekeeping: asyncio.Task[None] | None = None

    async def sync(self, report: MemberReport) -> Directive:
        """A member's report; the answer says what it should be."""
        self._start_housekeeping()
        return self._membership.observe(report, time.monotonic())

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
        return self._membership.waiting_for(time.monotonic())

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

    async def stats(self) -> dict[str, Any]:
        """Figures of every member, by `role/id`, and the router's own."""
        return {**self._membership.stats(), "router/0": {"in_flight": self._admission.in_flight}}

    def _start_housekeeping(self) -> None:
        """With the first call: the event loop does not run yet in `__init__`."""
        if self._housekeeping is None:
            self._housekeeping = asyncio.get_running_loop().create_task(self._keep_house())

    async def _keep_house(self) -> None:
        """End the deployment when its record is gone or nobody owns it any more."""
        while True:
            await asyncio.sleep(_HOUSEKEEPING_SECONDS)
            export_router(self._exporter, self._membership, self._admission, time.monotonic())
            record = read_record(self._name)
            replaced = record is None or record.instance != self._record.instance
            orphaned = self._leases.orphaned(time.monotonic())
            if not replaced and not orphaned:
                continue
            logger.warning("deployment %s ends: %s", self._name, "no owner" if orphaned else "its record is gone")
            self._membership.closing = True
            await asyncio.to_thread(end_deployment, self._record, delete=not replaced)
