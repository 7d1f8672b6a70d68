"""The seam between a model and whoever computes its routed experts.

A backend takes rows in and gives rows back; what it runs on (this process, processes on this node, other nodes) is its
own business. Letters: T tokens, K experts per token (slots), H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor


class ExpertBackend(ABC):
    """Computes routed experts. `combine` may be called only once per ticket, in any order of tickets."""

    @abstractmethod
    def dispatch(self, layer: int, hidden: Tensor, expert_ids: Tensor) -> Any:
        """Start the work of one layer and return a ticket for `combine`.

        hidden: [T, H] in model dtype; expert_ids: [T, K] int64, ids of `layer`'s logical experts.
        """

    @abstractmethod
    def combine(self, ticket: Any) -> Tensor:
        """Wait for the rows of a ticket: [T, K, H] in model dtype, one unweighted row per (token, slot)."""


def combine_slots(rows: Tensor, weights: Tensor) -> Tensor:
    """Weigh and sum the slots of each token, in slot order, in float32.

    rows: [T, K, H] any float dtype; weights: [T, K] float32; returns [T, H] float32. Multiplication and addition are
    separate, element by element, so a token's bits depend on nothing but its own rows and weights, and every backend
    that uses this function gives the same ones.
    """
    slots = zip(rows.unbind(1), weights.unsqueeze(-1).unbind(1), strict=True)
    total = None
    for row, weight in slots:
        weighted = row.float() * weight
        total = weighted if total is None else total + weighted
    assert total is not None, "a token has at least one slot"
    return total
