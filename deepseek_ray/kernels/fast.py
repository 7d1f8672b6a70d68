"""torch's own operators on whole batches: whatever is fastest in the library, at the price of row invariance.

A row's last bits may depend on the other rows and on the number of threads, so two runs may part at a near-tie.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_ray.kernels.base import Kernels, PackedWeight, ScoreKind
from deepseek_ray.kernels.quantize import Quantization
from deepseek_ray.kernels.reference import matrices, pack_plainly


class FastKernels(Kernels):
    """What `deterministic: false` computes with, on any device. Packed weights are `[groups, N, K]`."""

    name = "torch, whole batches"
    layout = "outputs, inputs"

    def pack(self, weights: Sequence[Tensor], quantization: Quantization | None = None) -> PackedWeight:
        return pack_plainly(weights, quantization)

    def linear(self, x: Tensor, weight: PackedWeight, out_dtype: torch.dtype | None = None) -> Tensor:
        return _product(x, weight).to(out_dtype or x.dtype)

    def per_head_linear(self, x: Tensor, weight: PackedWeight, out_dtype: torch.dtype | None = None) -> Tensor:
        dtype = _dtype(x, weight)
        heads = torch.bmm(x.to(dtype).transpose(0, 1), matrices(weight, dtype).transpose(1, 2))
        return heads.transpose(0, 1).to(out_dtype or x.dtype)

    def grouped_linear(self, x: Tensor, weights: Sequence[PackedWeight], rows: Sequence[int]) -> Tensor:
        parts = zip(weights, x.split(list(rows)), strict=True)
        return torch.cat([_product(part, weight).to(x.dtype) for weight, part in parts])

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, dim=1)
        return (F.silu(gate) * up).to(gate_up.dtype)

    def scores(self, logits: Tensor, kind: ScoreKind) -> Tensor:
        return logits.sigmoid() if kind == "sigmoid" else logits.softmax(dim=-1)

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
        """One sequence at a time, all of its tokens and heads at once."""
        out = query.new_empty(query.shape[0], query.shape[1], value_width)
        for sequence in sequence_rows.unique():
            tokens = (sequence_rows == sequence).nonzero().squeeze(1)
            reach = positions[tokens]
            context = torch.arange(int(reach.max()) + 1, device=cache.device)
            blocks = block_tables[sequence.long()][context // block_size].long()
            latents = cache[blocks * block_size + context % block_size].float()
            scores = query[tokens].float() @ latents.T * scale
            future = context > reach[:, None, None]
            weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
            out[tokens] = (weights @ latents[:, :value_width]).to(out.dtype)
        return out


def _product(x: Tensor, weight: PackedWeight) -> Tensor:
    """`[T, K] -> [T, N]`."""
    dtype = _dtype(x, weight)
    return F.linear(x.to(dtype), matrices(weight, dtype)[0])


def _dtype(x: Tensor, weight: PackedWeight) -> torch.dtype:
    """What a product is computed in: the weight's dtype, or x's where the weight holds integers."""
    return weight.data.dtype if weight.scales is None else x.dtype
