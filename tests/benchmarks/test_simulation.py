"""The simulated step against sums made by hand."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.bench_model import BENCH_MINI
from benchmarks.roofline import Probes, attention_operators, expert_operator, head_operator, step_seconds
from benchmarks.simulation import Deployment, Machine, Network, simulate

MACHINE = Machine(Probes(20e9, {1: 100e9, 8: 200e9}), efficiency=0.5)
FREE = Network(latency_seconds=0.0, bytes_per_second=1e30)
ONE = Deployment(
    attention_workers=1,
    expert_shards=1,
    sequences=8,
    context=128,
    attention=MACHINE,
    experts=MACHINE,
    network=FREE,
)


def test_one_worker_and_one_shard_take_the_sum_of_all_operators() -> None:
    predicted = simulate(BENCH_MINI, ONE)
    assert predicted.step_seconds == pytest.approx(step_seconds(BENCH_MINI, 8, 128, MACHINE.probes) / 0.5)
    assert predicted.tokens_per_second == pytest.approx(8 / predicted.step_seconds)
    assert predicted.attention_busy + predicted.experts_busy == pytest.approx(1.0)


def test_a_link_adds_its_two_ways_for_each_layer_with_experts() -> None:
    network = Network(latency_seconds=1e-3, bytes_per_second=1e9, call_seconds=2e-3)
    there, back = 8 * 2048 * 2 / 1e9, 8 * 6 * 2048 * 2 / 1e9
    added = len(BENCH_MINI.moe_layers) * (2 * 1e-3 + 2e-3 + there + back)
    step = simulate(BENCH_MINI, dataclasses.replace(ONE, network=network)).step_seconds
    assert step == pytest.approx(simulate(BENCH_MINI, ONE).step_seconds + added)


def test_the_busiest_shard_decides() -> None:
    two = dataclasses.replace(ONE, expert_shards=2)
    experts = MACHINE.seconds([expert_operator(BENCH_MINI, 8)]) * len(BENCH_MINI.moe_layers)
    even, uneven = (simulate(BENCH_MINI, dataclasses.replace(two, busiest_shard=busiest)) for busiest in (1.0, 1.5))
    assert even.step_seconds == pytest.approx(simulate(BENCH_MINI, ONE).step_seconds - experts / 2)
    assert uneven.step_seconds == pytest.approx(even.step_seconds + 0.25 * experts)


def test_micro_batches_hide_experts_behind_attention() -> None:
    """Where a call is done before the other micro-batch's attention, only attention is left of the step."""
    rows = 4
    attention = sum(
        MACHINE.seconds(list(attention_operators(BENCH_MINI, layer, rows, 128)))
        for layer in range(BENCH_MINI.num_hidden_layers)
    )
    attention += MACHINE.seconds([head_operator(BENCH_MINI, rows)])
    predicted = simulate(BENCH_MINI, dataclasses.replace(ONE, micro_batches=2, expert_shards=8), steps=8)
    assert predicted.step_seconds >= 2 * attention
    assert predicted.step_seconds == pytest.approx(2 * attention, rel=0.1)
    assert predicted.attention_busy > 0.9


def test_calls_that_wait_are_computed_together() -> None:
    """Four workers at one shard read its weights hardly more often than one."""
    four = dataclasses.replace(ONE, attention_workers=4)
    joint, one_by_one = (simulate(BENCH_MINI, dataclasses.replace(four, joint_calls=joint)) for joint in (True, False))
    experts = MACHINE.seconds([expert_operator(BENCH_MINI, 8)]) * len(BENCH_MINI.moe_layers)
    assert one_by_one.step_seconds >= 4 * experts
    assert joint.step_seconds < 0.75 * one_by_one.step_seconds
    assert joint.experts_busy <= 1.0
