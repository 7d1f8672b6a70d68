"""Two expert shards in this process, without and with replicas, over each kind of link."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deepseek_ray.models.checkpoint import CheckpointReader
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.expert_shards import BOTH, Shards
from tests.links.conftest import link_pair, secret, serve  # noqa: F401


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> CheckpointReader:
    directory = tmp_path_factory.mktemp("model")
    return CheckpointReader(write_random_checkpoint(directory / "m", tiny_config()))


@pytest.fixture(params=["shared_memory", "tcp", "tcp+tensors"])
def twins(request: pytest.FixtureRequest, reader: CheckpointReader) -> Iterator[Shards]:
    """Two shards that hold all experts each."""
    shards = Shards(reader, torch.float32, request.param, BOTH)
    yield shards
    for shard in range(2):
        shards.end(shard)


@pytest.fixture(params=["shared_memory", "tcp", "tcp+tensors"])
def shards(request: pytest.FixtureRequest, reader: CheckpointReader) -> Iterator[Shards]:
    shards = Shards(reader, torch.float32, request.param)
    yield shards
    for shard in range(2):
        shards.end(shard)
