"""Sections of a model's `config.json`: the extension of its context, and how its weights are stored.

YaRN is arXiv 2309.00071.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from deepseek_ray.config.base import FrozenConfig
from deepseek_ray.errors import ConfigError


class RopeScaling(FrozenConfig):
    """YaRN: how rotary frequencies are stretched beyond the context length of pre-training."""

    type: Literal["yarn"] = "yarn"
    """The one kind there is."""
    factor: float = Field(ge=1, allow_inf_nan=False)
    """Longest context divided by the one of pre-training."""
    original_max_position_embeddings: int = Field(ge=1)
    """Context of pre-training, in tokens."""
    beta_fast: float = Field(default=32, gt=0, allow_inf_nan=False)
    """Rotations over the original context above which a frequency is left alone."""
    beta_slow: float = Field(default=1, gt=0, allow_inf_nan=False)
    """Rotations below which a frequency is divided by `factor` in full."""
    mscale: float | None = Field(default=None, allow_inf_nan=False)
    """Part of the multiplier of cos and sin."""
    mscale_all_dim: float | None = Field(default=None, allow_inf_nan=False)
    """Part of the attention's scale, and divisor of the multiplier above."""
    attention_factor: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Multiplier of cos and sin; None derives it from `factor`, `mscale` and `mscale_all_dim`."""
    truncate: bool = True
    """Round the ends of the ramp between the two frequency ranges to whole dimensions."""

    @property
    def cos_sin_multiplier(self) -> float:
        """What cos and sin are multiplied with; 1.0 in the public models, whose two mscales are equal."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)


class Fp8Quantization(FrozenConfig):
    """Weights stored as FP8 with one scale per block; they are read, never written."""

    quant_method: Literal["fp8"] = "fp8"
    """The one kind that is read."""
    fmt: Literal["e4m3"] = "e4m3"
    """Format of the stored numbers."""
    weight_block_size: tuple[int, int] = (128, 128)
    """Rows and columns that share one entry of `weight_scale_inv`."""
    activation_scheme: str = "dynamic"
    """Carried for other readers: weights are dequantised here on load."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.weight_block_size) < 1:
            raise ConfigError(f"weight_block_size is {list(self.weight_block_size)}; both sides must be at least 1")
        return self


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 * mscale * ln(factor) + 1 (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
