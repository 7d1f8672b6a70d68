"""All routed experts of one layer in one module, for training: gather each expert's tokens, multiply, put them back.

Letters: T tokens, K experts per token, E routed experts, H hidden size, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterable
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

        Returns [T, K, H], one unweighted row per (token, slot).
        """
        order = expert_ids.flatten().argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        rows = self.compute(_ToExperts.apply(hidden, order, place, expert_ids.shape[1]), counts)
        return _FromExperts.apply(rows, order, place).view(*expert_ids.shape, hidden.shape[1])

    def compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows: [N, H] in expert order; counts: [E] int64, the rows of each expert. Returns [N, H] in the same order.

        Python loops only over experts that have rows. Without any row every expert multiplies nothing, so that the
        weights have a gradient (zero) then too.
        """
        outputs = []
        for own, weights in zip(rows.split(counts.tolist()), self.per_expert(), strict=True):
            if own.shape[0] or not rows.shape[0]:
                outputs.append(self.compute_one(own, *weights))
        return torch.cat(outputs)

    def per_expert(self) -> Iterable[tuple[Tensor, ...]]:
        """What `compute_one` needs of each expert, in order.

        unbind, not indexing: its backward writes the stacked gradient once instead of once per expert.
        """
        return zip(self.gate_up.unbind(0), self.down.unbind(0), strict=True)

    def compute_one(self, rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """One expert over its rows: [R, H] -> [R, H]."""
        gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down)


class _ToExperts(torch.autograd.Function):
    """[T, H] -> [T K, H] in expert order. `order` lists (token, slot) pairs by expert, `place` is its inverse.

    torch's own backward of a gather adds rows one by one; here every (token, slot) has one place, so it is a gather
    too, in a fixed order on any device.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, place: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.shape = (hidden.shape[0], slots, hidden.shape[1])
        return hidden.index_select(0, order // slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place).view(ctx.shape).sum(1), None, None, None


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
