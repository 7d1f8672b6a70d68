"""All routed experts of one layer in one module, for training: gather each expert's tokens, multiply, put them back.

Letters: T tokens, K experts per token, E routed experts, H hidden size, I width of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deepseek_ray.config.model import ModelConfig


class Experts(nn.Module):
    """E SwiGLU networks with stacked weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        """[E, 2 I, H]: gate projection above up projection."""
        self.down = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, hidden: Tensor, expert_ids: Tensor, counts: Tensor) -> Tensor:
        """hidden: [T, H]; expert_ids: [T, K] int64; counts: [E] int64, the tokens of each expert.

        Returns [T, K, H], one unweighted row per (token, slot). Python loops only over experts that have tokens.
        """
        order = expert_ids.flatten().argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        rows = _ToExperts.apply(hidden, order, place)
        # unbind, not indexing: its backward writes the stacked gradient once instead of once per expert.
        gate_up, down = self.gate_up.unbind(0), self.down.unbind(0)
        outputs = []
        for expert, own in enumerate(rows.split(counts.tolist())):
            if own.shape[0]:
                gate, up = F.linear(own, gate_up[expert]).chunk(2, dim=-1)
                outputs.append(F.linear(F.silu(gate) * up, down[expert]))
        return _FromExperts.apply(torch.cat(outputs), order, place).view(*expert_ids.shape, -1)


class _ToExperts(torch.autograd.Function):
    """[T, H] -> [T K, H] in expert order. `order` lists (token, slot) pairs by expert, `place` is its inverse.

    torch's own backward of a gather adds rows one by one; here every (token, slot) has one place, so it is a gather
    too, in a fixed order on any device.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.tokens = hidden.shape[0]
        return hidden.index_select(0, order // (order.numel() // hidden.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place).view(ctx.tokens, -1, grad.shape[-1]).sum(1), None, None


class _FromExperts(torch.autograd.Function):
    """[T K, H] in expert order -> [T K, H] in (token, slot) order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None, None
