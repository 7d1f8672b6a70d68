"""Differentiable functions over the C++ operators of training (`kernels/training.py`).

Each stands for several of torch's own operators, which the module that uses it keeps: they compute where
`kernels.training.serves` says no. Derivatives of derivatives are not defined.

Letters: N rows, T tokens, K experts per token (slots), E routed experts, H hidden size, I width of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_ray.kernels import training as kernels


def run_experts(rows: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
    """rows [N, H] in expert order, gate_up [E, 2 I, H], down [E, H, I], counts [E] int64 -> [N, H]."""
    return _RunExperts.apply(rows, gate_up, down, counts)


def weighted_slots(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """rows [T K, H], places [T K] int64 of the (token, slot) pairs in it, weights [T, K] -> [T, H]."""
    return _WeightedSlots.apply(rows, places, weights)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., width], weight [width]."""
    return _RmsNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of equal shapes."""
    return _SwiGLU.apply(gate, up)


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [N, V]; targets [N] int64, negative where nothing is predicted. Scalar."""
    return _CrossEntropySum.apply(logits, targets)


def causal_attention(
    queries: Tensor,
    expanded: Tensor,
    k_rope: Tensor,
    rotation: tuple[Tensor, Tensor],
    interleaved: bool,
    scale: float,
    documents: Tensor | None = None,
) -> Tensor:
    """Multi-head latent attention of each sequence, over keys and values expanded per head, which are rotated here.

    queries: [B, S, heads, nope + rope]; expanded: [B, S, heads, nope + value], keys before values; k_rope:
    [B, S, rope], of all heads; rotation: cos and sin, [B or 1, S, rope / 2]; documents: [B, S] integers, a token sees
    those before it in its own, or None. Returns [B, S, heads, value].
    """
    return _CausalAttention.apply(queries, expanded, k_rope, *rotation, interleaved, scale, documents)


class _RunExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
        given = (rows.contiguous(), gate_up.contiguous(), down.contiguous(), counts.contiguous())
        out, projected = kernels.run_experts(*given)
        ctx.save_for_backward(*given, projected)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate_up, down, counts, projected = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        return *kernels.run_experts_backward(rows, gate_up, down, counts, projected, grad.contiguous(), wanted), None


class _WeightedSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        given = (rows.contiguous(), places, weights.contiguous())
        ctx.save_for_backward(*given)
        return kernels.gather_slots(*given, weights.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        rows, places, weights = ctx.saved_tensors
        of_rows, of_weights = kernels.gather_slots_backward(rows, places, weights, grad.contiguous())
        return of_rows, None, of_weights


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = _rows_of(x)
        out, scales = kernels.rms_norm(rows, weight, eps)
        ctx.save_for_backward(rows, weight, scales)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, scales = ctx.saved_tensors
        of_x, of_weight = kernels.rms_norm_backward(rows, weight, scales, grad.contiguous())
        return of_x.view(grad.shape), of_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return kernels.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return kernels.swiglu_backward(gate, up, grad.contiguous())


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.numel() and int(targets.max()) >= logits.shape[1]:
            raise IndexError(f"target {int(targets.max())} is out of bounds of {logits.shape[1]} logits")
        given = (logits.contiguous(), targets.contiguous())
        losses, logs = kernels.cross_entropy(*given)
        ctx.save_for_backward(*given, logs)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, logs = ctx.saved_tensors
        return kernels.cross_entropy_backward(logits, targets, logs, grad.item()), None


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        expanded: Tensor,
        k_rope: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        scale: float,
        documents: Tensor | None,
    ) -> Tensor:
        given = (queries, expanded, k_rope, cos, sin, None if documents is None else documents.long())
        inputs = tuple(None if own is None else own.contiguous() for own in given)
        nope = queries.shape[-1] - k_rope.shape[-1]
        ctx.shape = kernels.AttentionShape(queries, cos, expanded.shape[-1] - nope, interleaved, scale)
        out, logs = kernels.attention(inputs, ctx.shape)
        ctx.save_for_backward(*inputs, out, logs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, logs = ctx.saved_tensors
        grads = kernels.attention_backward(inputs, ctx.shape, out, logs, grad.contiguous())
        return *grads, None, None, None, None, None


def _rows_of(x: Tensor) -> Tensor:
    """[..., width] -> [rows, width], a view if its rows are equally far apart."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
