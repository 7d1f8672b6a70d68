"""From chosen experts to one call per shard, and back to token order. Pure functions on tensors.

Letters: T tokens, K experts per token, N tokens of one call, P (token, expert) pairs of one call.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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


class LayerRoutes:
    """The replicas of one layer's experts, ready for choosing among them."""

    def __init__(self, replicas: Sequence[tuple[int, ...]]) -> None:
        """replicas: for each logical expert, the shards that hold it."""
        self.first = torch.tensor([shards[0] for shards in replicas])
        """[experts] int64."""
        self._several = {expert: shards for expert, shards in enumerate(replicas) if len(shards) > 1}

    def choose(self, counts: Tensor, avoid: Collection[int] = ()) -> Tensor:
        """[experts] int64: the shard to ask for each expert this time.

        counts: [experts] int64, tokens of each expert in this call. All tokens of an expert go to one replica, since
        two would both read its weights. Experts with several replicas are placed by size, largest first, on the shard
        that has least to do so far (LPT); shards in `avoid` only where there is no other.
        """
        present = [expert for expert in self._several if counts[expert]]
        if not present:
            return self.first
        chosen = self.first.clone()
        tokens = {expert: int(counts[expert]) for expert in present}
        fixed = counts.clone()
        fixed[present] = 0
        work = dict(enumerate(self.first.bincount(fixed.double()).tolist()))
        for expert in sorted(present, key=lambda expert: (-tokens[expert], expert)):
            shards = self._several[expert]
            usable = [shard for shard in shards if shard not in avoid] or shards
            shard = min(usable, key=lambda shard: (work.get(shard, 0.0), shard))
            work[shard] = work.get(shard, 0.0) + tokens[expert]
            chosen[expert] = shard
        return chosen

    def has_other(self, expert_ids: Tensor, avoid: Collection[int]) -> Tensor:
        """[n] bool for expert_ids [n]: whether a replica of the expert is on a shard outside `avoid`."""
        return torch.tensor(
            [any(shard not in avoid for shard in self._several.get(expert, ())) for expert in expert_ids.tolist()],
            dtype=torch.bool,
        )


def plan_calls(expert_ids: Tensor, owners: Tensor, places: Tensor | None = None) -> list[ShardCall]:
    """One call per shard that is asked for any chosen expert, in shard order.

    expert_ids [T, K] int64; owners [experts] int64, the shard to ask for each expert; `places` [n] int64 limits the
    plan to some of the flat pairs (a call planned anew under a newer table), all of them by default.
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
