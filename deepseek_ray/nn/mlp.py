"""The SwiGLU feed-forward network (arXiv 2002.05202) of dense layers and shared experts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_ray.kernels.training import serves
from deepseek_ray.nn import fused


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        return self.down_proj(fused.swiglu(gate, up) if serves(gate, up) else F.silu(gate) * up)
