"""Rotary position embedding (arXiv 2104.09864) with YaRN's stretched frequencies (arXiv 2309.00071, section 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deepseek_ray.config.model import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position of each rotary pair, [qk_rope_head_dim / 2] float32."""
    width = config.qk_rope_head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    periods = config.rope_theta**exponents
    if config.rope_scaling is None:
        return 1.0 / periods
    kept = 1.0 - _interpolation_ramp(width, config.rope_theta, config.rope_scaling).to(device)
    return 1.0 / (config.rope_scaling.factor * periods) * (1.0 - kept) + 1.0 / periods * kept


def rope_tables(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of integer positions [...]: each [..., qk_rope_head_dim / 2] float32, YaRN's multiplier included."""
    angles = positions.unsqueeze(-1).float() * rope_frequencies(config, positions.device)
    multiplier = 1.0 if config.rope_scaling is None else config.rope_scaling.cos_sin_multiplier
    return angles.cos() * multiplier, angles.sin() * multiplier


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn each pair of x [..., d] by its angle; cos and sin are [..., d / 2] and broadcast against x.

    Pairs are neighbours (2i, 2i + 1) when `interleaved`, else halves (i, i + d / 2). Either way the result holds the
    pairs as halves: queries and keys are permuted alike, which leaves their products unchanged. Computed in float32,
    returned in x's dtype.
    """
    wide = x.float()
    first, second = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def _interpolation_ramp(width: int, theta: float, scaling: RopeScaling) -> Tensor:
    """How far each pair's frequency is divided by `factor`: 0 (fast pairs, left alone) to 1, [width / 2] float32."""

    def pair_with_rotations(rotations: float) -> float:
        """The (fractional) pair that makes this many turns over the original context."""
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(theta))

    low, high = pair_with_rotations(scaling.beta_fast), pair_with_rotations(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    return ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
