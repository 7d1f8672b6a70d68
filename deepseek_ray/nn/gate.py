"""The gate: which experts compute a token, and with what weight.

Three gates: softmax with the best experts overall (V2-Lite), softmax with the best experts of the best groups (V2), and
sigmoid scores with a correction bias that steers the choice but not the weights (V3, arXiv 2412.19437, section 2.1.2).
All of it is float32. Letters: T tokens, E routed experts, G groups, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.kernels.base import Choice


class GateOutput(NamedTuple):
    """What a gate decided for T tokens."""

    scores: Tensor
    """[T, E] float32: sigmoid or softmax of the gate's logits, without the correction bias."""
    expert_ids: Tensor
    """[T, K] int64, best first."""
    weights: Tensor
    """[T, K] float32."""


def gate_scores(logits: Tensor, config: ModelConfig) -> Tensor:
    """Scores [T, E] of float32 logits [T, E]."""
    return logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(dim=-1)


def choose_experts(scores: Tensor, bias: Tensor | None, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights.

    scores: [T, E] float32; bias: [E] float32, given with topk_method "noaux_tc" only.
    Returns expert_ids [T, K] int64, best first, and weights [T, K] float32, differentiable in `scores`. A row of both
    depends on nothing but its own row of `scores`.
    """
    with torch.no_grad():
        wanted = scores if bias is None else scores + bias
        if config.topk_method != "greedy":
            wanted = _within_best_groups(wanted, config)
        expert_ids = wanted.topk(config.num_experts_per_tok, dim=-1).indices
    weights = scores.gather(-1, expert_ids)
    if config.norm_topk_prob and config.scoring_func == "sigmoid":
        weights = weights / (_sum_in_order(weights) + 1e-20)
    return expert_ids, weights * config.routed_scaling_factor


def choice_of(config: ModelConfig) -> Choice:
    """What `choose_experts` does, in numbers."""
    return Choice(
        top_k=config.num_experts_per_tok,
        num_groups=config.n_group,
        best_groups=0 if config.topk_method == "greedy" else config.topk_group,
        two_best=config.topk_method == "noaux_tc",
        is_normalised=config.norm_topk_prob and config.scoring_func == "sigmoid",
        factor=config.routed_scaling_factor,
    )


def select_experts(logits: Tensor, bias: Tensor | None, config: ModelConfig) -> GateOutput:
    """Score and choose from the gate's float32 logits [T, E]; see `gate_scores` and `choose_experts`."""
    scores = gate_scores(logits, config)
    return GateOutput(scores, *choose_experts(scores, bias, config))


class Gate(nn.Module):
    """A linear layer in float32, whatever the model's dtype or autocast, and the choice of experts."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        corrected = config.topk_method == "noaux_tc"
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if corrected else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, hidden: Tensor) -> GateOutput:
        """hidden: [T, hidden_size]."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden.float(), self.weight.float())
            return select_experts(logits, self.e_score_correction_bias, self.config)


def _within_best_groups(wanted: Tensor, config: ModelConfig) -> Tensor:
    """`wanted` [T, E] with -inf for experts outside the token's `topk_group` best groups.

    A group is as good as its two best experts together (noaux_tc) or as its best one (group_limited_greedy).
    """
    groups = wanted.unflatten(-1, (config.n_group, -1))  # [T, G, E / G]
    if config.topk_method == "noaux_tc":
        group_scores = groups.topk(2, dim=-1).values.sum(dim=-1)
    else:
        group_scores = groups.amax(dim=-1)
    best = group_scores.topk(config.topk_group, dim=-1).indices
    outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, best, False)
    return groups.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(-2)


def _sum_in_order(weights: Tensor) -> Tensor:
    """[T, K] -> [T, 1], slot after slot: a sum whose order does not depend on how many rows there are."""
    first, *rest = weights.unbind(-1)
    for weight in rest:
        first = first + weight
    return first.unsqueeze(-1)
