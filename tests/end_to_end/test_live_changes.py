"""A deployment changes while it generates: no request fails, no token changes, and what was asked for comes true."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek_ray.actors.deployment import change_deployment, deployment_experts
from deepseek_ray.actors.offline import ActorsBackend
from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.errors import DeploymentError
from tests.live_requests import Watched, assert_unharmed, expected_tokens, kill, pid_of, wait_for

pytestmark = pytest.mark.cluster

WAIT_SECONDS = 120.0


@pytest.fixture(scope="module")
def backend(ray_cluster: None, trained_model: Path) -> Iterator[ActorsBackend]:
    config = DeploymentConfig(model_dir=str(trained_model), dtype="float32", standby_shards=1)
    backend = ActorsBackend(config)
    yield backend
    backend.shutdown()


@pytest.fixture(scope="module")
def expected(trained_model: Path) -> dict[int, list[int]]:
    return expected_tokens(trained_model, "float32")


def change(backend: ActorsBackend, command: str, *wish: Any) -> None:
    change_deployment(backend.deployment.name, command, *wish, wait_seconds=WAIT_SECONDS)


def ids(backend: ActorsBackend, role: str, state: str = "ready") -> list[int]:
    rows = backend.deployment.status()["actors"]
    return [row["id"] for row in rows if row["role"] == role and row["state"] == state]


def shards_of_experts(backend: ActorsBackend) -> Counter[int]:
    """Shard -> how many experts of all layers are asked of it."""
    layers = deployment_experts(backend.deployment.name)["layers"].values()
    return Counter(shard for experts in layers for expert in experts for shard in expert["shards"])


def resent(backend: ActorsBackend) -> float:
    return sum(stats.get("frames_resent", 0) for stats in backend.deployment.stats().values())


def test_a_standby_takes_the_place_of_a_killed_shard(backend: ActorsBackend, expected: dict[int, list[int]]) -> None:
    wait_for(lambda: ids(backend, "expert_shard", "standby") == [2])
    watched = Watched(backend, "standby", lambda: kill(pid_of(backend, "expert_shard", 0)))
    assert_unharmed(watched, expected)
    assert not watched.resent
    assert set(shards_of_experts(backend)) == {1, 2}
    wait_for(lambda: ids(backend, "expert_shard", "standby") == [0], 60)


def test_shards_come_and_go(backend: ActorsBackend, expected: dict[int, list[int]]) -> None:
    watched = Watched(backend, "grow", lambda: change(backend, "scale", None, 3))
    assert_unharmed(watched, expected)
    assert ids(backend, "expert_shard") == [1, 2, 3]
    assert min(shards_of_experts(backend).values()) > 0
    watched = Watched(backend, "shrink", lambda: change(backend, "scale", None, 2))
    assert_unharmed(watched, expected)
    assert ids(backend, "expert_shard") == [1, 2]
    assert set(shards_of_experts(backend)) == {1, 2}


def test_a_drained_shard_is_empty_before_it_ends(backend: ActorsBackend, expected: dict[int, list[int]]) -> None:
    before = resent(backend)
    watched = Watched(backend, "drain", lambda: change(backend, "drain", "expert_shard", 1))
    assert_unharmed(watched, expected)
    assert ids(backend, "expert_shard") == [2]
    assert set(shards_of_experts(backend)) == {2}
    assert resent(backend) == before, "a shard was asked after it had gone"
    with pytest.raises(DeploymentError, match="expert shard 2 is the only one"):
        change(backend, "drain", "expert_shard", 2)
    with pytest.raises(DeploymentError, match="no expert shard 1; there are 2"):
        change(backend, "drain", "expert_shard", 1)
    change(backend, "scale", None, 2)


def test_a_single_expert_is_replicated_and_moved(backend: ActorsBackend, expected: dict[int, list[int]]) -> None:
    first, second = ids(backend, "expert_shard")
    layer, expert = next(
        (layer, own["expert"])
        for layer, experts in deployment_experts(backend.deployment.name)["layers"].items()
        for own in experts
        if own["shards"] == [first]
    )

    def holders() -> list[int]:
        return deployment_experts(backend.deployment.name)["layers"][layer][expert]["shards"]

    watched = Watched(backend, "copy", lambda: change(backend, "replicate", layer, expert, second))
    assert_unharmed(watched, expected)
    assert holders() == [first, second]
    with pytest.raises(DeploymentError, match=f"shard {second} already holds expert {expert}"):
        change(backend, "move", layer, expert, first, second)
    change(backend, "rebalance", 0, 1)
    (source,) = holders()
    watched = Watched(backend, "move", lambda: change(backend, "move", layer, expert, source, first + second - source))
    assert_unharmed(watched, expected)
    assert holders() == [first + second - source]


def test_with_two_replicas_a_killed_shard_costs_nothing(backend: ActorsBackend, expected: dict[int, list[int]]) -> None:
    watched = Watched(backend, "replicate", lambda: change(backend, "rebalance", 0, 2))
    assert_unharmed(watched, expected)
    held = shards_of_experts(backend)
    first, second = ids(backend, "expert_shard")
    assert held[first] == held[second] == sum(held.values()) / 2
    watched = Watched(backend, "replica", lambda: kill(pid_of(backend, "expert_shard", first)))
    assert_unharmed(watched, expected)
    assert not watched.resent


def test_workers_come_and_go(backend: ActorsBackend, expected: dict[int, list[int]]) -> None:
    change(backend, "scale", 2, None)
    assert ids(backend, "attention_worker") == [0, 1]
    watched = Watched(backend, "leave", lambda: change(backend, "drain", "attention_worker", 0))
    assert_unharmed(watched, expected)
    assert not watched.resent, "a leaving worker finishes what it has"
    assert ids(backend, "attention_worker") == [1]
    with pytest.raises(DeploymentError, match="attention worker 1 is the only one"):
        change(backend, "drain", "attention_worker", 1)


def test_impossible_wishes_change_nothing(backend: ActorsBackend) -> None:
    before = backend.deployment.status()
    for wish, words in (
        (("scale", 0, None), "0 attention workers"),
        (("scale", None, 1000), "1000 expert shards; this deployment can have 1 to"),
        (("drain", "router", 0), "cannot drain a 'router'"),
        (("rebalance", -1, 1), "-1 extra replicas"),
    ):
        with pytest.raises(DeploymentError, match=words):
            change(backend, *wish)
    assert backend.deployment.status()["epoch"] == before["epoch"]
