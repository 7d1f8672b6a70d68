"""The grouped product against a loop over experts with torch's own operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deepseek_ray.nn.experts import grouped_linear

SIZES = [[3, 0, 5, 1], [0, 0, 9, 0], [1, 2, 3, 4], [0, 0, 0, 0]]
"""Rows of each of four experts."""


def inputs(sizes: list[int], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(sizes), 6, generator=generator, dtype=dtype, requires_grad=True)
    return rows, torch.randn(len(sizes), 5, 6, generator=generator, dtype=dtype, requires_grad=True)


def slow(rows: torch.Tensor, weights: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    parts = [F.linear(own, weight) for own, weight in zip(rows.split(sizes), weights, strict=True)]
    return torch.cat(parts)


@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_a_product_for_each_expert_and_so_are_its_gradients(sizes: list[int]) -> None:
    results = []
    for way in (grouped_linear, slow):
        rows, weights = inputs(sizes)
        out = way(rows, weights, sizes)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        results.append((out, rows.grad, weights.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("sizes", SIZES[:3])
def test_gradients_are_those_of_finite_differences(sizes: list[int]) -> None:
    assert torch.autograd.gradcheck(lambda *given: grouped_linear(*given, sizes), inputs(sizes, torch.float64))


def test_what_is_frozen_gets_no_gradient() -> None:
    for frozen in range(2):
        given = inputs(SIZES[0])
        given[frozen].requires_grad_(False)
        grouped_linear(*given, SIZES[0]).sum().backward()
        assert given[frozen].grad is None
        assert given[1 - frozen].grad is not None


def test_autocast_is_that_of_linear() -> None:
    rows, weights = inputs(SIZES[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, expected = grouped_linear(rows, weights, SIZES[0]), slow(rows, weights, SIZES[0])
    assert ours.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected)
    ours.sum().backward()
    assert weights.grad is not None
    assert weights.grad.dtype == torch.float32
