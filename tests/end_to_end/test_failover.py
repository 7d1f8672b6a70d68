"""Processes of a deployment are killed in mid-generation: every request finishes, with the very same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_ray.actors.offline import ActorsBackend
from deepseek_ray.config.engine import DeploymentConfig
from tests.live_requests import (
    WORK,
    Watched,
    assert_unharmed,
    expected_tokens,
    kill,
    pid_of,
    restarts_of,
    wait_for,
)

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def backend(ray_cluster: None, trained_model: Path, dtype: str) -> Iterator[ActorsBackend]:
    transport = "auto" if dtype == "float32" else "tcp"
    config = DeploymentConfig(model_dir=str(trained_model), dtype=dtype, transport=transport)
    backend = ActorsBackend(config)
    yield backend
    backend.shutdown()


@pytest.fixture(scope="module")
def expected(trained_model: Path, dtype: str) -> dict[int, list[int]]:
    return expected_tokens(trained_model, dtype)


def test_actors_give_the_tokens_of_one_process(backend: ActorsBackend, expected: dict[int, list[int]]) -> None:
    undisturbed = Watched(backend, "calm", strike=lambda: None)
    assert not undisturbed.errors
    assert dict(undisturbed.tokens) == expected


@pytest.mark.parametrize("shard", [0, 1])
def test_kill_an_expert_shard(backend: ActorsBackend, expected: dict[int, list[int]], shard: int) -> None:
    resent = backend.deployment.stats()["attention_worker/0"]["frames_resent"]
    watched = Watched(backend, f"shard{shard}", lambda: kill(pid_of(backend, "expert_shard", shard)))
    assert_unharmed(watched, expected)
    assert not watched.resent, "a request was sent again where a frame would have done"
    wait_for(lambda: restarts_of(backend, "expert_shard", shard) == 1)  # the streams need not wait for it
    wait_for(lambda: backend.deployment.stats()["attention_worker/0"]["frames_resent"] > resent)


def test_kill_the_router(backend: ActorsBackend, expected: dict[int, list[int]]) -> None:
    """No token passes through the router, so nothing of a stream is sent again: the members' reports are."""
    members = [("attention_worker", 0), ("expert_shard", 0), ("expert_shard", 1)]
    pids = [pid_of(backend, *member) for member in members]
    watched = Watched(backend, "router", lambda: kill(pid_of(backend, "router")))
    assert_unharmed(watched, expected)
    assert not watched.resent
    again = Watched(backend, "after-router", strike=lambda: None)
    assert dict(again.tokens) == expected
    assert restarts_of(backend, "router") == 1
    wait_for(lambda: [pid_of(backend, *member) for member in members] == pids)  # they report to the new router


def test_kill_the_attention_worker(backend: ActorsBackend, expected: dict[int, list[int]]) -> None:
    watched = Watched(backend, "worker", lambda: kill(pid_of(backend, "attention_worker")))
    assert_unharmed(watched, expected)
    assert set(watched.resent) == set(range(len(WORK))), "every request ran there, so every one was sent again"
    assert min(watched.resent.values()) >= 6, "and with the tokens it had"
    assert restarts_of(backend, "attention_worker") == 1
