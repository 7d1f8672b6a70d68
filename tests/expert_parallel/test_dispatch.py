"""Dispatch plans: every pair exactly once, tokens sent once per shard, results back in place."""

from __future__ import annotations

import pytest
import torch

from deepseek_ray.errors import DeploymentError
from deepseek_ray.expert_parallel.dispatch import LayerRoutes, expert_cost, plan_calls, reading_cost
from deepseek_ray.expert_parallel.placement import contiguous_placement, experts_of_shard


def test_a_plan_by_hand() -> None:
    # Experts 0,1 on shard 0, experts 2,3 on shard 1. Token 0 wants 3 and 1, token 1 wants 0 and 1.
    calls = plan_calls(torch.tensor([[3, 1], [0, 1]]), torch.tensor([0, 0, 1, 1]))
    assert [call.shard for call in calls] == [0, 1]
    assert calls[0].token_rows.tolist() == [0, 1]
    assert calls[0].pair_rows.tolist() == [0, 1, 1]
    assert calls[0].pair_experts.tolist() == [1, 0, 1]
    assert calls[0].places.tolist() == [1, 2, 3]
    assert calls[1].token_rows.tolist() == [0]
    assert calls[1].pair_experts.tolist() == [3]


@pytest.mark.parametrize(("tokens", "top_k", "experts", "shards"), [(1, 1, 4, 4), (17, 3, 8, 3), (64, 6, 16, 2)])
def test_every_pair_reaches_the_owner_of_its_expert_once(tokens: int, top_k: int, experts: int, shards: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    owners = LayerRoutes(contiguous_placement([0], experts, range(shards))[0]).first
    seen = torch.zeros(tokens * top_k, dtype=torch.int64)
    for call in plan_calls(ids, owners):
        assert call.token_rows.unique().numel() == call.token_rows.numel()
        for row, expert, place in zip(call.pair_rows, call.pair_experts, call.places, strict=True):
            assert owners[expert] == call.shard
            assert divmod(int(place), top_k)[0] == int(call.token_rows[row])
            assert ids.flatten()[place] == expert
        seen[call.places] += 1
    assert seen.eq(1).all()


def test_no_tokens_no_calls() -> None:
    assert plan_calls(torch.empty(0, 2, dtype=torch.int64), torch.tensor([0, 1])) == []


def test_a_plan_for_some_pairs_only() -> None:
    (call,) = plan_calls(torch.tensor([[0, 1], [2, 3]]), torch.tensor([1, 0, 1, 1]), places=torch.tensor([2, 3]))
    assert (call.shard, call.token_rows.tolist(), call.places.tolist()) == (1, [1], [2, 3])


def test_contiguous_placement_covers_all_experts() -> None:
    placement = contiguous_placement([1, 2], num_experts=7, shards=[0, 1, 5])
    assert placement[1] == [(0,), (0,), (0,), (1,), (1,), (5,), (5,)]
    assert experts_of_shard(placement, 1) == {1: [3, 4], 2: [3, 4]}
    assert experts_of_shard({1: [(0, 2), (1,)], 2: [(0,), (1,)]}, 2) == {1: [0]}


def test_more_shards_than_experts_is_refused() -> None:
    with pytest.raises(DeploymentError, match=r"5 expert shards for 4 routed experts.*at most 4"):
        contiguous_placement([0], num_experts=4, shards=range(5))


def test_replicas_share_the_experts_of_a_call_by_size() -> None:
    # Expert 0 is on shard 0 alone with 5 tokens, which cost 20. Experts 1, 2, 3 are on both shards with 4, 3 and 2,
    # which cost 16, 12 and 10 (reading is 8). Largest first: 1 -> shard 1 (0 < 20), 2 -> shard 1 (16 < 20),
    # 3 -> shard 0 (20 < 28). Expert 4 has no tokens: its first replica.
    routes = LayerRoutes([(0,), (0, 1), (0, 1), (0, 1), (0, 1)])
    assert routes.choose(torch.tensor([5, 4, 3, 2, 0]), reading=8).tolist() == [0, 1, 1, 0, 0]


def test_few_tokens_cost_what_reading_the_weights_does() -> None:
    """The more bytes a weight has, the more tokens it takes until their products take longer."""
    assert [expert_cost(tokens, reading_cost(2.0)) for tokens in (1, 6, 7, 8, 16)] == [21, 26, 28, 32, 64]
    assert [expert_cost(tokens, reading_cost(0.53)) for tokens in (1, 2, 16)] == [6, 8, 64]
    # One expert with 6 tokens takes as long as one with a single token and a bit, so 3 and 3 of them are a fair share.
    routes = LayerRoutes([(0, 1)] * 6)
    assert sorted(routes.choose(torch.tensor([6, 6, 1, 1, 1, 1])).tolist()) == [0, 0, 0, 1, 1, 1]


def test_a_shard_is_avoided_where_another_has_the_expert() -> None:
    routes = LayerRoutes([(0,), (0, 1), (0, 2)])
    counts = torch.tensor([1, 1, 1])
    assert routes.choose(counts, avoid={0}).tolist() == [0, 1, 2], "expert 0 is nowhere else"
    assert routes.choose(counts, avoid={0, 1, 2}).tolist()[0] == 0
    assert routes.has_other(torch.tensor([0, 1, 2, 1]), avoid={0}).tolist() == [False, True, True, True]
    assert routes.has_other(torch.tensor([1, 2]), avoid={0, 1}).tolist() == [False, True]
    assert routes.has_other(torch.tensor([0]), avoid={2}).tolist() == [True], "it has moved there"


def test_single_replicas_need_no_choice() -> None:
    routes = LayerRoutes([(0,), (1,)])
    assert routes.choose(torch.tensor([3, 4])) is routes.first
