"""One owner's claim on a deployment: renewed until it is given back, or until the process ends."""

from __future__ import annotations

import logging
import os
import threading
import uuid

import ray

from deepseek_ray.actors.record import DeploymentRecord, ask_router

logger = logging.getLogger(__name__)

_LONGEST_INTERVAL_SECONDS = 5.0
_JOIN_SECONDS = 10.0


class Lease:
    """A deployment ends when its last lease is released, or was not renewed for `orphan_timeout_seconds`."""

    def __init__(self, record: DeploymentRecord) -> None:
        self._name = record.description.name
        self._owner = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._interval = min(_LONGEST_INTERVAL_SECONDS, record.config.orphan_timeout_seconds / 4)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def renew(self) -> bool:
        """Now; False when the deployment is ending. ValueError without a router, RayError when it does not answer."""
        return ask_router(self._name, "renew_lease", self._owner)

    def stop(self) -> None:
        """Renew no more, without telling the router: the deployment is being ended anyway."""
        self._stopped.set()

    def release(self) -> None:
        """Give the lease back; the last one to do so ends the deployment."""
        self.stop()
        self._thread.join(_JOIN_SECONDS)  # a renewal under way must not come after the release
        try:
            ask_router(self._name, "release_lease", self._owner)
        except (ray.exceptions.RayError, ValueError) as error:
            logger.info("lease of %s not released, it runs out: %s", self._name, error)

    def _keep(self) -> None:
        while not self._stopped.is_set():
            try:
                self.renew()
            except (ray.exceptions.RayError, ValueError) as error:
                logger.info("lease of %s not renewed this time: %s", self._name, error)
            self._stopped.wait(self._interval)
