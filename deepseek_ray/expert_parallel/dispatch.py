"""From chosen experts to one call per shard, and back to token order. Pure functions on tensors.

Letters: T tokens, K experts per token, N tokens of one call, P (token, expert) pairs of one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ShardCall:
    """What one shard computes for one MoE layer of one step."""

    shard: int
    token_rows: Tensor
    """[N] int64: rows of the layer's input that the shard needs, each once."""
    pair_rows: Tensor
    """[P] int32: which of the N rows a pair means."""
    pair_experts: Tensor
    """[P] int32: logical expert of a pair."""
    places: Tensor
    """[P] int64: where a pair's result goes in the flat `[T * K]` results."""


def plan_calls(expert_ids: Tensor, owners: Tensor, places: Tensor | None = None) -> list[ShardCall]:
    """One call per shard that owns any chosen expert, in shard order.

    expert_ids [T, K] int64; owners [experts] int64, the shard of each expert; `places` [n] int64 limits the plan to
    some of the flat pairs (a call planned anew under a newer table), all of them by default.
    """
    top_k = expert_ids.shape[1]
    flat = expert_ids.flatten()
    places = torch.arange(flat.numel()) if places is None else places
    shard_of_pair = owners[flat[places]]
    calls = []
    for shard in shard_of_pair.unique().tolist():
        mine = places[shard_of_pair == shard]
        token_rows, pair_rows = (mine // top_k).unique(return_inverse=True)
        calls.append(ShardCall(shard, token_rows, pair_rows.int(), flat[mine].int(), mine))
    return calls
