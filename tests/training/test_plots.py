"""The pictures of a run are real PNG files with something in them."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image

from deepseek_ray.training.plots import plot_expert_heat_map, plot_loss_curve, relative_load, tokens_seen

METRICS = [
    {"step": 1, "tokens": 10, "loss": 3.0},
    {"step": 2, "tokens": 10, "loss": 2.0, "validation_loss": 2.5},
]


def test_relative_load_is_one_for_an_even_share() -> None:
    assert relative_load([[5, 5], [0, 4], [0, 0]]) == [[1.0, 1.0], [0.0, 2.0], [0.0, 0.0]]


def test_tokens_add_up() -> None:
    assert tokens_seen(METRICS) == [10, 20]


def test_both_pictures_are_drawn(tmp_path: Path) -> None:
    plot_loss_curve(METRICS, tmp_path / "loss.png", {"bigram": 2.8})
    plot_expert_heat_map([[3, 1], [2, 2]], [1, 2], tmp_path / "experts.png")
    for name in ("loss.png", "experts.png"):
        pixels = matplotlib.image.imread(tmp_path / name)
        assert pixels.shape[0] > 100
        assert pixels.std() > 0.05
