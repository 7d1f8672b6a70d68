"""The admin API over HTTP: its key, its answers, and what it refuses; the deployment behind it is the real one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from deepseek_ray.actors.offline import ActorsBackend
from deepseek_ray.cli.admin import _listen
from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.errors import DeploymentError
from deepseek_ray.serving.admin import admin_app
from deepseek_ray.serving.auth import ApiKeys

pytestmark = pytest.mark.cluster

KEY = "an-admin-key"


@pytest.fixture(scope="module")
def backend(ray_cluster: None, trained_model: Path) -> Iterator[ActorsBackend]:
    backend = ActorsBackend(DeploymentConfig(model_dir=str(trained_model), dtype="float32"))
    yield backend
    backend.shutdown()


@pytest.fixture(scope="module")
def admin(backend: ActorsBackend) -> Iterator[httpx.Client]:
    listener = _listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(admin_app(ApiKeys.of([KEY])), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=150) as client:
        yield client
    server.should_exit = True
    thread.join()
    listener.close()


def test_every_path_but_health_asks_for_the_key(admin: httpx.Client) -> None:
    for headers in ({"authorization": ""}, {"authorization": "Bearer wrong"}):
        for path in ("/deployments", "/deployments/x", "/deployments/x/experts"):
            assert admin.get(path, headers=headers).status_code == 401, path
        for path in ("/openapi.json", "/docs", "/redoc", "/"):
            assert admin.get(path, headers=headers).status_code == 404, path
        assert admin.post("/deployments/x/drain", headers=headers, json={}).status_code == 401
        assert admin.get("/health", headers=headers).json() == {"status": "ok"}


def test_a_deployment_is_shown_and_changed(admin: httpx.Client, backend: ActorsBackend) -> None:
    name = backend.deployment.name
    assert admin.get("/deployments").json() == {"deployments": [name]}
    rows = admin.get(f"/deployments/{name}").json()["actors"]
    assert [row["role"] for row in rows] == ["router", "attention_worker", "expert_shard", "expert_shard"]
    layers = admin.get(f"/deployments/{name}/experts").json()["layers"]
    assert {shard for experts in layers.values() for expert in experts for shard in expert["shards"]} == {0, 1}
    done = admin.post(f"/deployments/{name}/rebalance", json={"min_replicas": 2, "wait_seconds": 120})
    assert done.status_code == 202, done.text
    layers = admin.get(f"/deployments/{name}/experts").json()["layers"]
    assert all(expert["shards"] == [0, 1] for experts in layers.values() for expert in experts)
    done = admin.post(f"/deployments/{name}/rebalance", json={"min_replicas": 1, "wait_seconds": 120})
    first = admin.get(f"/deployments/{name}/experts").json()["layers"]["1"][0]["shards"][0]
    wish = {"layer": 1, "expert": 0, "source": first, "destination": 1 - first, "wait_seconds": 120}
    assert admin.post(f"/deployments/{name}/move", json=wish).status_code == 202
    assert admin.get(f"/deployments/{name}/experts").json()["layers"]["1"][0]["shards"] == [1 - first]
    wish = {"layer": 1, "expert": 0, "shard": first, "wait_seconds": 120}
    assert admin.post(f"/deployments/{name}/replicate", json=wish).status_code == 202
    assert admin.get(f"/deployments/{name}/experts").json()["layers"]["1"][0]["shards"] == [0, 1]
    done = admin.post(f"/deployments/{name}/drain", json={"role": "expert_shard", "id": 1, "wait_seconds": 120})
    assert [row["id"] for row in done.json()["actors"] if row["role"] == "expert_shard"] == [0]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("scale", {}, 409, "nothing to scale"),
        ("scale", {"expert_shards": 0}, 409, "0 expert shards; this deployment can have 1 to"),
        ("scale", {"expert_shards": "2"}, 400, "expert_shards: Input should be a valid integer"),
        ("scale", {"shards": 2}, 400, "shards: Extra inputs are not permitted"),
        ("drain", {"role": "router", "id": 0}, 400, "role: Input should be 'attention_worker' or 'expert_shard'"),
        ("drain", {"role": "attention_worker", "id": 0}, 409, "attention worker 0 is the only one"),
        ("rebalance", {"min_replicas": 0}, 409, "0 replicas of each expert"),
        ("replicate", {"layer": 99, "expert": 0, "shard": 0}, 409, "layer 99 has no routed experts"),
        ("move", {"layer": 1, "expert": 0, "source": 0}, 400, "destination: Field required"),
        ("rebalance", {"wait_seconds": 1e9}, 400, "wait_seconds: Input should be less than or equal to 600"),
    ],
)
def test_what_cannot_be_done_is_refused(
    admin: httpx.Client, backend: ActorsBackend, path: str, body: dict, status: int, words: str
) -> None:
    answer = admin.post(f"/deployments/{backend.deployment.name}/{path}", json=body)
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (status, True), answer.text


def test_an_unknown_deployment_is_named(admin: httpx.Client, backend: ActorsBackend) -> None:
    for answer in (admin.get("/deployments/none"), admin.post("/deployments/none/scale", json={"expert_shards": 2})):
        assert answer.status_code == 404
        assert f"no deployment 'none'; running here: {backend.deployment.name}" in answer.json()["error"]["message"]


def test_a_port_that_is_taken_is_said_at_once() -> None:
    with _listen("127.0.0.1", 0) as listener, pytest.raises(DeploymentError, match=r"cannot listen on 127\.0\.0\.1"):
        _listen("127.0.0.1", listener.getsockname()[1])
