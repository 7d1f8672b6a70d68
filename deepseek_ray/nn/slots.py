"""The rows of (token, slot) pairs: in the order of the experts that compute them, and summed again over the slots.

Letters: T tokens, K experts per token (slots), H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_ray.kernels.training import gather_slots, serves
from deepseek_ray.nn import fused


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


class SlotOrder:
    """Where the (token, slot) pairs of a layer are once they lie by expert."""

    def __init__(self, expert_ids: Tensor) -> None:
        """expert_ids: [T, K] int64."""
        self._slots = expert_ids.shape[1]
        self._order = expert_ids.flatten().argsort(stable=True)
        numbers = torch.arange(self._order.numel(), device=expert_ids.device)
        self._place = torch.empty_like(self._order).scatter_(0, self._order, numbers)

    def to_experts(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T K, H], each token's row once for each of its experts, by expert."""
        return _ToExperts.apply(hidden, self._order, self._place, self._slots)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Rows [T K, H] by expert and weights [T, K] float32 -> [T, H] float32, as `combine_slots`."""
        if serves(rows, weights):
            return fused.weighted_slots(rows, self._place, weights)
        by_token = _FromExperts.apply(rows, self._order, self._place)
        return combine_slots(by_token.view(*weights.shape, -1), weights)


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
        if serves(grad):
            return gather_slots(grad.contiguous(), place, None, ctx.shape[1]), None, None, None
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
