"""How long an answer is waited for."""

from __future__ import annotations

from deepseek_ray.control.patience import Patience


def test_patience_grows_with_slow_answers_within_bounds_and_comes_back() -> None:
    patience = Patience(0.3)
    patience.answered(0.01)
    assert patience.seconds == 0.3, "never less than the least"
    patience.answered(0.2)
    assert patience.seconds == 0.8, "four times the slowest"
    patience.answered(60.0)
    assert patience.seconds == 3.0, "never more than ten times the least"
    for _ in range(600):
        patience.answered(0.01)
    assert patience.seconds == 0.3
