"""The router's picture of a deployment, driven by reports and a clock made of numbers."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek_ray.control.membership import GRACE_SECONDS, SUSPECT_SECONDS, MemberReport, Membership
from deepseek_ray.links.base import Endpoints


def membership(generation: int = 3) -> Membership:
    return Membership(generation, moe_layers=(1, 2), num_experts=4, num_shards=2, num_workers=1)


def report(role: Any, id: int, state: Any = "ready", incarnation: int = 1, **fields: Any) -> MemberReport:
    endpoints = Endpoints(node_id="n", unix_name=f"{role}{id}", tcp_host=None, tcp_port=0, incarnation=incarnation)
    return MemberReport(
        role=role,
        id=id,
        incarnation=incarnation,
        pid=1000 + id,
        node_id="n",
        restarts=incarnation - 1,
        state=state,
        endpoints=endpoints,
        **fields,
    )


def bring_up(state: Membership, now: float = 0.0) -> None:
    for shard in range(2):
        state.observe(report("expert_shard", shard), now)
    state.observe(report("attention_worker", 0), now)


def test_shards_are_told_their_experts_and_workers_the_table() -> None:
    state = membership()
    assert state.observe(report("expert_shard", 1, "starting"), 0).held == {1: [2, 3], 2: [2, 3]}
    bring_up(state)
    directive = state.observe(report("attention_worker", 0), 0)
    assert directive.table is not None
    assert directive.table.owners == {1: [0, 0, 1, 1], 2: [0, 0, 1, 1]}
    assert set(directive.shards) == {0, 1}
    current = state.observe(report("attention_worker", 0, table_version=directive.table.version), 0)
    assert current.table is None


def test_ready_only_when_every_expert_is_held_and_a_worker_answers() -> None:
    state = membership()
    assert state.waiting_for(0) == ["expert shard 0", "expert shard 1", "an attention worker"]
    bring_up(state)
    assert state.ready(0)


def test_a_restarted_shard_raises_the_epoch_once_it_holds_its_experts() -> None:
    state = membership()
    bring_up(state)
    before = state.table.version
    state.observe(report("expert_shard", 1, "loading", incarnation=2), 1)
    assert state.table.version == before
    assert set(state.shard_addresses()) == {0}
    state.observe(report("expert_shard", 1, "ready", incarnation=2), 2)
    assert state.table.version == (before[0], before[1] + 1)
    assert state.shard_addresses()[1].incarnation == 2
    state.observe(report("expert_shard", 1, "ready", incarnation=2), 3)
    assert state.table.version == (before[0], before[1] + 1)


def test_a_process_that_was_replaced_is_told_to_exit() -> None:
    state = membership()
    bring_up(state)
    state.observe(report("expert_shard", 0, incarnation=2), 1)
    assert state.observe(report("expert_shard", 0, incarnation=1), 2).exit


def test_a_missing_shard_is_forgiven_for_the_grace_time() -> None:
    state = membership()
    bring_up(state, now=0)
    later = GRACE_SECONDS - 1
    state.observe(report("expert_shard", 0), later)
    state.observe(report("attention_worker", 0), later)
    assert state.ready(later)
    state.observe(report("expert_shard", 0), GRACE_SECONDS + 1)
    assert state.waiting_for(GRACE_SECONDS + 1) == ["expert shard 1"]


def test_silent_members_are_lost_and_take_no_requests() -> None:
    state = membership()
    bring_up(state, now=0)
    assert [worker.id for worker in state.workers(1)] == [0]
    assert state.workers(SUSPECT_SECONDS + 1) == []
    assert {row["state"] for row in state.status(SUSPECT_SECONDS + 1)} == {"lost"}


def test_status_lists_every_expected_member_with_its_restarts() -> None:
    state = membership()
    bring_up(state)
    state.observe(report("expert_shard", 1, incarnation=3), 0)
    rows = state.status(0)
    assert [(row["role"], row["id"], row["restarts"]) for row in rows] == [
        ("attention_worker", 0, 0),
        ("expert_shard", 0, 0),
        ("expert_shard", 1, 2),
    ]
    assert membership().status(0)[0]["state"] == "starting"


def test_a_member_that_cannot_start_says_why() -> None:
    state = membership()
    state.observe(report("expert_shard", 1, "failed", error="no room"), 0)
    assert state.failure() == "expert shard 1: no room"


def test_a_closing_deployment_sends_everyone_home() -> None:
    state = membership()
    bring_up(state)
    state.closing = True
    assert state.observe(report("expert_shard", 0), 1).exit
    assert not state.ready(1)


@pytest.mark.parametrize("generation", [1, 7])
def test_directives_carry_the_generation(generation: int) -> None:
    assert membership(generation).observe(report("expert_shard", 0), 0).generation == generation
