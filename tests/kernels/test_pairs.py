"""Pairs in C++ against torch and numpy: the same bits, for every shape and for what is not finite."""

from __future__ import annotations

import random as random_module

import pytest
import torch

from deepseek_ray.expert_parallel.dispatch import LayerRoutes, ShardCall
from deepseek_ray.kernels.pairs import NativePairs, Pairs
from tests.kernels.cases import DTYPES, random


@pytest.fixture(scope="module")
def native() -> NativePairs:
    return NativePairs()


def chosen(tokens: int, top_k: int, experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    parts = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]
    return torch.stack(parts) if parts else torch.empty(0, top_k, dtype=torch.int64)


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(0, 2, 4), (1, 1, 4), (1, 8, 8), (9, 3, 8), (200, 6, 64)])
@pytest.mark.parametrize("shards", [[0], [3, 7], [5, 0, 11, 2]])
@pytest.mark.parametrize("part", [None, 3])
def test_the_plan_is_that_of_the_reference(
    native: NativePairs, tokens: int, top_k: int, experts: int, shards: list[int], part: int | None
) -> None:
    ids = chosen(tokens, top_k, experts)
    owners = torch.tensor([shards[expert % len(shards)] for expert in range(experts)])
    places = None if part is None else torch.arange(0, ids.numel(), part)
    assert_same_calls(native.plan(ids, owners, places), Pairs().plan(ids, owners, places))


def assert_same_calls(calls: list[ShardCall], expected: list[ShardCall]) -> None:
    assert [call.shard for call in calls] == [call.shard for call in expected]
    for call, other in zip(calls, expected, strict=True):
        for name in ("token_rows", "pair_rows", "pair_experts", "places"):
            mine, theirs = getattr(call, name), getattr(other, name)
            assert mine.dtype == theirs.dtype, name
            assert mine.tolist() == theirs.tolist(), name


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("avoid", [set(), {4}, {1, 9}, {1, 4, 9}])
def test_the_choice_is_that_of_the_reference(native: NativePairs, seed: int, avoid: set[int]) -> None:
    choose = random_module.Random(seed)
    replicas = [tuple(choose.sample([9, 4, 1, 6], choose.choice([1, 2, 2, 3]))) for _ in range(30)]
    routes = LayerRoutes(replicas)
    counts = torch.tensor([choose.choice([0, 0, 1, 1, 5, 30]) for _ in range(30)])
    for reading in (0, 5, 20):
        assert native.choose(routes, counts, avoid, reading).tolist() == routes.choose(counts, avoid, reading).tolist()


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("avoid", [set(), {2}])
def test_a_step_is_divided_as_by_the_reference(native: NativePairs, replicas: int, avoid: set[int]) -> None:
    routes = LayerRoutes([tuple(sorted({expert % 3, (expert + replicas - 1) % 3})) for expert in range(16)])
    for tokens in (0, 1, 40):
        ids = chosen(tokens, 4, 16)
        (expected_counts, expected), (counts, calls) = (
            pairs.divide(ids, routes, avoid, 20) for pairs in (Pairs(), native)
        )
        assert counts.tolist() == expected_counts.tolist()
        assert_same_calls(calls, expected)


def test_without_a_choice_there_is_none(native: NativePairs) -> None:
    routes = LayerRoutes([(3,), (1,)])
    assert native.choose(routes, torch.tensor([0, 2]), {1}, 20) is routes.first


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("width", [1, 16, 37, 64])
def test_rows_are_picked_and_put_back(native: NativePairs, dtype: torch.dtype, width: int) -> None:
    x = random(9, 2 * width, dtype=dtype)[:, :width]
    rows = torch.tensor([8, 0, 3, 3])
    picked = native.pick(x, rows)
    assert torch.equal(picked, x[rows])
    assert picked.is_contiguous()
    mine, theirs = torch.zeros(9, width, dtype=dtype), torch.zeros(9, width, dtype=dtype)
    places = torch.tensor([1, 8, 2, 0])
    assert native.put(picked, places, mine) and Pairs().put(picked, places, theirs)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 15, 16, 36])
def test_what_is_not_finite_is_seen(native: NativePairs, dtype: torch.dtype, value: float, column: int) -> None:
    rows = torch.full((3, 37), torch.finfo(dtype).max, dtype=dtype)  # large, and their sum is not finite
    to = torch.zeros(3, 37, dtype=dtype)
    places = torch.arange(3)
    assert native.put(rows, places, to)
    rows[1, column] = value
    assert not native.put(rows, places, to)
    assert not Pairs().put(rows, places, to)
    assert torch.equal(to.isfinite(), rows.isfinite()), "they are put all the same"
