"""A claim on a deployment, against a router that writes down what it is told."""

from __future__ import annotations

import threading

import pytest

import deepseek_ray.actors.lease as lease_module
from deepseek_ray.actors.lease import Lease
from deepseek_ray.actors.record import DeploymentDescription, DeploymentRecord
from deepseek_ray.config.engine import DeploymentConfig


class FakeRouter:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.renewed = threading.Semaphore(0)
        self.asked = threading.Event()
        self.may_renew = threading.Event()
        self.may_renew.set()

    def ask(self, name: str, method: str, owner: str) -> bool:
        assert name == "default"
        self.asked.set()
        assert method == "release_lease" or self.may_renew.wait(10)
        self.calls.append((method, owner))
        self.renewed.release()
        return True


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> FakeRouter:
    router = FakeRouter()
    monkeypatch.setattr(lease_module, "ask_router", router.ask)
    return router


def record(orphan_timeout_seconds: float) -> DeploymentRecord:
    config = DeploymentConfig(model_dir="/m", orphan_timeout_seconds=orphan_timeout_seconds)
    description = DeploymentDescription(
        name="default", served_model_name="m", model_dir="/m", max_model_len=8, vocab_size=8, created=0,
        request_timeout_seconds=1,
    )  # fmt: skip
    return DeploymentRecord(
        instance="i", secret=b"s", config_json=config.model_dump_json(), description=description, moe_layers=(),
        num_experts=0,
    )  # fmt: skip


def test_it_is_renewed_until_it_is_released(router: FakeRouter) -> None:
    lease = Lease(record(orphan_timeout_seconds=0.04))
    for _ in range(3):
        assert router.renewed.acquire(timeout=10)
    lease.release()
    assert {method for method, _ in router.calls[:-1]} == {"renew_lease"}
    assert router.calls[-1][0] == "release_lease"
    assert len({owner for _, owner in router.calls}) == 1


def test_a_renewal_under_way_does_not_come_after_the_release(router: FakeRouter) -> None:
    router.may_renew.clear()
    lease = Lease(record(orphan_timeout_seconds=30))
    assert router.asked.wait(10)
    releasing = threading.Thread(target=lease.release)
    releasing.start()
    releasing.join(0.2)  # long enough for a release that does not wait
    router.may_renew.set()
    releasing.join(10)
    assert [method for method, _ in router.calls] == ["renew_lease", "release_lease"]


def test_two_owners_are_told_apart(router: FakeRouter) -> None:
    for lease in [Lease(record(30)), Lease(record(30))]:
        assert router.renewed.acquire(timeout=10)
        lease.stop()
    assert len({owner for _, owner in router.calls}) == 2
