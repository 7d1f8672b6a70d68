"""Collective operations with gradients, over one process group: what the parallel strategies are made of.

torch's own collectives know nothing of autograd. Each function here has the backward pass that makes the whole group
compute the gradient of one model, see "f" and "g" in Megatron-LM (arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_BUCKET_ELEMENTS = 8 * 1024 * 1024
"""Gradients that travel together: large enough for the network, small enough to be copied."""


def copy_to_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, equal on all ranks, as input of work that is divided among them; the gradients of their parts are summed."""
    return _Copy.apply(x, group)


def sum_over_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' parts, equal on all ranks; every part has the gradient of the sum."""
    return _Sum.apply(x, group)


def gather_columns(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[..., n] on each rank -> [..., n * ranks] on all, in rank order; each rank keeps the gradient of its columns."""
    return _GatherColumns.apply(x, group)


def exchange_rows(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows to and from every rank, in rank order: sent[r] of x's rows go to rank r, received[r] come from it.

    x: [sum(sent), ...] -> [sum(received), ...]; gradients travel back the same way. Counts may be zero.
    """
    return _ExchangeRows.apply(x, sent, received, group)


def sum_gradients(parameters: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace each gradient by its sum over the group (None: all workers); an absent one counts, and becomes, zero."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and sum(grad.numel() for grad in bucket) + parameter.numel() > _BUCKET_ELEMENTS:
            _sum_bucket(bucket, group)
            bucket = []
        bucket.append(parameter.grad)
    if bucket:
        _sum_bucket(bucket, group)


def _sum_bucket(grads: list[Tensor], group: dist.ProcessGroup | None) -> None:
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat, group=group)
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(total.view_as(grad))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduced(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.size = dist.get_rank(group), dist.get_world_size(group)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ctx.size)]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.size, dim=-1)[ctx.rank].contiguous(), None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(x, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _exchanged(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(arrived, x.contiguous(), received, sent, group=group)
    return arrived
