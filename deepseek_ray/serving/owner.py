"""The Ray Serve deployment that starts the engines of an application, and keeps them while the application stands."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from deepseek_ray.actors.deployment import Deployment, join_or_start_deployment
from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.errors import UnavailableError


class EngineOwner:
    """Holds a lease on each engine. Engines that run already are joined: neither a new owner nor an application that
    is deployed again restarts them."""

    def __init__(self, engines: Sequence[DeploymentConfig]) -> None:
        """Returns when all can generate. `engines` are named by `control.rollout.engine_config`."""
        self._deployments: list[Deployment] = []
        with ThreadPoolExecutor(len(engines)) as pool:
            starting = [pool.submit(join_or_start_deployment, engine) for engine in engines]
        self._deployments = [start.result() for start in starting if start.exception() is None]
        for start in starting:
            start.result()  # raises why an engine cannot run; Serve reports it and asks for the destructor

    def check_health(self) -> None:
        """Called by Serve, which replaces an owner whose engine was ended by somebody else."""
        for deployment in self._deployments:
            if not deployment.is_there:
                raise UnavailableError(f"the engine {deployment.name} was ended by somebody else")

    def __del__(self) -> None:
        for deployment in getattr(self, "_deployments", ()):
            deployment.leave()
