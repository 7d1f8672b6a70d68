"""Aux-loss-free balancing against a loop in plain Python, and what it does to an uneven gate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_ray.training.balance import Balancer, bias_after_step, max_violation
from deepseek_ray.training.ranks import Ranks


def slow_bias(bias: list[float], counts: list[int], speed: float) -> list[float]:
    mean = sum(counts) / len(counts)
    return [value + speed * ((mean > count) - (mean < count)) for value, count in zip(bias, counts, strict=True)]


def test_bias_moves_towards_even_load() -> None:
    # Mean load 4: the first expert is too busy, the second has just the mean, the others too little.
    bias = bias_after_step(torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([10, 4, 2, 0]), 0.001)
    torch.testing.assert_close(bias, torch.tensor([0.499, 0.5, 0.501, 0.501]))


def test_bias_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        bias = torch.randn(6, generator=generator)
        counts = torch.randint(0, 50, (6,), generator=generator)
        expected = slow_bias(bias.tolist(), counts.tolist(), 0.01)
        assert bias_after_step(bias, counts, 0.01).tolist() == pytest.approx(expected, abs=1e-6)


def test_max_violation_by_hand() -> None:
    counts = torch.tensor([[4, 4, 4, 4], [10, 2, 2, 2], [0, 0, 0, 0]])
    assert max_violation(counts).tolist() == [0.0, 1.5, 0.0]  # (10 - 4) / 4


class FixedLayer:
    """A layer whose counts are given."""

    def __init__(self, counts: list[int], has_bias: bool = True) -> None:
        self.counts = torch.tensor(counts)
        self.correction_bias: Tensor | None = torch.zeros(len(counts)) if has_bias else None

    def take_counts(self) -> Tensor:
        return self.counts


def test_every_layer_moves_by_its_own_counts() -> None:
    layers = [FixedLayer([3, 1]), FixedLayer([0, 4]), FixedLayer([4, 0], has_bias=False)]
    counts = Balancer(layers, 0.1, Ranks()).step()
    assert counts.tolist() == [[3, 1], [0, 4], [4, 0]]
    assert layers[0].correction_bias is not None
    assert layers[1].correction_bias is not None
    torch.testing.assert_close(layers[0].correction_bias, torch.tensor([-0.1, 0.1]))
    torch.testing.assert_close(layers[1].correction_bias, torch.tensor([0.1, -0.1]))


def test_speed_zero_leaves_the_bias_alone() -> None:
    layer = FixedLayer([3, 1])
    Balancer([layer], 0.0, Ranks()).step()
    assert layer.correction_bias is not None
    assert layer.correction_bias.tolist() == [0.0, 0.0]


def test_a_model_without_experts_has_nothing_to_balance() -> None:
    assert Balancer([], 0.1, Ranks()).step().shape == (0, 0)
