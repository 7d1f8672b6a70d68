"""Creating and ending the actors of a deployment. No torch: the router calls this too.

Every actor is detached, named and restarted by Ray without limit, so none falls with the process that created it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import ray

from deepseek_ray.actors.record import NAMESPACE, DeploymentRecord, actor_name, delete_record, read_plan
from deepseek_ray.actors.shells import AttentionWorkerActor, ExpertShardActor
from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.control.plan import Role, initial_members

logger = logging.getLogger(__name__)

_NODE_LABEL = "ray.io/node-id"
"""Every node has it, from Ray."""
_HEAD_RESOURCE = "node:__internal_head__"
_SHELLS: dict[Role, type] = {"attention_worker": AttentionWorkerActor, "expert_shard": ExpertShardActor}


def create_router(config: DeploymentConfig) -> Any:
    """The router's handle; an existing router of the deployment is joined.

    It runs beside the cluster's own head if it can: nothing works without that one, so no other node's loss, and no
    network between them, comes into it. (Ray takes a soft node affinity of an actor without resources for a hint: half
    of them land elsewhere. The label of the node is kept to.)
    """
    from deepseek_ray.actors.router import Router

    head = next((node["NodeID"] for node in ray.nodes() if _HEAD_RESOURCE in node["Resources"]), None)
    place = on_node(head, {}) if head else {}
    arguments = (config.name,)
    return _create(Router, config.name, "router", 0, arguments=arguments, max_concurrency=1000, **place)


def create_members(config: DeploymentConfig, members: Iterable[tuple[Role, int]]) -> dict[tuple[Role, int], Any]:
    """Handles of attention workers and expert shards; those that exist are left alone.

    Spread over the nodes that may have them: with a node as few as possible are lost.
    """
    handles = {}
    for role, id in members:
        shell, threads = _SHELLS[role], member_threads(config, role)
        handles[role, id] = _create(
            shell,
            config.name,
            role,
            id,
            arguments=(config.name, id, threads),
            num_cpus=threads if config.reserve_cpus else 0,
            num_gpus=member_gpus(config, role),
            **_place(config, role, id),
        )
    return handles


def _place(config: DeploymentConfig, role: Role, id: int) -> dict[str, Any]:
    """Options that put a member on a node with its role's labels: on one of its own, or if that falls, on any.

    (Ray's strategy "SPREAD" is decided node by node for actors that ask for no resources, so two may meet.)
    """
    labels = member_labels(config, role)
    nodes = sorted(node["NodeID"] for node in _nodes_with(labels))
    if len(nodes) < 2:
        return {"label_selector": labels or None}
    return on_node(nodes[id % len(nodes)], labels)


def on_node(node_id: str, labels: dict[str, str]) -> dict[str, Any]:
    """Options that put an actor on a node with these labels, or if that falls, on any other one with them."""
    own = {**labels, _NODE_LABEL: node_id}
    return {"label_selector": own, "fallback_strategy": [{"label_selector": labels}]}


def _nodes_with(labels: Mapping[str, str]) -> list[dict[str, Any]]:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [node for node in nodes if all(node["Labels"].get(name) == value for name, value in labels.items())]


def member_labels(config: DeploymentConfig, role: Role) -> dict[str, str]:
    """Labels that the node of a member must have."""
    return config.attention_labels if role == "attention_worker" else config.expert_labels


def missing_labels(config: DeploymentConfig) -> list[str]:
    """For each role that no node of the cluster can take: what is missing, in words."""
    missing = []
    for role in _SHELLS:
        labels = member_labels(config, role)
        if not _nodes_with(labels):
            wanted = ",".join(f"{name}={value}" for name, value in labels.items())
            missing.append(f"a node with the labels {wanted} for each {role.replace('_', ' ')}")
        elif member_gpus(config, role) and not any("GPU" in node["Resources"] for node in _nodes_with(labels)):
            missing.append(f"a node with a GPU for each {role.replace('_', ' ')}")
    return missing


def member_gpus(config: DeploymentConfig, role: Role) -> float:
    """GPUs of each member of a role; Ray shows a process no others."""
    device = config.attention_device if role == "attention_worker" else config.expert_device
    return config.gpus_per_member if device == "cuda" else 0


def member_threads(config: DeploymentConfig, role: Role) -> int:
    """Threads of each member of a role. Attention and experts take turns, so each side may use all cores."""
    total = config.threads or os.cpu_count() or 1
    return max(1, total // (config.attention_workers if role == "attention_worker" else config.expert_shards))


def end_deployment(
    record: DeploymentRecord, delete: bool = True, members: Iterable[tuple[Role, int]] | None = None
) -> None:
    """Remove the record, the Serve application that belongs to it, and every actor, the router last.

    `members`: everybody but the router; None reads them from the deployment's plan, or if its router has not come to
    make one, takes those of the first.
    """
    name = record.description.name
    if members is None:
        plan = read_plan(record)
        members = plan.members if plan else initial_members(record.config)
    if delete:
        delete_record(name)
    if record.serve_application:
        _end_serve(record)
    for role, id in members:
        _kill(actor_name(name, role, id))
    _kill(actor_name(name, "router"))


def _end_serve(record: DeploymentRecord) -> None:
    from ray import serve

    try:
        if record.owns_serve:
            serve.shutdown()
        elif record.serve_application:
            serve.delete(record.serve_application)
    except Exception as error:  # a Serve that is gone already, or half way: the actors must go all the same
        logger.warning("Serve application %s: %s", record.serve_application, error)


def _kill(name: str) -> None:
    try:
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
    except ValueError:
        logger.debug("%s is gone already", name)


def _create(cls: type, deployment: str, role: str, id: int, arguments: tuple[Any, ...], **options: Any) -> Any:
    """A detached actor, or the one of this name that exists. Unless told otherwise it asks for no CPUs: on a small node
    serving and training share the cores, and their thread counts bound what each takes.

    It has no environment of its own, for which Ray would start a process anew, and first the agent that makes it:
    actors take processes that Ray has ready, and set their variables themselves (`shells.py`)."""
    actor: Any = ray.remote(cls).options(
        name=actor_name(deployment, role, id),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        **{"num_cpus": 0, **options},
    )
    return actor.remote(*arguments)
