"""Training losses: next-token cross-entropy inside documents, and DeepSeek-V3's sequence-wise balance loss.

Letters: B sequences, S input tokens per sequence, V vocabulary, E routed experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from deepseek_ray.kernels.training import serves
from deepseek_ray.nn import fused

IGNORED_TARGET = -100
"""Target of a position that predicts nothing; torch's cross-entropy leaves it out."""


def next_tokens(tokens: Tensor, document_ids: Tensor, ahead: int = 1, loss_mask: Tensor | None = None) -> Tensor:
    """The token that each input position predicts: the one `ahead` places further in the same document.

    tokens: [B, S + 1] int64 and document_ids: [B, S + 1], a sample as the loader gives it: the first S tokens are the
    input. loss_mask: [B, S + 1] bool, True where a token is to be predicted; None: everywhere. Returns [B, S] int64,
    with IGNORED_TARGET where that token lies in another document, beyond the sample, or is not to be predicted.
    Documents are contiguous, so equal ids at both ends mean equal ids between them.
    """
    targets = torch.full_like(tokens[:, 1:], IGNORED_TARGET)
    inside = document_ids[:, ahead:] == document_ids[:, :-ahead]
    if loss_mask is not None:
        inside = inside & loss_mask[:, ahead:]
    targets[:, : inside.shape[1]] = torch.where(inside, tokens[:, ahead:], IGNORED_TARGET)
    return targets


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over the predicted positions of -ln p(target), float32 scalar.

    A sum, not a mean: the caller divides by the number of predicted tokens of the whole optimiser step, so the gradient
    does not depend on how tokens are spread over micro-batches and ranks. logits: [B, S, V]; targets: [B, S].
    """
    rows = logits.flatten(0, -2).float()
    if serves(rows):
        return fused.cross_entropy_sum(rows, targets.flatten())
    return functional.cross_entropy(rows, targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")


def sequence_balance_loss(scores: Tensor, expert_ids: Tensor) -> Tensor:
    """Mean over the sequences of sum_i f_i P_i (arXiv 2412.19437, section 2.1.2, without the factor alpha).

    scores: [B, S, E] affinities before the correction bias (sigmoid or softmax output), with gradient.
    expert_ids: [B, S, K] int64. f_i = E / (K S) * (tokens of the sequence that chose expert i); P_i is the mean over
    the sequence of s_i / sum_j s_j. Perfect balance gives 1. Returns a float32 scalar.
    """
    num_sequences, length, num_experts = scores.shape
    top_k = expert_ids.shape[-1]
    scores = scores.float()
    probability = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=1)
    chosen = torch.zeros(num_sequences, num_experts, dtype=torch.float32, device=scores.device)
    chosen.scatter_add_(1, expert_ids.flatten(1), torch.ones_like(expert_ids, dtype=torch.float32).flatten(1))
    fraction = chosen * (num_experts / (top_k * length))
    return (fraction * probability).sum(dim=1).mean()
