"""Makes `tests/` importable, so that every test finds `fakes.py` and `reference.py`; shared fixtures come here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def trained_model() -> Path:
    """A checkpoint that was really trained, see `tests/trained.py`."""
    from tests.trained import trained_model_dir

    return trained_model_dir()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this process for all tests that ask for one; every process of it is gone afterwards."""
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2)
    yield
    ray.shutdown()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests skip themselves where there is no device. Spread over two processes, one takes all that start Ray, one
    after the other; the files of the rest go one by one to whoever is free."""
    is_spread = hasattr(config, "workerinput")
    items.sort(key=lambda item: _place(item, is_spread))
    for item in items:
        starts_ray = item.get_closest_marker("cluster") is not None
        item.add_marker(pytest.mark.xdist_group("cluster" if starts_ray else str(item.path)))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _place(item: pytest.Item, is_spread: bool) -> int:
    """Links first: they count the process's descriptors, and Ray's gRPC, once loaded, opens and closes some at will.
    Tests that share a Ray cluster last of those that start one: it lives from the first of them on. What starts Ray is
    the longest chain, so with two processes it begins at once, in the other one."""
    if "ray_cluster" in getattr(item, "fixturenames", ()):
        return 1 if is_spread else 4
    if item.get_closest_marker("cluster"):
        return 0 if is_spread else 3
    return 2 if "links" in item.path.parts else 3
