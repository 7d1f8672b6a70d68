"""Mixture of experts: the layer as training runs it, and the seam to whoever computes the routed experts in serving.

A backend takes rows in and gives rows back; what it runs on (this process, processes on this node, other nodes) is its
own business. Letters: T tokens, K experts per token (slots), E routed experts, H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.kernels.base import Kernels
from deepseek_ray.nn.experts import Experts
from deepseek_ray.nn.gate import Gate, GateOutput
from deepseek_ray.nn.mlp import MLP
from deepseek_ray.nn.recompute import is_recomputing


class ExpertBackend(ABC):
    """Computes routed experts. `combine` may be called only once per ticket, in any order of tickets."""

    device: torch.device = torch.device("cpu")
    """Where `dispatch` wants its tensors and `combine` leaves its own."""

    @abstractmethod
    def dispatch(self, layer: int, hidden: Tensor, expert_ids: Tensor, first_row: int = 0) -> Any:
        """Start the work of one layer and return a ticket for `combine`.

        hidden: [T, H] in model dtype; expert_ids: [T, K] int64, ids of `layer`'s logical experts; first_row: place of
        the first of the rows in the step's batch, for errors that name one.
        """

    def table(self, layer: int, kernels: Kernels) -> Any | None:
        """What an operator of `kernels` finds all experts of a layer with (`Kernels.expert_table`), where they are in
        this process and computed with those: then nobody dispatches them."""
        return None

    def uses_our_cores(self, ticket: Any) -> bool:
        """Whether a ticket's experts are computed on this machine's cores: what is computed beside them takes the time
        from them, and everybody waits for the last."""
        return False

    @abstractmethod
    def combine(self, ticket: Any) -> Tensor:
        """Wait for the rows of a ticket: [T, K, H] in model dtype, one unweighted row per (token, slot)."""


class MoE(nn.Module):
    """Gate, routed experts and shared experts of one layer, all on one device."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config.hidden_size, width) if width else None
        self._counts: Tensor | None = None

    @property
    def correction_bias(self) -> Tensor | None:
        """[E] float32, changed in place by balancing; None for gates that have no such bias."""
        return self.gate.e_score_correction_bias

    def forward(self, hidden: Tensor) -> tuple[Tensor, GateOutput]:
        """hidden: [..., H] -> the same shape, and what the gate decided with the same leading dimensions."""
        tokens = hidden.flatten(0, -2)
        chosen = self.gate(tokens)
        counts = chosen.expert_ids.flatten().bincount(minlength=self.gate.config.n_routed_experts)
        self._record(counts)
        output = self.experts(tokens, chosen.expert_ids, chosen.weights, counts).to(hidden.dtype).view_as(hidden)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden)
        return output, GateOutput(*(part.unflatten(0, hidden.shape[:-1]) for part in chosen))

    def take_counts(self) -> Tensor:
        """[E] int64: tokens sent to each expert by training forwards since the last call; starts again from zero.

        Forwards in eval mode do not count, nor do those that activation checkpointing repeats.
        """
        counts, self._counts = self._counts, None
        if counts is not None:
            return counts
        return torch.zeros(self.gate.config.n_routed_experts, dtype=torch.int64, device=self.gate.weight.device)

    def _record(self, counts: Tensor) -> None:
        if self.training and not is_recomputing():
            self._counts = counts if self._counts is None else self._counts + counts
