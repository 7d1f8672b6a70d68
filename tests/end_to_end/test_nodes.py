"""A deployment over several nodes: members where their labels say, links by TCP, and the loss of a node's raylet."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from deepseek_ray.actors.launch import missing_labels, on_node
from deepseek_ray.actors.offline import ActorsBackend
from deepseek_ray.config.engine import DeploymentConfig
from tests.live_requests import Watched, assert_unharmed, expected_tokens, pid_of, row_of, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROLE = "deepseek-ray/role"
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, trained_model: Path) -> Iterator[Cluster]:
    """A head for attention and two nodes for experts, which find the death of one within two seconds."""
    if ray.is_initialized():
        ray.shutdown()
    for name, value in HEALTH_CHECKS.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=2, labels={ROLE: "attention"}, include_dashboard=False)
        for _ in range(2):
            cluster.add_node(num_cpus=1, labels={ROLE: "experts"})
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_members_run_where_their_labels_say_and_the_loss_of_a_node_costs_no_token(
    nodes: Cluster, trained_model: Path
) -> None:
    expected = expected_tokens(trained_model, "float32")
    config = DeploymentConfig(
        model_dir=str(trained_model),
        dtype="float32",
        expert_shards=2,
        attention_labels={ROLE: "attention"},
        expert_labels={ROLE: "experts"},
    )
    backend = ActorsBackend(config)
    try:
        head = nodes.head_node.node_id
        assert row_of(backend, "router")["node_id"] == head
        assert row_of(backend, "attention_worker")["node_id"] == head
        shards = [row_of(backend, "expert_shard", id)["node_id"] for id in range(2)]
        assert head not in shards
        victim = next(node for node in nodes.worker_nodes if node.node_id == shards[0])

        def kill_node() -> None:
            """What a power cut does: the raylet and everything that it runs."""
            (raylet,) = victim.all_processes["raylet"]
            for pid in (raylet.process.pid, pid_of(backend, "expert_shard", 0)):
                os.kill(pid, signal.SIGKILL)

        watched = Watched(backend, "node", kill_node)
        assert_unharmed(watched, expected)
        assert not watched.resent, "frames were enough"
        wait_for(lambda: row_of(backend, "expert_shard", 0)["node_id"] not in (head, victim.node_id), 30)
        assert row_of(backend, "expert_shard", 0)["restarts"] == 1
    finally:
        backend.shutdown()


def test_actors_without_resources_are_put_on_the_node_that_is_named(nodes: Cluster) -> None:
    """As the router is on the head. Ray's soft node affinity puts half of them elsewhere."""

    class Somewhere:
        def node(self) -> str:
            return ray.get_runtime_context().get_node_id()

    head = nodes.head_node.node_id
    actors: list[Any] = [ray.remote(Somewhere).options(num_cpus=0, **on_node(head, {})).remote() for _ in range(8)]
    assert set(ray.get([actor.node.remote() for actor in actors])) == {head}


def test_labels_that_no_node_has_are_named(nodes: Cluster) -> None:
    config = DeploymentConfig(model_dir="m", attention_labels={ROLE: "attention"}, expert_labels={ROLE: "gpu"})
    assert missing_labels(config) == [f"a node with the labels {ROLE}=gpu for each expert shard"]
