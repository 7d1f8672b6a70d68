"""The router's picture of a deployment, driven by reports and a clock made of numbers."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.control.membership import GRACE_SECONDS, HEARING_SECONDS, SUSPECT_SECONDS, Membership
from deepseek_ray.control.plan import add_shards, add_workers, drain_shard, drain_worker, initial_plan, with_placement
from deepseek_ray.control.reports import Directive, MemberReport
from deepseek_ray.links.base import Endpoints

HELD = {0: {1: [0, 1], 2: [0, 1]}, 1: {1: [2, 3], 2: [2, 3]}}
"""Contiguous: what each of two shards holds of four experts in the layers 1 and 2."""


def membership(generation: int = 3, **config: Any) -> Membership:
    settings = DeploymentConfig(model_dir="m", **config)
    return Membership(generation, initial_plan((1, 2), 4, settings), drain_seconds=30.0, kv_copies=settings.kv_copies)


def report(role: Any, id: int, state: Any = "ready", incarnation: int = 1, **fields: Any) -> MemberReport:
    endpoints = Endpoints(node_id="n", unix_name=f"{role}{id}", tcp_host=None, tcp_port=0, incarnation=incarnation)
    if role == "expert_shard" and state == "ready":
        fields.setdefault("held", HELD.get(id, {}))
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
    assert directive.table.replicas == {1: [(0,), (0,), (1,), (1,)], 2: [(0,), (0,), (1,), (1,)]}
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
    assert state.table.version == (before[0], before[1] + 1), "it has no address"
    assert set(state.shard_addresses()) == {0}
    state.observe(report("expert_shard", 1, "ready", incarnation=2), 2)
    assert state.table.version == (before[0], before[1] + 2)
    assert state.shard_addresses()[1].incarnation == 2
    state.observe(report("expert_shard", 1, "ready", incarnation=2), 3)
    assert state.table.version == (before[0], before[1] + 2)


def test_a_process_that_was_replaced_ends_and_its_actor_does_not() -> None:
    state = membership()
    bring_up(state)
    state.observe(report("expert_shard", 0, incarnation=2), 1)
    directive = state.observe(report("expert_shard", 0, incarnation=1), 2)
    assert directive.replaced
    assert not directive.exit, "that ends the actor, whose newer process is at work"


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


def test_a_silent_worker_hangs_once_another_one_could_go_on() -> None:
    state = membership(attention_workers=2)
    bring_up(state)
    state.observe(report("attention_worker", 1), 0)
    silent = SUSPECT_SECONDS + 1
    assert not state.hangs(0, 1, SUSPECT_SECONDS - 1), "it was heard a moment ago"
    assert not state.hangs(0, 1, silent), "nobody else was heard: its requests are best off where they are"
    state.observe(report("attention_worker", 1), silent)
    assert state.hangs(0, 1, silent)
    assert not state.hangs(1, 1, silent)
    state.observe(report("attention_worker", 0, incarnation=2), silent)
    assert state.hangs(0, 1, silent), "a newer process is the worker"
    assert not state.hangs(0, 2, silent)


def test_a_worker_that_a_new_router_never_heard_hangs() -> None:
    state = membership(attention_workers=2)
    state.observe(report("attention_worker", 1), 0)
    assert not state.hangs(0, 1, 1.0)
    state.observe(report("attention_worker", 1), SUSPECT_SECONDS + 1)
    assert state.hangs(0, 1, SUSPECT_SECONDS + 1)


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


def acknowledge(state: Membership, now: float, **fields: Any) -> Directive:
    """Worker 0 reports that it has the newest table."""
    return state.observe(report("attention_worker", 0, table_version=state.table.version, **fields), now)


def test_an_expert_moves_make_before_break() -> None:
    state = membership()
    bring_up(state)
    acknowledge(state, 0)
    moved = {1: [(0,), (1,), (1,), (1,)], 2: state.plan.placement[2]}  # expert 1 of layer 1 from shard 0 to shard 1
    state.replan(with_placement(state.plan, moved), 1)
    assert state.table.replicas[1][1] == (0,), "the new shard does not hold it yet"
    assert state.observe(report("expert_shard", 0), 1).held is None, "nothing is dropped yet"
    assert state.observe(report("expert_shard", 1), 1).held == {1: [1, 2, 3], 2: [2, 3]}
    state.observe(report("expert_shard", 1, held={1: [1, 2, 3], 2: [2, 3]}), 2)
    assert state.table.replicas[1][1] == (1,)
    assert state.observe(report("expert_shard", 0), 2).held is None, "a worker still has the old table"
    acknowledge(state, 3)
    assert state.observe(report("expert_shard", 0), 3).held == {1: [0], 2: [0, 1]}


def test_a_replica_is_published_when_it_is_held_and_survives_its_twin() -> None:
    state = membership()
    bring_up(state)
    twice = {1: [(0, 1), (0,), (1,), (1,)], 2: state.plan.placement[2]}
    state.replan(with_placement(state.plan, twice), 1)
    assert state.table.replicas[1][0] == (0,)
    state.observe(report("expert_shard", 1, held={1: [0, 2, 3], 2: [2, 3]}), 1)
    assert state.table.replicas[1][0] == (0, 1)
    state.observe(report("expert_shard", 0, "loading", incarnation=2), 2)
    assert state.table.replicas[1][0] == (1,)
    assert state.table.replicas[1][1] == (0,), "nobody has it: it waits for the one who shall"


def test_a_new_router_waits_for_the_shards_before_it_publishes() -> None:
    state = membership()
    state.observe(report("expert_shard", 0), 0.1)
    assert state.observe(report("attention_worker", 0, table_version=(2, 9)), 0.2).table is None
    state.observe(report("expert_shard", 1), 0.3)
    assert state.observe(report("attention_worker", 0, table_version=(2, 9)), 0.4).table is not None
    late = membership()
    assert late.observe(report("attention_worker", 0), HEARING_SECONDS + 0.1).table is not None


def test_a_standby_takes_the_place_of_a_lost_shard() -> None:
    state = membership(standby_shards=1)
    bring_up(state)
    state.observe(report("expert_shard", 2), 0)
    acknowledge(state, 0)
    assert {row["id"]: row["state"] for row in state.status(0) if row["role"] == "expert_shard"}[2] == "standby"
    acknowledge(state, 1, lost_shards={1: 9})
    assert state.plan.shards == (0, 1), "that was another process"
    acknowledge(state, 1, lost_shards={1: 1})
    assert (state.plan.shards, state.plan.standbys) == ((0, 2), (1,))
    assert state.observe(report("expert_shard", 2), 1).held == HELD[1]
    state.observe(report("expert_shard", 2, held=HELD[1]), 1.1)
    assert state.table.replicas[1] == [(0,), (0,), (2,), (2,)]
    back = state.observe(report("expert_shard", 1, "starting", incarnation=2), 2)
    assert back.held == {}, "its next process is the standby"
    assert not back.exit


def test_without_a_ready_standby_a_lost_shard_keeps_its_experts() -> None:
    state = membership(standby_shards=1)
    bring_up(state)
    acknowledge(state, 1, lost_shards={1: 1})
    assert state.plan.shards == (0, 1)


def test_a_silent_shard_is_replaced_by_the_clock() -> None:
    state = membership(standby_shards=1)
    bring_up(state)
    later = SUSPECT_SECONDS + 1
    state.observe(report("expert_shard", 2), later)
    state.observe(report("expert_shard", 0), later)
    state.tick(later, in_flight=lambda worker: 0)
    assert state.plan.shards == (0, 2)


def test_a_leaving_worker_takes_no_requests_and_ends_when_it_has_none() -> None:
    state = membership(attention_workers=2)
    bring_up(state)
    state.observe(report("attention_worker", 1), 0)
    state.replan(drain_worker(state.plan, 0), 1)
    assert [worker.id for worker in state.workers(1)] == [1]
    state.tick(2, in_flight=lambda worker: 3)
    assert not acknowledge(state, 2).exit
    assert {row["id"]: row["state"] for row in state.status(2) if row["role"] == "attention_worker"}[0] == "draining"
    state.tick(3, in_flight=lambda worker: 0)
    assert acknowledge(state, 3).exit


def test_a_leaving_worker_has_no_more_than_its_time() -> None:
    state = membership(attention_workers=2)
    bring_up(state)
    state.replan(drain_worker(state.plan, 0), 1)
    state.tick(2, in_flight=lambda worker: 3)
    state.tick(31, in_flight=lambda worker: 3)
    assert not acknowledge(state, 31).exit
    state.tick(33, in_flight=lambda worker: 3)
    assert acknowledge(state, 33).exit


def test_a_leaving_shard_ends_when_nobody_asks_it_any_more() -> None:
    state = membership()
    bring_up(state)
    acknowledge(state, 0)
    everything = {layer: [0, 1, 2, 3] for layer in (1, 2)}
    state.replan(drain_shard(state.plan, 1, {layer: [(0,)] * 4 for layer in (1, 2)}), 1)
    state.tick(1, in_flight=lambda worker: 0)
    assert not state.observe(report("expert_shard", 1), 1).exit, "its experts are nowhere else yet"
    state.observe(report("expert_shard", 0, held=everything), 2)
    state.tick(2, in_flight=lambda worker: 0)
    assert not state.observe(report("expert_shard", 1), 2).exit, "a worker still has the old table"
    acknowledge(state, 3)
    state.tick(3, in_flight=lambda worker: 0)
    assert state.observe(report("expert_shard", 1), 3).exit
    assert state.ready(3)


def test_added_members_are_expected() -> None:
    state = membership()
    bring_up(state)
    state.replan(add_shards(add_workers(state.plan, 1), 1), 0)
    assert [(row["role"], row["id"]) for row in state.status(0)] == [
        ("attention_worker", 0),
        ("attention_worker", 1),
        ("expert_shard", 0),
        ("expert_shard", 1),
        ("expert_shard", 2),
    ]
    assert state.ready(0), "the new shard has no experts yet: nothing waits for it"
    assert state.observe(report("expert_shard", 2, "starting"), 0).held == {}


def peers(state: Membership, now: float, *ids: int) -> list[int | None]:
    """Whom each worker is told to give its copies."""
    told = [state.observe(report("attention_worker", id), now).peer for id in ids]
    return [None if view is None else view.id for view in told]


def test_copies_go_round_a_ring_of_ready_workers() -> None:
    state = membership(attention_workers=3, kv_copies=True)
    assert peers(state, 0, 0) == [None], "it is alone"
    assert peers(state, 0, 1, 2, 0) == [0, 0, 1]
    assert peers(state, 0, 0, 1, 2) == [1, 2, 0]
    state.observe(report("attention_worker", 1, "starting", incarnation=2), 1)
    assert peers(state, 1, 0, 2) == [2, 0], "whoever is away keeps nothing"
    back = report("attention_worker", 1, incarnation=2)
    state.observe(back, 2)
    told = state.observe(report("attention_worker", 0), 2).peer
    assert told is not None
    assert (told.id, told.incarnation, told.endpoints) == (1, 2, back.endpoints)


def test_a_leaving_worker_gives_copies_and_is_given_none() -> None:
    state = membership(attention_workers=3, kv_copies=True)
    assert peers(state, 0, 0, 1, 2)[2] == 0
    state.replan(drain_worker(state.plan, 1), 0)
    assert peers(state, 0, 0, 1, 2) == [2, 2, 0]


def test_without_copies_nobody_has_a_peer() -> None:
    state = membership(attention_workers=2)
    assert peers(state, 0, 0, 1, 0) == [None, None, None]


STAND_IN_SECONDS = 8.0
EVERYTHING = {layer: [0, 1, 2, 3] for layer in (1, 2)}


def standing_in(generation: int = 1) -> Membership:
    plan = initial_plan((1, 2), 4, DeploymentConfig(model_dir="m"))
    return Membership(generation, plan, stand_in_after_seconds=STAND_IN_SECONDS)


def nobody(worker: int) -> int:
    return 0


def test_the_others_stand_in_for_a_shard_that_is_away_until_it_is_back() -> None:
    state = standing_in()
    bring_up(state)
    later = STAND_IN_SECONDS + 1
    state.observe(report("expert_shard", 0), later)
    acknowledge(state, later)
    state.tick(later, nobody)
    assert state.observe(report("expert_shard", 0), later).held == EVERYTHING
    state.observe(report("expert_shard", 0, held=EVERYTHING), later + 1)
    assert state.table.replicas[1] == [(0,)] * 4
    assert state.ready(later + 1)
    assert not state.settled(later + 1), "one is away"
    state.observe(report("expert_shard", 1), later + 2)
    state.tick(later + 2, nobody)
    assert state.table.replicas[1] == [(0,), (0,), (1,), (1,)], "it is back and has them"
    assert state.observe(report("expert_shard", 0, held=EVERYTHING), later + 2).held is None, "a worker asks it still"
    acknowledge(state, later + 3)
    assert state.observe(report("expert_shard", 0, held=EVERYTHING), later + 3).held == HELD[0]
    state.observe(report("expert_shard", 0), later + 4)
    assert state.settled(later + 4)


@pytest.mark.parametrize("generation", [1, 2])
def test_a_shard_that_was_never_heard_is_away_for_a_restarted_router_only(generation: int) -> None:
    state = standing_in(generation)
    later = STAND_IN_SECONDS + 1
    state.observe(report("expert_shard", 0), later)
    state.tick(later, nobody)
    lent = state.observe(report("expert_shard", 0), later).held
    assert lent == (EVERYTHING if generation > 1 else None)
