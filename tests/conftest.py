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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those first that count the process's descriptors: Ray's gRPC, once loaded, opens and closes some at will.
    Those that share a Ray cluster last: it lives from the first of them on, and others start one of their own.
    GPU tests skip themselves where there is no device."""
    items.sort(key=_place)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _place(item: pytest.Item) -> int:
    fixtures = getattr(item, "fixturenames", ())
    if "nothing_left_behind" in fixtures:
        return 0
    return 2 if "ray_cluster" in fixtures else 1
