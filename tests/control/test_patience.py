"""How long an answer is waited for."""

from __future__ import annotations

import pytest

from deepseek_ray.control.patience import Patience


def test_patience_grows_with_slow_answers_within_bounds_and_comes_back() -> None:
    patience = Patience(0.3)
    patience.answered(0.01, 10)
    assert patience.seconds(10) == 0.3, "never less than the least"
    patience.answered(0.2, 10)
    assert patience.seconds(10) == 0.8, "four times the slowest"
    patience.answered(60.0, 10)
    assert patience.seconds(10) == 3.0, "never more than ten times the least"
    for _ in range(600):
        patience.answered(0.01, 10)
    assert patience.seconds(10) == 0.3


def test_much_work_is_given_time_before_it_was_seen_to_take_any() -> None:
    patience = Patience(0.3)
    for _ in range(10):
        patience.answered(0.01, 100)
    assert patience.seconds(100) == 0.3
    assert patience.seconds(5000) == pytest.approx(2.0, rel=0.01), "four times 0.1 ms per pair"
    assert patience.seconds(50_000) == 3.0


def test_the_fastest_recent_answer_says_what_work_takes() -> None:
    patience = Patience(0.3)
    patience.answered(0.05, 5)  # few pairs: the time is that of reading weights
    patience.answered(0.5, 2500)
    patience.answered(0.05, 5)
    assert patience.seconds(2600) == pytest.approx(4 * 0.5 / 2500 * 2600 / 0.98, rel=0.05)
    assert patience.seconds(5) == pytest.approx(4 * 0.5, rel=0.05), "but an answer took half a second a moment ago"


def test_before_the_first_answer_nothing_is_known() -> None:
    patience = Patience(0.3)
    assert patience.seconds(1) == 3.0
    patience.answered(0.0, 0)
    assert patience.seconds(1) == 3.0, "a sign of life says nothing of work"
