"""The part of an actor that belongs to a deployment: it reports to the router and does what the answer says.

Reports go out twice a second and at once when something changed. While the router is away the member goes on with what
it knows; when neither the router nor the deployment's record is there any more, it leaves.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

import ray

from deepseek_ray.actors.record import DeploymentRecord, ask_router, newest_life, read_record, take_life
from deepseek_ray.control.plan import Role
from deepseek_ray.control.reports import Directive, MemberReport

logger = logging.getLogger(__name__)

REPORT_SECONDS = 0.5
_CALL_TIMEOUT_SECONDS = 5.0


class Member:
    """Identity and report loop of one attention worker or expert shard.

    `report` fills in what the member is (it is given a MemberReport with the identity set); `obey` is called with each
    directive, in the loop's thread.
    """

    def __init__(
        self,
        record: DeploymentRecord,
        role: Role,
        id: int,
        report: Callable[[MemberReport], MemberReport],
        obey: Callable[[Directive], None],
    ) -> None:
        self._record = record
        self._name = record.description.name
        life = take_life(self._name, role, id)
        self.node_id: str = ray.get_runtime_context().get_node_id()
        self.identity = MemberReport(
            role=role,
            id=id,
            incarnation=life,
            pid=os.getpid(),
            node_id=self.node_id,
            restarts=life - 1,
            state="starting",
        )
        self._actor_id = ray.get_runtime_context().current_actor
        self._report = report
        self._obey = obey
        self._wanted = threading.Event()
        self._generation = 0
        self._last_answer = time.monotonic()

    def start(self) -> None:
        threading.Thread(target=self._loop, name="member", daemon=True).start()

    def report_now(self) -> None:
        """Do not wait for the next turn: something changed here, or news from the router is wanted."""
        self._wanted.set()

    def _loop(self) -> None:
        while True:
            try:
                self._exchange()
            except Exception:
                logger.exception("%s: exchange with the router failed", self._name)
            self._wanted.wait(REPORT_SECONDS)
            self._wanted.clear()

    def _exchange(self) -> None:
        report = self._report(self.identity)
        try:
            directive: Directive = ask_router(self._name, "sync", report, timeout=_CALL_TIMEOUT_SECONDS)
        except (ray.exceptions.RayError, ValueError) as error:
            self._leave_if_orphaned(error)
            return
        self._last_answer = time.monotonic()
        if directive.generation < self._generation:
            return  # an older router that does not know it was replaced
        self._generation = directive.generation
        if directive.replaced:
            logger.warning("%s: another process has taken this one's place; ending", self._name)
            os._exit(0)  # not `leave`: that would end the actor, and with it the other process
        if directive.exit:
            self.leave()
        self._obey(directive)

    def _leave_if_orphaned(self, error: Exception) -> None:
        """A router that does not answer is stopped, or Ray has not yet seen that it died: as long as the cluster can be
        asked and knows the deployment, everybody goes on. One that no longer exists is waited for a while."""
        away = time.monotonic() - self._last_answer
        is_late = away > self._record.config.orphan_timeout_seconds
        try:
            record = read_record(self._name)
        except Exception as unreachable:
            if is_late:
                logger.warning("neither router nor cluster for %.0f s (%s); leaving", away, unreachable)
                self.leave()
            return
        if record is None or record.instance != self._record.instance:
            logger.info("deployment %s is gone; leaving", self._name)
            self.leave()
        if is_late and isinstance(error, ValueError):
            logger.warning("no router for %.0f s (%s); leaving", away, error)
            self.leave()

    def leave(self) -> None:
        """End the actor for good: Ray must not restart it. Does not return.

        If another process is the actor by now - this one's node was cut off, and is back - only this process ends.
        """
        try:
            if newest_life(self._name, self.identity.role, self.identity.id) <= self.identity.incarnation:
                ray.kill(self._actor_id, no_restart=True)
                time.sleep(_CALL_TIMEOUT_SECONDS)  # the kill arrives from outside; give it time before the hard way
        finally:
            os._exit(0)
