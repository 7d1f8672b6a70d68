"""Weights of fewer bits than activations: the plain version of what the packed layouts hold."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Quantization = Literal["int8"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

INT8_LARGEST = 127


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric, one scale per output: `[N, K]` -> integers `[N, K]` int8 and scales `[N]` float32.

    weight[n] is about integers[n] * scales[n]; the largest of a row becomes 127. A row of zeros has the scale 0.
    """
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / INT8_LARGEST
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    return (wide * inverse[:, None]).round().to(torch.int8), scales
