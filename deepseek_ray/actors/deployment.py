"""Starting, owning and stopping a deployment: what `LLM(backend="actors")` and `deepseek-ray serve` do."""

from __future__ import annotations

import logging
import secrets
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from deepseek_ray.actors.launch import create_members, create_router, end_deployment
from deepseek_ray.actors.lease import Lease
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
from deepseek_ray.control.plan import initial_members, initial_plan
from deepseek_ray.control.rollout import engine_change
from deepseek_ray.errors import DeepSeekRayError, DeploymentError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_START_TIMEOUT_SECONDS = 120.0
_COMMAND_TIMEOUT_SECONDS = 120.0
"""Deciding where the thousands of experts of a large model go takes the router many seconds."""


class Deployment:
    """A running deployment owned by this process: its lease is renewed until `stop`, `leave` or the process's end."""

    def __init__(self, record: DeploymentRecord) -> None:
        self.name = record.description.name
        self.description = record.description
        self._record = record
        self._lease: Lease | None = Lease(record)

    def stats(self) -> dict[str, Any]:
        """Figures of every member, by `role/id`."""
        return ask_router(self.name, "stats")

    def status(self) -> dict[str, Any]:
        return deployment_status(self.name)

    def is_settled(self) -> bool:
        """Whether every member is there and every change that was asked for has happened; DeploymentError as status."""
        return _ask(self.name, "settled")

    @property
    def is_there(self) -> bool:
        """False once somebody ended it."""
        record = read_record(self.name)
        return record is not None and record.instance == self._record.instance

    def renew_lease(self) -> bool:
        """False when it is ending. ValueError without a router, RayError when it does not answer."""
        return self._lease is not None and self._lease.renew()

    def leave(self) -> None:
        """Own it no longer: it ends unless somebody else does. Harmless to call twice."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def stop(self) -> None:
        """End every actor and wait until their processes are gone. Harmless to call twice."""
        if self._lease is None:
            return
        self._lease.stop()
        self._lease = None
        pids = _local_pids(self.name)
        end_deployment(self._record)
        _wait_gone(pids)


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
        create_members(record.config, initial_members(config))  # which the router would, once it has started
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


def join_or_start_deployment(config: DeploymentConfig) -> Deployment:
    """Own the running deployment of `config.name` as well, or start it; return when it can generate.

    Errors of `start_deployment`, and DeploymentError when the one that runs has another configuration.
    """
    while (record := read_record(config.name)) is not None:
        if engine_change(record.config, config) == "replace":
            raise DeploymentError(
                f"a deployment named {config.name!r} runs with another configuration; stop it, or choose another name"
            )
        deployment = Deployment(record)
        try:
            if deployment.renew_lease():
                _wait_ready(config.name, None)
                return deployment
        except ValueError:  # no router any more: starting anew clears what it left
            deployment.leave()
            break
        except ray.exceptions.RayError as error:
            logger.info("the router of %s does not answer yet: %s", config.name, error)
        except BaseException:
            deployment.leave()
            raise
        deployment.leave()
        time.sleep(_POLL_SECONDS)  # it is ending, and its name will be free
    return start_deployment(config)


def deployment_status(name: str) -> dict[str, Any]:
    """`{"epoch": int, "actors": [...]}` of a deployment on this cluster; DeploymentError if there is none."""
    return _ask(name, "status")


def deployment_experts(name: str) -> dict[str, Any]:
    """Load and shards of every expert, see `Router.experts`; DeploymentError if there is no such deployment."""
    return _ask(name, "experts")


def change_deployment(name: str, command: str, *wish: Any, wait_seconds: float) -> dict[str, Any]:
    """Give a deployment's router one of its commands (see `control/commands.py`); returns the status afterwards.

    Waits until the change is complete. DeploymentError: no such deployment, a wish that cannot be met, or a change that
    is not complete after `wait_seconds` (0: do not wait); it goes on then.
    """
    status = _ask(name, command, *wish, timeout=_COMMAND_TIMEOUT_SECONDS)
    deadline = time.monotonic() + wait_seconds
    while wait_seconds and not _ask(name, "settled"):
        if time.monotonic() > deadline:
            raise DeploymentError(
                f"{command} of {name!r} is under way but not complete after {wait_seconds:g} s; `deepseek-ray status` "
                "shows how far it is"
            )
        time.sleep(_POLL_SECONDS)
    return _ask(name, "status") if wait_seconds else status


def _ask(name: str, question: str, *arguments: Any, timeout: float = 10.0) -> Any:
    require_record(name)
    try:
        return ask_router(name, question, *arguments, timeout=timeout)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, DeepSeekRayError) else error) from None
    except (ray.exceptions.RayError, ValueError) as error:
        raise DeploymentError(f"the router of {name!r} does not answer ({error}); it is restarting or gone") from None


def _make_record(config: DeploymentConfig, serve_application: str | None, owns_serve: bool) -> DeploymentRecord:
    """Check the model directory from its headers and say what the deployment is."""
    import torch

    from deepseek_ray.engine.engine import plan_engine_cache
    from deepseek_ray.engine.speculation import served_moe_layers
    from deepseek_ray.models.checkpoint import CheckpointReader

    directory = Path(config.model_dir).resolve()
    reader = CheckpointReader(directory)
    reader.validate()
    model = reader.config
    moe_layers = served_moe_layers(config.engine, reader)
    initial_plan(moe_layers, model.n_routed_experts, config)  # refuses what cannot be divided
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
        moe_layers=moe_layers,
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
