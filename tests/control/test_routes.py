"""What workers and shards are told while experts move: hand-checkable cases."""

from __future__ import annotations

from deepseek_ray.control.routes import held_by, published_placement, unreachable_experts

WANTED = {1: [(0,), (0, 1), (1,)]}


def test_published_is_what_is_wanted_and_held() -> None:
    assert published_placement(WANTED, {0: {1: [0, 1]}, 1: {1: [1, 2]}}) == WANTED
    assert published_placement(WANTED, {0: {1: [0, 1]}, 1: {1: [2]}}) == {1: [(0,), (0,), (1,)]}


def test_whoever_still_has_an_expert_is_asked_until_the_new_place_has_it() -> None:
    assert published_placement(WANTED, {0: {1: [0, 2]}, 1: {}})[1][2] == (0,)
    assert published_placement(WANTED, {0: {1: [0, 2]}, 1: {1: [2]}})[1][2] == (1,)


def test_an_expert_that_nobody_has_is_waited_for_where_it_shall_be() -> None:
    assert published_placement(WANTED, {}) == WANTED


def test_a_shard_drops_only_what_nobody_can_ask_of_it() -> None:
    wanted, published = {1: [0]}, {1: [(0,), (0, 1), (1,)]}
    now = {1: [0, 1, 2]}
    assert held_by(0, wanted, published, now, settled=False) == {1: [0, 1, 2]}
    assert held_by(0, wanted, published, now, settled=True) == {1: [0, 1]}, "expert 1 is still asked of it"
    assert held_by(2, {}, published, now, settled=True) == {}
    assert held_by(0, {1: [0], 2: [5]}, published, {}, settled=False) == {1: [0], 2: [5]}


def test_unreachable_experts() -> None:
    held = {0: {1: [0, 1]}, 1: {1: [1, 2]}}
    assert not unreachable_experts(WANTED, held, frozenset({0, 1}))
    assert unreachable_experts(WANTED, held, frozenset({0})), "expert 2 is on shard 1 only"
    assert unreachable_experts(WANTED, {0: {1: [0, 1]}, 1: {}}, frozenset({0, 1}))
