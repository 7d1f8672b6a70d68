"""Shards that are away are stood in for: by whom, from when on, and until when."""

from __future__ import annotations

import pytest

from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.control.plan import Plan, initial_plan
from deepseek_ray.control.shard_figures import EXPERTS_SHARE, ShardFigures
from deepseek_ray.control.stand_ins import StandIns

AFTER = 8.0


def plan(shards: int = 3, replicas: int = 1) -> Plan:
    """Twelve experts in each of two layers."""
    settings = DeploymentConfig(model_dir="m", expert_shards=shards, expert_replicas=replicas)
    return initial_plan((1, 2), 12, settings)


def seen(*seconds: float) -> dict[int, float]:
    return dict(enumerate(seconds))


def test_the_experts_of_a_shard_that_is_away_are_divided_among_the_others() -> None:
    stand_ins = StandIns(AFTER)
    stand_ins.update(plan(), seen(10, 1, 10), {}, now=10)
    lent = {shard: stand_ins.of(shard) for shard in range(3)}
    assert lent[1] == {}
    assert [len(experts) for shard in (0, 2) for experts in lent[shard].values()] == [2, 2, 2, 2]
    for layer in (1, 2):
        assert sorted([*lent[0][layer], *lent[2][layer]]) == [4, 5, 6, 7]


def test_nobody_stands_in_for_one_that_is_just_restarted_or_has_never_come() -> None:
    stand_ins = StandIns(AFTER)
    stand_ins.update(plan(), seen(10, 3, 10), {}, now=10)
    assert not any(stand_ins.of(shard) for shard in range(3))
    stand_ins.update(plan(), {0: 30.0, 2: 30.0}, {}, now=30)
    assert not any(stand_ins.of(shard) for shard in range(3))


def test_what_was_lent_ends_with_the_return() -> None:
    stand_ins = StandIns(AFTER)
    stand_ins.update(plan(), seen(10, 1, 10), {}, now=10)
    assert stand_ins.of(0)
    stand_ins.update(plan(), seen(11, 11, 11), {}, now=11)
    assert not any(stand_ins.of(shard) for shard in range(3))


def test_a_second_loss_gives_everything_to_who_is_left() -> None:
    stand_ins = StandIns(AFTER)
    stand_ins.update(plan(), seen(10, 1, 10), {}, now=10)
    stand_ins.update(plan(), seen(20, 1, 10), {}, now=20)
    assert stand_ins.of(0) == {layer: [4, 5, 6, 7, 8, 9, 10, 11] for layer in (1, 2)}


def test_an_expert_that_another_shard_has_needs_nobody() -> None:
    stand_ins = StandIns(AFTER)
    stand_ins.update(plan(shards=2, replicas=2), seen(10, 1), {}, now=10)
    assert not stand_ins.of(0)


@pytest.mark.parametrize(("slots", "lent"), [(16, 8), (15, 0)])
def test_only_as_far_as_memory_goes(slots: int, lent: int, caplog: pytest.LogCaptureFixture) -> None:
    figures = {
        shard: ShardFigures(expert_bytes=1.0, memory_bytes=slots * EXPERTS_SHARE**-1, memory=f"host {shard}")
        for shard in range(3)
    }
    figures[2] = ShardFigures(expert_bytes=1.0, memory_bytes=1.0, memory="host 2")  # full already
    stand_ins = StandIns(AFTER)
    stand_ins.update(plan(), seen(10, 1, 10), figures, now=10)
    assert sum(len(experts) for experts in stand_ins.of(0).values()) == lent
    assert not stand_ins.of(2)
    assert ("lack the memory" in caplog.text) == (lent == 0)


def test_it_can_be_turned_off() -> None:
    stand_ins = StandIns(None)
    stand_ins.update(plan(), seen(10, 1, 10), {}, now=10)
    assert not stand_ins.of(0)
