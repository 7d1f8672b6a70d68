"""What a deployment leaves in the cluster's key-value store: it outlives the router, and whoever deletes it ends the
deployment.

Keys, in namespace `deepseek_ray`: `deployment/<name>` the record, `generation/<name>/<n>` one per router start,
`life/<name>/<role>/<id>` how often a member was started, `plan/<name>` what the router wants the deployment to be.
"""

from __future__ import annotations

from typing import Any

import msgspec
import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put

from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.control.plan import Plan
from deepseek_ray.errors import DeploymentError

NAMESPACE = "deepseek_ray"


class DeploymentDescription(msgspec.Struct, kw_only=True, frozen=True):
    """What clients need to know of a deployment."""

    name: str
    served_model_name: str
    model_dir: str
    max_model_len: int
    vocab_size: int
    created: int
    """Unix seconds."""
    request_timeout_seconds: float


class DeploymentRecord(msgspec.Struct, kw_only=True, frozen=True):
    """Everything a router, a member or a client of a deployment starts from."""

    instance: str
    """Random; a later deployment of the same name has another one."""
    secret: bytes
    """256 bits that links of this deployment prove to each other."""
    config_json: str
    description: DeploymentDescription
    moe_layers: tuple[int, ...]
    num_experts: int
    serve_application: str | None = None
    """Ray Serve application that goes when the deployment goes."""
    owns_serve: bool = False
    """Ray Serve itself was started for this deployment."""

    @property
    def config(self) -> DeploymentConfig:
        return DeploymentConfig.model_validate_json(self.config_json)


class _StoredPlan(msgspec.Struct, frozen=True):
    instance: str
    """Of the deployment: what an earlier one of the same name left behind does not count."""
    generation: int
    """Of the router that wrote it."""
    plan: Plan


def actor_name(deployment: str, role: str, id: int = 0) -> str:
    return f"{deployment}/{role}/{id}"


def create_record(record: DeploymentRecord) -> bool:
    """False if a deployment of this name exists."""
    value = msgspec.msgpack.encode(record)
    return not _internal_kv_put(f"deployment/{record.description.name}", value, overwrite=False, namespace=NAMESPACE)


def read_record(name: str) -> DeploymentRecord | None:
    value = _internal_kv_get(f"deployment/{name}", namespace=NAMESPACE)
    return None if value is None else msgspec.msgpack.decode(value, type=DeploymentRecord)


def require_record(name: str) -> DeploymentRecord:
    """The record; DeploymentError naming the deployments there are."""
    record = read_record(name)
    if record is None:
        known = list_deployments()
        there = f"running here: {', '.join(known)}" if known else "none runs on this cluster"
        raise DeploymentError(f"no deployment {name!r}; {there}")
    return record


def list_deployments() -> list[str]:
    keys = _internal_kv_list("deployment/", namespace=NAMESPACE)
    return sorted(key.decode().removeprefix("deployment/") for key in keys)


def delete_record(name: str) -> None:
    """Remove the record and its counters. Members that find no record leave."""
    for key in (f"deployment/{name}", f"plan/{name}"):
        _internal_kv_del(key, namespace=NAMESPACE)
    for prefix in (f"generation/{name}/", f"life/{name}/"):
        _internal_kv_del(prefix, del_by_prefix=True, namespace=NAMESPACE)


def read_plan(record: DeploymentRecord) -> Plan | None:
    """What the deployment shall be; None before its first router has written it."""
    stored = _read_stored_plan(record)
    return None if stored is None else stored.plan


def write_plan(record: DeploymentRecord, generation: int, plan: Plan) -> bool:
    """Keep a router's plan. False when a router of a later generation has written one: this router was replaced."""
    stored = _read_stored_plan(record)
    if stored is not None and stored.generation > generation:
        return False
    value = msgspec.msgpack.encode(_StoredPlan(record.instance, generation, plan))
    _internal_kv_put(f"plan/{record.description.name}", value, overwrite=True, namespace=NAMESPACE)
    return True


def _read_stored_plan(record: DeploymentRecord) -> _StoredPlan | None:
    value = _internal_kv_get(f"plan/{record.description.name}", namespace=NAMESPACE)
    stored = None if value is None else msgspec.msgpack.decode(value, type=_StoredPlan)
    return stored if stored is not None and stored.instance == record.instance else None


def take_generation(name: str) -> int:
    """The next generation, taken by put-if-absent: no two routers of a deployment ever share one."""
    generation = 1 + newest_generation(name)
    while _internal_kv_put(f"generation/{name}/{generation}", b"1", overwrite=False, namespace=NAMESPACE):
        generation += 1
    return generation


def newest_generation(name: str) -> int:
    """The last generation that was taken; 0 without any."""
    return len(_internal_kv_list(f"generation/{name}/", namespace=NAMESPACE))


def take_life(name: str, role: str, id: int) -> int:
    """1 for a member's first process, one more for each that replaces it."""
    life = 1 + newest_life(name, role, id)
    while _internal_kv_put(f"life/{name}/{role}/{id}/{life}", b"1", overwrite=False, namespace=NAMESPACE):
        life += 1
    return life


def newest_life(name: str, role: str, id: int) -> int:
    """The last life that was taken; 0 without any."""
    return len(_internal_kv_list(f"life/{name}/{role}/{id}/", namespace=NAMESPACE))


def get_router(name: str) -> Any:
    """The router's handle, resolved by name. Raises ValueError when there is none."""
    return ray.get_actor(actor_name(name, "router"), namespace=NAMESPACE)


def ask_router(name: str, method: str, *arguments: Any, timeout: float = 10.0) -> Any:
    """One call, waited for. Raises ValueError without a router, RayError when it does not answer in time."""
    reference: Any = getattr(get_router(name), method).remote(*arguments)
    return ray.get(reference, timeout=timeout)
