"""All routed experts of one layer in one module, for training: gather each expert's tokens, multiply, sum again.

Letters: T tokens, K experts per token, E routed experts, H hidden size, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.kernels.training import serves
from deepseek_ray.nn import fused
from deepseek_ray.nn.slots import SlotOrder


class Experts(nn.Module):
    """E SwiGLU networks with stacked weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        """[E, 2 I, H]: gate projection above up projection."""
        self.down = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """hidden: [T, H]; expert_ids: [T, K] int64; weights: [T, K] float32; counts: [E] int64, tokens of each expert.

        Returns [T, H] float32, the weighted sum over each token's slots.
        """
        slots = SlotOrder(expert_ids)
        return slots.combine(self.compute(slots.to_experts(hidden), counts), weights)

    def compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows: [N, H] in expert order; counts: [E] int64, the rows of each expert. Returns [N, H] in the same order.

        Experts without rows get a gradient of zero.
        """
        if serves(rows, self.gate_up, self.down):
            return fused.run_experts(rows, self.gate_up, self.down, counts)
        sizes = counts.tolist()
        gate, up = grouped_linear(rows, self.gate_up, sizes).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, self.down, sizes)


def grouped_linear(rows: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """rows [N, in] in order of the experts, weights [E, out, in], sizes: rows of each expert -> [N, out].

    Under autocast in its dtype, as torch's own linear.
    """
    kind = rows.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        rows, weights = rows.to(dtype), weights.to(dtype)
    return _GroupedLinear.apply(rows, weights, sizes)


class _GroupedLinear(torch.autograd.Function):
    """One product per expert that has rows, each into its place of the result: composed of torch's own operators, the
    backward pass would copy every gradient of a weight once more to stack them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.sizes = sizes
        out = rows.new_empty(rows.shape[0], weights.shape[1])
        for expert, own in _slices(sizes):
            torch.mm(rows[own], weights[expert].t(), out=out[own])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights = ctx.saved_tensors
        of_rows, of_weights = (
            torch.empty_like(input) if needed else None
            for input, needed in zip((rows, weights), ctx.needs_input_grad, strict=False)
        )
        for expert, own in _slices(ctx.sizes):
            if of_rows is not None:
                torch.mm(grad[own], weights[expert], out=of_rows[own])
            if of_weights is not None:
                torch.mm(grad[own].t(), rows[own], out=of_weights[expert])
        if of_weights is not None:
            for expert, size in enumerate(ctx.sizes):
                if not size:
                    of_weights[expert].zero_()
        return of_rows, of_weights, None


def _slices(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Every expert that has rows, and where they are."""
    end = 0
    for expert, size in enumerate(sizes):
        end += size
        if size:
            yield expert, slice(end - size, end)
