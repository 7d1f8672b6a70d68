"""From chosen experts to one call per shard, and back to token order. Pure functions on tensors.

They run once per layer and step, before anything is sent: in numpy, whose small operations cost a third of torch's.

Letters: T tokens, K experts per token, N tokens of one call, P (token, expert) pairs of one call.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

READING = 10
"""What reading an expert costs beside its tokens, for each byte of a weight; see `expert_cost`."""


def reading_cost(weight_bytes: float) -> int:
    """Of experts with so many bytes for a weight."""
    return round(READING * weight_bytes)


def expert_cost(tokens: int, reading: int) -> int:
    """How long an expert takes for some tokens, in quarters of what one of many takes.

    Few tokens take as long as the weights are read, and hardly longer for each more. Measured on two cores that read
    28 GB/s: 1.3, 1.5, 1.7, 2.6, 3.3 and 5 ms for 1, 3, 6, 8, 12 and 16 tokens of an expert of 17 MB.
    """
    return max(reading + tokens, 4 * tokens)


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
        self._replicas = replicas
        self._only = [shards[0] for shards in replicas]
        self.first = torch.tensor(self._only)
        """[experts] int64."""
        self._several = {expert: sorted(shards) for expert, shards in enumerate(replicas) if len(shards) > 1}
        self._shards = {shard for shards in replicas for shard in shards}
        self.starts = torch.tensor([0, *itertools.accumulate(map(len, replicas))])
        """[experts + 1] int64: where each expert's replicas begin in `shards`."""
        self.shards = torch.tensor([shard for shards in replicas for shard in sorted(shards)])
        """int64: the shards of every replica, expert after expert, ascending."""

    @property
    def is_given(self) -> bool:
        """Whether no expert has a choice."""
        return not self._several

    def choose(self, counts: Tensor, avoid: Collection[int] = (), reading: int = 2 * READING) -> Tensor:
        """[experts] int64: the shard to ask for each expert this time.

        counts: [experts] int64, tokens of each expert in this call; reading: see `expert_cost`. All tokens of an expert
        go to one replica, since two would both read its weights. Experts with several replicas are placed by cost,
        largest first, on the shard that has least to do so far (LPT); shards in `avoid` only where there is no other.
        """
        if self.is_given:
            return self.first
        costs = {expert: expert_cost(count, reading) for expert, count in enumerate(counts.tolist()) if count}
        work = dict.fromkeys(self._shards, 0)
        present = []
        for expert, cost in costs.items():
            if expert in self._several:
                present.append((-cost, expert))
            else:
                work[self._only[expert]] += cost
        chosen = list(self._only)
        for cost, expert in sorted(present):
            shards = self._several[expert]
            usable = [shard for shard in shards if shard not in avoid] if avoid else shards
            shard = min(usable or shards, key=work.__getitem__)
            work[shard] -= cost
            chosen[expert] = shard
        return torch.tensor(chosen)

    def has_other(self, expert_ids: Tensor, avoid: Collection[int]) -> Tensor:
        """[n] bool for expert_ids [n]: whether a replica of the expert is on a shard outside `avoid`."""
        return torch.tensor(
            [any(shard not in avoid for shard in self._replicas[expert]) for expert in expert_ids.tolist()],
            dtype=torch.bool,
        )


def plan_calls(expert_ids: Tensor, owners: Tensor, places: Tensor | None = None) -> list[ShardCall]:
    """One call per shard that is asked for any chosen expert, in shard order.

    expert_ids [T, K] int64; owners [experts] int64, the shard to ask for each expert; `places` [n] int64, ascending,
    limits the plan to some of the flat pairs (a call planned anew under a newer table), all of them by default.
    """
    top_k = expert_ids.shape[1]
    flat = expert_ids.numpy().reshape(-1)
    wanted = np.arange(flat.size) if places is None else places.numpy()
    shard_of_pair = owners.numpy()[flat[wanted]]
    calls = []
    for shard in np.unique(shard_of_pair).tolist():
        mine = wanted[shard_of_pair == shard]
        rows = mine // top_k
        is_new = np.concatenate([[True], rows[1:] != rows[:-1]])  # the pairs of a token are beside each other
        parts = (rows[is_new], (np.cumsum(is_new) - 1).astype(np.int32), flat[mine].astype(np.int32), mine)
        calls.append(ShardCall(shard, *(torch.from_numpy(part) for part in parts)))
    return calls
