"""When a member whose router does not answer goes on, and when it leaves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

import deepseek_ray.actors.member as member_module
from deepseek_ray.actors.member import Member
from deepseek_ray.config.engine import DeploymentConfig

RECORD = SimpleNamespace(
    instance="this one",
    description=SimpleNamespace(name="d"),
    config=DeploymentConfig(model_dir="m", orphan_timeout_seconds=30.0),
)
SILENT = ray.exceptions.GetTimeoutError("some objects are not ready")
GONE = ValueError("failed to look up the actor")


class LeftError(Exception):
    """Instead of the end of the process."""


@pytest.fixture
def member(monkeypatch: pytest.MonkeyPatch) -> Member:
    context = SimpleNamespace(get_node_id=lambda: "n", current_actor=None)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(member_module, "take_life", lambda *arguments: 1)
    record: Any = RECORD
    member = Member(record, "expert_shard", 0, report=lambda identity: identity, obey=lambda directive: None)

    def leave() -> None:
        raise LeftError

    monkeypatch.setattr(member, "leave", leave)
    return member


def exchange(member: Member, monkeypatch: pytest.MonkeyPatch, away: float, error: Exception, record: Any) -> bool:
    """Whether it is still there after it was answered with `error`, `away` seconds after the last answer."""

    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    def read(name: str) -> Any:
        if isinstance(record, Exception):
            raise record
        return record

    monkeypatch.setattr(member_module, "ask_router", fail)
    monkeypatch.setattr(member_module, "read_record", read)
    member._last_answer = member_module.time.monotonic() - away
    try:
        member._exchange()
    except LeftError:
        return False
    return True


@pytest.mark.parametrize(
    ("away", "error", "record", "stays"),
    [
        (1.0, SILENT, RECORD, True),
        (1.0, GONE, RECORD, True),  # between two of its processes
        (31.0, GONE, RECORD, False),
        (31.0, SILENT, RECORD, True),  # stopped, or on a host that was cut off: the cluster knows the deployment
        (3100.0, SILENT, RECORD, True),
        (1.0, SILENT, RuntimeError("no cluster"), True),
        (31.0, SILENT, RuntimeError("no cluster"), False),
        (1.0, SILENT, None, False),  # the deployment has ended
        (1.0, SILENT, SimpleNamespace(instance="a later one of this name"), False),
    ],
)
def test_who_stays(
    member: Member, monkeypatch: pytest.MonkeyPatch, away: float, error: Exception, record: Any, stays: bool
) -> None:
    assert exchange(member, monkeypatch, away, error, record) == stays
