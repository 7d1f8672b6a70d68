"""A shard's experts come and go while it answers."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from deepseek_ray.actors.expert_loader import ExpertLoader
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore
from tests.checkpoints import tiny_config, write_random_checkpoint


class Watched:
    """A store and its loader; `rest` waits until the loader has come to rest once more."""

    def __init__(self, directory: Path) -> None:
        self.store = ExpertStore(CheckpointReader(directory), {}, torch.float32)
        self._rested = threading.Semaphore(0)
        self.loader = ExpertLoader(self.store, changed=self._rested.release)

    def rest(self) -> None:
        assert self._rested.acquire(timeout=30)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(write_random_checkpoint(tmp_path / "model", tiny_config()))


def test_what_is_wanted_is_held_and_nothing_else(watched: Watched) -> None:
    assert not watched.loader.has_loaded
    watched.loader.want({1: [0, 3], 2: [1]})
    watched.rest()
    assert watched.loader.has_loaded
    assert watched.store.held == {1: [0, 3], 2: [1]}
    watched.loader.want({1: [3, 4]})
    watched.rest()
    assert watched.store.held == {1: [3, 4]}
    watched.loader.want({})
    watched.rest()
    assert watched.store.held == {}


def test_an_expert_that_cannot_be_loaded_is_said_and_tried_again(watched: Watched) -> None:
    watched.loader.want({1: [99]})
    watched.rest()
    assert not watched.loader.has_loaded
    assert watched.loader.error is not None
    assert "experts.99" in watched.loader.error
    watched.loader.want({1: [2]})
    watched.rest()
    assert watched.loader.error is None
    assert watched.store.held == {1: [2]}
