"""A shard's experts come and go while it answers."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_ray.actors.expert_loader import ExpertLoader
from deepseek_ray.kernels.select import default_kernels
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore
from tests.checkpoints import tiny_config, write_random_checkpoint


class Watched:
    """A store and its loader; `rest` waits until the loader has come to rest once more."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.store = ExpertStore(CheckpointReader(directory), {}, torch.float32, shared_files=bool(options))
        self._rested = threading.Semaphore(0)
        self.loader = ExpertLoader(self.store, changed=self._rested.release, **options)

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


def test_a_loader_without_experts_maps_what_others_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if default_kernels().layout is None:
        pytest.skip("without a compiler nothing is packed")
    monkeypatch.setenv("DEEPSEEK_RAY_CACHE", str(tmp_path / "cache"))
    model = write_random_checkpoint(tmp_path / "model", tiny_config())
    standby = Watched(model, ahead_bytes=1e9)
    looked = threading.Event()
    map_ahead = standby.store.map_ahead

    def look(most_bytes: float) -> None:
        map_ahead(most_bytes)
        if standby.store._ahead:
            looked.set()

    standby.store.map_ahead = look  # type: ignore[method-assign]
    standby.loader.want({})
    standby.rest()
    ExpertStore(CheckpointReader(model), {1: [4]}, torch.float32, shared_files=True)
    assert looked.wait(30)
    standby.loader.want({1: [4]})
    standby.rest()
    assert standby.store.held == {1: [4]}
    assert not standby.store._ahead
