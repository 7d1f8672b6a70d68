"""Warm-up, cosine and floor at the steps where the value is known by hand."""

from __future__ import annotations

import pytest

from deepseek_ray.training.schedule import learning_rate


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 0.25),  # a quarter of the warm-up of 4 steps
        (4, 1.0),  # the warm-up ends at the peak
        (9, 0.1 + 0.9 * 0.5),  # half-way between step 4 and step 14: cos(pi/2) = 0
        (14, 0.1),  # the last step is at the floor
        (20, 0.1),  # and stays there
    ],
)
def test_known_points(step: int, expected: float) -> None:
    assert learning_rate(step, total_steps=14, peak=1.0, warmup_steps=4, floor=0.1) == pytest.approx(expected)


def test_without_warmup_the_first_step_is_at_the_peak() -> None:
    assert learning_rate(1, total_steps=10, peak=3e-4, warmup_steps=0, floor=0.0) == pytest.approx(3e-4)


def test_never_rises_after_the_warmup() -> None:
    values = [learning_rate(step, 50, 1.0, 5, 0.1) for step in range(5, 51)]
    assert values == sorted(values, reverse=True)


def test_a_run_of_one_step_is_at_the_peak() -> None:
    assert learning_rate(1, total_steps=1, peak=2.0, warmup_steps=0, floor=0.1) == pytest.approx(2.0)
