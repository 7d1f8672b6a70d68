"""Root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_ray.kernels.training import serves
from deepseek_ray.nn import fused

LATENT_NORM_EPS = 1e-6
"""Of the norms on compressed queries and keys/values; DeepSeek's own code does not take it from `rms_norm_eps`."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, returned in x's dtype and scaled by `weight`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        if serves(x, self.weight):
            return fused.rms_norm(x, self.weight, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)
