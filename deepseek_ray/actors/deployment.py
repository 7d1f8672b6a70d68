"""Starting, owning and stopping a deployment: what `LLM(backend="actors")` and `deepseek-ray serve` do."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from deepseek_ray.actors.launch import create_router, end_deployment
from deepseek_ray.actors.record import (
    DeploymentDescription,
    DeploymentRecord,
    ask_router,
    create_record,
    get_router,
    read_record,
    require_record,
)
from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.errors import DeploymentError
from deepseek_ray.expert_parallel.placement import contiguous_placement

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_START_TIMEOUT_SECONDS = 120.0


class Deployment:
    """A running deployment owned by this process: its lease is renewed until `stop` or the end of the process."""

    def __init__(self, record: DeploymentRecord) -> None:
        self.name = record.description.name
        self.description = record.description
        self._record = record
        self._owner = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._stopped = threading.Event()
        threading.Thread(target=self._renew_lease, name="lease", daemon=True).start()

    def stats(self) -> dict[str, Any]:
        """Figures of every member, by `role/id`."""
        return ask_router(self.name, "stats")

    def status(self) -> dict[str, Any]:
        return deployment_status(self.name)

    def stop(self) -> None:
        """End every actor and wait until their processes are gone. Harmless to call twice."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        pids = _local_pids(self.name)
        end_deployment(self._record)
        _wait_gone(pids)

    def _renew_lease(self) -> None:
        interval = min(5.0, self._record.config.orphan_timeout_seconds / 4)
        while not self._stopped.wait(interval):
            try:
                ask_router(self.name, "renew_lease", self._owner)
            except (ray.exceptions.RayError, ValueError) as error:
                logger.info("lease of %s not renewed this time: %s", self.name, error)


def start_deployment(
    config: DeploymentConfig,
    serve_application: str | None = None,
    owns_serve: bool = False,
    on_wait: Callable[[list[str]], None] | None = None,
) -> Deployment:
    """Start router, attention workers and expert shards; return when they can generate.

    Needs an initialised Ray. `on_wait` is told now and then what is still missing. Raises CheckpointError or
    ConfigError for a bad model directory, DeploymentError for a name in use or members that cannot start; nothing is
    left then.
    """
    record = _make_record(config, serve_application, owns_serve)
    _claim_name(record)
    try:
        create_router(config)
        deployment = Deployment(record)
    except BaseException:
        end_deployment(record)
        raise
    try:
        _wait_ready(config.name, on_wait)
    except BaseException:
        deployment.stop()
        raise
    return deployment


def deployment_status(name: str) -> dict[str, Any]:
    """`{"epoch": int, "actors": [...]}` of a deployment on this cluster; DeploymentError if there is none."""
    require_record(name)
    try:
        return ask_router(name, "status")
    except (ray.exceptions.RayError, ValueError) as error:
        raise DeploymentError(f"the router of {name!r} does not answer ({error}); it is restarting or gone") from None


def _make_record(config: DeploymentConfig, serve_application: str | None, owns_serve: bool) -> DeploymentRecord:
    """Check the model directory from its headers and say what the deployment is."""
    import torch

    from deepseek_ray.engine.engine import plan_engine_cache
    from deepseek_ray.models.checkpoint import CheckpointReader

    directory = Path(config.model_dir).resolve()
    reader = CheckpointReader(directory)
    reader.validate()
    model = reader.config
    contiguous_placement(model.moe_layers, model.n_routed_experts, config.expert_shards)
    plan = plan_engine_cache(config.engine, model, getattr(torch, config.dtype))
    return DeploymentRecord(
        instance=uuid.uuid4().hex,
        secret=secrets.token_bytes(32),
        config_json=config.model_copy(update={"model_dir": str(directory)}).model_dump_json(),
        description=DeploymentDescription(
            name=config.name,
            served_model_name=config.served_model_name or Path(config.model_dir).absolute().name,
            model_dir=str(directory),
            max_model_len=plan.max_model_len,
            vocab_size=model.vocab_size,
            created=int(time.time()),
            request_timeout_seconds=config.request_timeout_seconds,
        ),
        moe_layers=model.moe_layers,
        num_experts=model.n_routed_experts,
        serve_application=serve_application,
        owns_serve=owns_serve,
    )


def _claim_name(record: DeploymentRecord) -> None:
    name = record.description.name
    while not create_record(record):
        other = read_record(name)
        if other is None:
            continue
        try:
            get_router(name)
        except ValueError:  # its router is gone for good: what it left behind goes too
            end_deployment(other)
            continue
        raise DeploymentError(
            f"a deployment named {name!r} already runs on this cluster (it serves {other.description.model_dir}); "
            "stop it, or choose another --name"
        )


def _wait_ready(name: str, on_wait: Callable[[list[str]], None] | None) -> None:
    while True:
        try:
            failure = ask_router(name, "failure", timeout=_START_TIMEOUT_SECONDS)
            missing = ask_router(name, "waiting_for")
        except (ray.exceptions.RayError, ValueError) as error:
            raise DeploymentError(f"the router of {name!r} cannot start: {error}") from None
        if failure:
            raise DeploymentError(f"deployment {name!r} cannot start: {failure}")
        if not missing:
            return
        if on_wait:
            on_wait(missing)
        time.sleep(_POLL_SECONDS)


def _local_pids(name: str) -> list[int]:
    """Process ids of the deployment's actors on this node."""
    node_id = ray.get_runtime_context().get_node_id()
    try:
        rows = deployment_status(name)["actors"]
    except DeploymentError:
        return []
    return [row["pid"] for row in rows if row["node_id"] == node_id and row["pid"]]


def _wait_gone(pids: list[int], seconds: float = 10.0) -> None:
    import psutil

    processes = []
    for pid in pids:
        try:
            processes.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    if alive:
        logger.warning("%d actor processes still end: %s", len(alive), [process.pid for process in alive])
