"""A deployment follows its load: a second attention worker while requests wait, one again when nobody asks."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from deepseek_ray.actors.offline import ActorsBackend
from deepseek_ray.config.engine import AutoscaleConfig, DeploymentConfig, EngineConfig
from tests.live_requests import Watched, expected_tokens, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def num_workers(backend: ActorsBackend) -> int:
    """That are ready."""
    rows = backend.deployment.status()["actors"]
    return sum(row["role"] == "attention_worker" and row["state"] == "ready" for row in rows)


def test_attention_workers_follow_the_requests_that_wait(ray_cluster: None, trained_model: Path) -> None:
    expected = expected_tokens(trained_model, "float32")
    config = DeploymentConfig(
        model_dir=str(trained_model),
        dtype="float32",
        engine=EngineConfig(max_num_seqs=2),  # the others wait
        autoscale=AutoscaleConfig(
            min_workers=1, max_workers=2, max_shards=2, min_shards=2, up_seconds=1, down_seconds=3, rest_seconds=2
        ),
    )
    backend = ActorsBackend(config)
    waves: list[Watched] = []
    enough = threading.Event()

    def ask_again_and_again() -> None:
        while not enough.is_set():
            waves.append(Watched(backend, f"wave{len(waves)}", lambda: None))

    asking = threading.Thread(target=ask_again_and_again)
    try:
        assert num_workers(backend) == 1
        asking.start()
        wait_for(lambda: num_workers(backend) == 2, 60)
        enough.set()
        asking.join()
        wait_for(lambda: num_workers(backend) == 1, 60)
    finally:
        enough.set()
        asking.join()
        backend.shutdown()
    assert waves
    for wave in waves:
        assert not wave.errors
        assert dict(wave.tokens) == expected
