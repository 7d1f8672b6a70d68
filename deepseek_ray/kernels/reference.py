"""Plain torch, one row at a time: the slow obvious version, and the fallback where no compiler is at hand.

A row is always computed alone, hence with the same shapes, hence with the same bits, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_ray.kernels.base import Kernels, PackedWeight, ScoreKind
from deepseek_ray.kernels.quantize import Quantization, dequantize, quantize, round_inputs


class ReferenceKernels(Kernels):
    """Row by row in torch, on any device."""

    name = "torch, row by row"

    def pack(self, weights: Sequence[Tensor], quantization: Quantization | None = None) -> PackedWeight:
        return pack_plainly(weights, quantization)

    def linear(self, x: Tensor, weight: PackedWeight, out_dtype: torch.dtype | None = None) -> Tensor:
        return _rows(x, weight, 0, out_dtype or x.dtype)

    def per_head_linear(self, x: Tensor, weight: PackedWeight, out_dtype: torch.dtype | None = None) -> Tensor:
        heads = [_rows(x[:, head], weight, head, out_dtype or x.dtype) for head in range(x.shape[1])]
        return torch.stack(heads, dim=1)

    def grouped_linear(self, x: Tensor, weights: Sequence[PackedWeight], rows: Sequence[int]) -> Tensor:
        parts = zip(weights, x.split(list(rows)), strict=True)
        return torch.cat([_rows(part, weight, 0, x.dtype) for weight, part in parts])

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        for row in range(x.shape[0]):
            wide = x[row].float()
            out[row] = wide * torch.rsqrt(wide.pow(2).mean() + eps) * weight
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        width = gate_up.shape[1] // 2
        out = gate_up.new_empty(gate_up.shape[0], width)
        for row in range(gate_up.shape[0]):
            gate, up = gate_up[row].float().split(width)
            out[row] = F.silu(gate) * up
        return out

    def scores(self, logits: Tensor, kind: ScoreKind) -> Tensor:
        rows = [row.sigmoid() if kind == "sigmoid" else row.softmax(dim=-1) for row in logits]
        return torch.stack(rows) if rows else logits

    def latent_attention(
        self,
        query: Tensor,
        cache: Tensor,
        block_tables: Tensor,
        sequence_rows: Tensor,
        positions: Tensor,
        block_size: int,
        value_width: int,
        scale: float,
    ) -> Tensor:
        out = query.new_empty(query.shape[0], query.shape[1], value_width)
        for token in range(query.shape[0]):
            context = torch.arange(int(positions[token]) + 1, device=cache.device)
            blocks = block_tables[sequence_rows[token].long()][context // block_size].long()
            latents = cache[blocks * block_size + context % block_size].float()
            weights = (query[token].float() @ latents.T * scale).softmax(dim=-1)
            out[token] = weights @ latents[:, :value_width]
        return out


def pack_plainly(weights: Sequence[Tensor], quantization: Quantization | None) -> PackedWeight:
    """`[groups, N, K]`; of integers also scales `[groups, N, scales of an output]`."""
    num_out, num_in = weights[0].shape
    if quantization is None:
        data = torch.stack([weight.contiguous() for weight in weights])
        return PackedWeight(data, len(weights), num_out, num_in)
    integers, scales = zip(*(quantize(weight, quantization) for weight in weights), strict=True)
    return PackedWeight(torch.stack(integers), len(weights), num_out, num_in, torch.stack(scales))


def matrices(weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """[groups, N, K] in `dtype`, None for their own; mapped from a file, the data come as one row."""
    data = weight.data.view(weight.groups, weight.num_out, weight.num_in)
    if weight.scales is not None:
        groups = zip(data, weight.scales.view(weight.groups, weight.num_out, -1), strict=True)
        data = torch.stack([dequantize(integers, scales) for integers, scales in groups])
    return data if dtype is None else data.to(dtype)


def _rows(x: Tensor, weight: PackedWeight, group: int, out_dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape[0], weight.num_out, dtype=out_dtype, device=x.device)
    wide = matrices(weight, torch.float32)[group]
    inputs = x.float() if weight.scales is None else round_inputs(x)
    for row in range(x.shape[0]):
        out[row] = F.linear(inputs[row : row + 1], wide)[0]
    return out
