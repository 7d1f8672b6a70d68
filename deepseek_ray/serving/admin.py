"""The admin API: what a deployment is made of, and changing it. An application of its own, on a port of its own.

    GET  /deployments                         names
    GET  /deployments/{name}                  members, as `deepseek-ray status --json`
    GET  /deployments/{name}/experts          load and shards of every expert
    POST /deployments/{name}/scale            {"attention_workers": 2, "expert_shards": 3}
    POST /deployments/{name}/drain            {"role": "expert_shard", "id": 1}
    POST /deployments/{name}/rebalance        {"extra_replicas": 8, "min_replicas": 2}

Changes answer 202 with the members at once and go on; `"wait_seconds": 60` in the body waits until they are complete.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from deepseek_ray.actors.deployment import change_deployment, deployment_experts, deployment_status
from deepseek_ray.actors.record import list_deployments
from deepseek_ray.errors import DeepSeekRayError, DeploymentError
from deepseek_ray.serving.auth import ApiKeys
from deepseek_ray.serving.errors import describe_error

MAX_WAIT_SECONDS = 600.0


class _Change(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    wait_seconds: Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS, strict=False)] = 0.0


class Scale(_Change):
    attention_workers: int | None = None
    expert_shards: int | None = None


class Drain(_Change):
    role: Literal["attention_worker", "expert_shard"]
    id: Annotated[int, Field(ge=0)]


class Rebalance(_Change):
    extra_replicas: int | None = None
    min_replicas: int | None = None


class Replicate(_Change):
    layer: int
    expert: int
    shard: int


class Move(_Change):
    layer: int
    expert: int
    source: int
    destination: int


def admin_app(keys: ApiKeys) -> FastAPI:
    """The application. `keys` are this API's own; every path but /health asks for one."""

    def check_key(request: Request) -> None:
        keys.check(request.url.path, request.headers.get("authorization", ""))

    app = FastAPI(dependencies=[Depends(check_key)], openapi_url=None)  # its pages would be open to everybody
    app.add_exception_handler(DeepSeekRayError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_body)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/deployments")
    def deployments() -> dict[str, list[str]]:
        return {"deployments": list_deployments()}

    @app.get("/deployments/{name}")
    def status(name: str) -> dict[str, Any]:
        return deployment_status(_known(name))

    @app.get("/deployments/{name}/experts")
    def experts(name: str) -> dict[str, Any]:
        return deployment_experts(_known(name))

    @app.post("/deployments/{name}/scale", status_code=202)
    def scale(name: str, wish: Scale) -> dict[str, Any]:
        if wish.attention_workers is None and wish.expert_shards is None:
            raise DeploymentError("nothing to scale; give attention_workers, expert_shards or both")
        return _change(name, "scale", wish, wish.attention_workers, wish.expert_shards)

    @app.post("/deployments/{name}/drain", status_code=202)
    def drain(name: str, wish: Drain) -> dict[str, Any]:
        return _change(name, "drain", wish, wish.role, wish.id)

    @app.post("/deployments/{name}/rebalance", status_code=202)
    def rebalance(name: str, wish: Rebalance) -> dict[str, Any]:
        return _change(name, "rebalance", wish, wish.extra_replicas, wish.min_replicas)

    @app.post("/deployments/{name}/replicate", status_code=202)
    def replicate(name: str, wish: Replicate) -> dict[str, Any]:
        return _change(name, "replicate", wish, wish.layer, wish.expert, wish.shard)

    @app.post("/deployments/{name}/move", status_code=202)
    def move(name: str, wish: Move) -> dict[str, Any]:
        return _change(name, "move", wish, wish.layer, wish.expert, wish.source, wish.destination)

    return app


class _UnknownDeploymentError(DeploymentError):
    """There is none of this name."""


def _known(name: str) -> str:
    if name not in (known := list_deployments()):
        raise _UnknownDeploymentError(f"no deployment {name!r}; running here: {', '.join(known) or 'none'}")
    return name


def _change(name: str, command: str, wish: _Change, *arguments: Any) -> dict[str, Any]:
    return change_deployment(_known(name), command, *arguments, wait_seconds=wish.wait_seconds)


def _refuse(request: Request, error: Exception) -> JSONResponse:
    """404 for an unknown deployment, 409 for what this one cannot do, else as the OpenAI API would say it."""
    if isinstance(error, DeploymentError):
        unknown = isinstance(error, _UnknownDeploymentError)
        return _error(404 if unknown else 409, error.message, "not_found" if unknown else "conflict")
    reply = describe_error(error, request_id="-")
    return JSONResponse({"error": {"message": reply.body.error.message, "code": reply.body.error.code}}, reply.status)


def _refuse_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    return _error(400, f"{where}: {first['msg']}", "invalid_body")


def _error(status: int, message: str, code: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": code}}, status)
