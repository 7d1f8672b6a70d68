"""The load window: what is counted, merged and forgotten."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_ray.errors import DeploymentError
from deepseek_ray.expert_parallel.load import NUM_BUCKETS, ExpertLoad


def test_counts_add_up_per_layer_and_expert() -> None:
    load = ExpertLoad([1, 2], num_experts=3, window=60)
    load.add({1: [1, 0, 2]}, now=10)
    load.add({1: [1, 0, 0], 2: [0, 5, 0]}, now=11)
    assert {layer: row.tolist() for layer, row in load.loads(now=12).items()} == {1: [2, 0, 2], 2: [0, 5, 0]}
    assert load.loads(now=12)[1].dtype == np.float64


def test_before_any_report_all_is_zero() -> None:
    assert ExpertLoad([4], num_experts=2, window=1).loads(now=0)[4].tolist() == [0, 0]


def test_what_is_older_than_the_window_is_forgotten() -> None:
    # 30 buckets of 2 s: a count at 10 s lies in [10, 12) and leaves when the bucket [70, 72) begins.
    load = ExpertLoad([0], num_experts=1, window=60)
    load.add({0: [3]}, now=10)
    load.add({0: [4]}, now=40)
    assert load.loads(now=69.9)[0].tolist() == [7]
    assert load.loads(now=70)[0].tolist() == [4]
    assert load.loads(now=1000)[0].tolist() == [0]


def test_totals_of_several_reporters_are_merged() -> None:
    load = ExpertLoad([0], num_experts=2, window=60)
    load.observe(0, 1, {0: [100, 100]}, now=0)  # where counting starts
    load.observe(1, 1, {0: [0, 0]}, now=0)
    load.observe(0, 1, {0: [103, 101]}, now=1)
    load.observe(1, 1, {0: [5, 0]}, now=1)
    assert load.loads(now=1)[0].tolist() == [8, 1]


def test_a_restarted_reporter_counts_from_zero() -> None:
    load = ExpertLoad([0], num_experts=1, window=60)
    load.observe(7, 1, {0: [10]}, now=0)
    load.observe(7, 1, {0: [15]}, now=1)  # 5
    load.observe(7, 2, {0: [20]}, now=2)  # 20: a new process, even though the total is larger
    load.observe(7, 2, {0: [21]}, now=3)  # 1
    assert load.loads(now=3)[0].tolist() == [26]


def test_overtaken_reports_say_nothing() -> None:
    load = ExpertLoad([0], num_experts=2, window=60)
    load.observe(0, 2, {0: [0, 0]}, now=0)
    load.observe(0, 2, {0: [9, 9]}, now=1)
    load.observe(0, 2, {0: [4, 9]}, now=2)  # sent before the last one
    load.observe(0, 1, {0: [50, 50]}, now=2)  # the process before
    assert load.loads(now=2)[0].tolist() == [9, 9]
    load.observe(0, 2, {0: [10, 9]}, now=3)
    assert load.loads(now=3)[0].tolist() == [10, 9]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=30), st.integers(0, 60))
def test_equals_a_list_of_everything(reports: list[tuple[int, int]], later: int) -> None:
    # Window of 30 with 30 buckets: a bucket is one unit of time, so the window is exact for whole times.
    assert NUM_BUCKETS == 30
    reports = sorted(reports)
    load = ExpertLoad([0], num_experts=1, window=30)
    for now, tokens in reports:
        load.add({0: [tokens]}, now)
    now = max([later, *(time for time, _ in reports)])
    assert load.loads(now)[0].tolist() == [sum(tokens for time, tokens in reports if time > now - 30)]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({3: [0, 0]}, r"layer 3; the MoE layers are \[1, 2\]"),
        ({1: [0]}, r"shape \(1,\) for layer 1; send one for each of 2 experts"),
        ({1: [4, -2]}, r"-2 tokens for expert 1 of layer 1"),
    ],
)
def test_counts_that_do_not_fit(counts: dict[int, list[int]], message: str) -> None:
    load = ExpertLoad([1, 2], num_experts=2, window=60)
    with pytest.raises(DeploymentError, match=message):
        load.add(counts, now=0)


def test_a_window_needs_a_length() -> None:
    with pytest.raises(DeploymentError, match="window of 0"):
        ExpertLoad([0], num_experts=1, window=0)
