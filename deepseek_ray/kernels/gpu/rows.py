"""Operators on rows, each element of which is read once: their time is that of the launch and of the bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `Kernels.rms_norm`; the rows of x may lie further apart than they are long."""
    assert x.stride(-1) == 1 and weight.dtype == torch.float32
    tokens, width = x.shape
    out = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
    if tokens:
        _rms_norm[(tokens,)](x, x.stride(0), weight, out, width, eps, WIDTH=triton.next_power_of_2(width))
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `Kernels.silu_mul`."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        _silu_mul[(tokens, triton.cdiv(width, _COLUMNS))](gate_up.contiguous(), out, width, COLUMNS=_COLUMNS)
    return out


def combine_slots(rows: Tensor, weights: Tensor) -> Tensor:
    """See `Kernels.combine_slots`."""
    tokens, slots, width = rows.shape
    out = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    if tokens:
        grid = (tokens, triton.cdiv(width, _COLUMNS))
        _combine_slots[grid](rows.contiguous(), weights.contiguous(), out, width, SLOTS=slots, COLUMNS=_COLUMNS)
    return out


@triton.jit
def normalised(x, weight, eps, width):
    """RMSNorm of x [n] float32, whose elements from `width` on are 0."""
    return x * tl.rsqrt(tl.sum(x * x, 0) / width + eps) * weight


@triton.jit
def _rms_norm(x, stride, weight, out, width, eps, WIDTH: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    is_column = columns < width
    own = tl.load(x + row * stride + columns, mask=is_column, other=0.0).to(tl.float32)
    result = normalised(own, tl.load(weight + columns, mask=is_column, other=0.0), eps, width)
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _silu_mul(gate_up, out, width, COLUMNS: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=is_column, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _combine_slots(rows, weights, out, width, SLOTS: tl.constexpr, COLUMNS: tl.constexpr):
    token, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < width
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for slot in tl.static_range(SLOTS):
        own = tl.load(rows + (token * SLOTS + slot) * width + columns, mask=is_column, other=0.0).to(tl.float32)
        total += own * tl.load(weights + token * SLOTS + slot)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=is_column)
