"""The limit of a decode step, by hand."""

from __future__ import annotations

import pytest

from benchmarks.bench_model import BENCH_MINI
from benchmarks.roofline import Operator, Probes, operators, step_seconds


def test_an_operator_is_bound_by_memory_or_by_arithmetic() -> None:
    probes = Probes(100.0, {1: 10.0, 4: 40.0})
    assert probes.seconds(Operator(num_bytes=200, flop=10, rows=1)) == 2.0
    assert probes.seconds(Operator(num_bytes=200, flop=30, rows=1)) == 3.0
    assert probes.seconds(Operator(num_bytes=10, flop=40, rows=7)) == 1.0, "the rate of four rows"
    assert probes.seconds(Operator(num_bytes=10, flop=10, rows=0.5)) == 1.0


def test_a_step_of_one_sequence_reads_every_active_weight_once() -> None:
    """0.47 B active parameters in two bytes each; the embedding is one row."""
    read = sum(operator.num_bytes for operator in operators(BENCH_MINI, 1, context=1))
    embedding = BENCH_MINI.vocab_size * BENCH_MINI.hidden_size
    experts = len(BENCH_MINI.moe_layers) * BENCH_MINI.n_routed_experts
    idle = experts - len(BENCH_MINI.moe_layers) * BENCH_MINI.num_experts_per_tok
    one = 3 * BENCH_MINI.hidden_size * BENCH_MINI.moe_intermediate_size
    assert read == pytest.approx(2 * (BENCH_MINI.num_parameters - embedding - idle * one), rel=0.01)


def test_more_sequences_touch_more_experts_and_a_longer_context_costs_more() -> None:
    probes = Probes(1e9, dict.fromkeys((1, 8, 32), 1e12))
    steps = [step_seconds(BENCH_MINI, sequences, 128, probes) for sequences in (1, 8, 32)]
    assert steps == sorted(steps)
    assert steps[2] < 32 * steps[0]
    assert step_seconds(BENCH_MINI, 8, 16384, probes) > step_seconds(BENCH_MINI, 8, 128, probes)
