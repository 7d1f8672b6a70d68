"""The choice of a token's experts, one program per token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_ray.kernels.base import Choice


def choose_experts(scores: Tensor, bias: Tensor | None, choice: Choice) -> tuple[Tensor, Tensor]:
    """See `nn/gate.choose_experts`; among equals the lowest id."""
    tokens, num_experts = scores.shape
    ids = torch.empty(tokens, choice.top_k, dtype=torch.int64, device=scores.device)
    weights = torch.empty(tokens, choice.top_k, dtype=torch.float32, device=scores.device)
    if tokens:
        _choose_experts[(tokens,)](
            scores.contiguous(),
            scores if bias is None else bias,
            ids,
            weights,
            num_experts,
            choice.factor,
            HAS_BIAS=bias is not None,
            TOP_K=choice.top_k,
            NUM_GROUPS=choice.num_groups,
            BEST_GROUPS=choice.best_groups,
            TWO_BEST=choice.two_best,
            IS_NORMALISED=choice.is_normalised,
            EXPERTS=triton.next_power_of_2(num_experts),
            GROUPS=triton.next_power_of_2(choice.num_groups),
            SLOTS=triton.next_power_of_2(choice.top_k),
            num_warps=1,
        )
    return ids, weights


@triton.jit
def _choose_experts(
    scores,
    bias,
    ids,
    weights,
    num_experts,
    factor,
    HAS_BIAS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BEST_GROUPS: tl.constexpr,
    TWO_BEST: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Whatever the scores, NaN too, the ids of a token differ: what was taken is below what is not."""
    LEAST, TAKEN = -3.0e38, float("-inf")
    token, experts = tl.program_id(0), tl.arange(0, EXPERTS)
    is_expert = experts < num_experts
    score = tl.load(scores + token * num_experts + experts, mask=is_expert, other=0.0)
    wanted = score
    if HAS_BIAS:
        wanted += tl.load(bias + experts, mask=is_expert, other=0.0)
    wanted = tl.where((wanted > LEAST) & is_expert, wanted, LEAST)
    if BEST_GROUPS > 0:
        groups, group_of = tl.arange(0, GROUPS), experts // (num_experts // NUM_GROUPS)
        group_scores = tl.full((GROUPS,), TAKEN, dtype=tl.float32)
        for group in tl.static_range(NUM_GROUPS):
            members = tl.where(is_expert & (group_of == group), wanted, TAKEN)
            best = tl.max(members, 0)
            if TWO_BEST:
                best += tl.max(tl.where(experts == tl.argmax(members, 0), TAKEN, members), 0)
            group_scores = tl.where(groups == group, tl.maximum(best, LEAST), group_scores)
        is_inside = experts < 0
        for _ in tl.static_range(BEST_GROUPS):
            chosen = tl.argmax(group_scores, 0)
            is_inside = is_inside | (group_of == chosen)
            group_scores = tl.where(groups == chosen, TAKEN, group_scores)
        wanted = tl.where(is_inside, wanted, LEAST)
    wanted = tl.where(is_expert, wanted, TAKEN)
    slots, total = tl.arange(0, SLOTS), 0.0
    best_ids, best_scores = tl.zeros((SLOTS,), dtype=tl.int64), tl.zeros((SLOTS,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        best_id = tl.argmax(wanted, 0)
        own = tl.sum(tl.where(experts == best_id, score, 0.0), 0)
        wanted = tl.where(experts == best_id, TAKEN, wanted)
        total += own
        best_ids = tl.where(slots == slot, best_id.to(tl.int64), best_ids)
        best_scores = tl.where(slots == slot, own, best_scores)
    if IS_NORMALISED:
        best_scores = best_scores / (total + 1e-20)
    tl.store(ids + token * TOP_K + slots, best_ids, mask=slots < TOP_K)
    tl.store(weights + token * TOP_K + slots, best_scores * factor, mask=slots < TOP_K)
