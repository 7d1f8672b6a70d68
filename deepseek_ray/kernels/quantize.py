"""Weights of fewer bits, and inputs rounded to meet them: the plain version of what `cpp/integer.h` computes."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Quantization = Literal["int8", "int4"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

INT8_LARGEST = 127
INPUT_LARGEST = 63
"""Of a rounded input. Seven bits, with a scale for 32, cost next to nothing and spare AVX2 a quarter of its work."""
INT4_GROUP = 32
"""Weights of an output that share a scale."""
INPUT_GROUP = 32
"""Inputs of a row that share a scale."""


def bytes_per_weight(kind: Quantization | None, dtype: torch.dtype) -> float:
    """With the scales of int4; those of int8 are few."""
    if kind is None:
        return dtype.itemsize
    return 1 if kind == "int8" else 0.5 + torch.bfloat16.itemsize / INT4_GROUP


def quantize(weight: Tensor, kind: Quantization) -> tuple[Tensor, Tensor]:
    """`[N, K]` -> integers `[N, K]` int8 and scales `[N, groups]` float32; see `dequantize`."""
    if kind == "int8":
        integers, scales = quantize_int8(weight)
        return integers, scales[:, None]
    return quantize_int4(weight)


def dequantize(integers: Tensor, scales: Tensor) -> Tensor:
    """`[N, K]` float32: each integer times the scale of its output and group of inputs."""
    num_in, groups = integers.shape[1], scales.shape[1]
    return integers * scales.repeat_interleave(num_in if groups == 1 else INT4_GROUP, dim=1)[:, :num_in]


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric, one scale per output: `[N, K]` -> integers `[N, K]` int8 and scales `[N]` float32.

    weight[n] is about integers[n] * scales[n]; the largest of a row becomes 127. A row of zeros has the scale 0.
    """
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / INT8_LARGEST
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    return (wide * inverse[:, None]).round().to(torch.int8), scales


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for 32 inputs of an output, as llama.cpp's Q4_0: `[N, K]` -> integers -8 to 7 `[N, K]` int8 and scales
    `[N, ceil(K / 32)]` float32 whose values bfloat16 holds.

    The value of largest magnitude becomes -8 (up to its scale's rounding), so a scale may be negative.
    """
    num_out, num_in = weight.shape
    padding = -num_in % INT4_GROUP
    groups = F.pad(weight.float(), (0, padding)).view(num_out, -1, INT4_GROUP)
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scales = (largest / -8).bfloat16().float()
    inverse = torch.where(scales != 0, 1 / scales, 0.0)
    integers = (groups * inverse).round().clamp(-8, 7).to(torch.int8)
    return integers.view(num_out, -1)[:, :num_in], scales.squeeze(2)


def round_inputs(x: Tensor) -> Tensor:
    """What a product with integers makes of its inputs `[T, K]`: float32, -63 to 63 times a scale for 32 of a row."""
    num_in = x.shape[1]
    groups = F.pad(x.float(), (0, -num_in % INPUT_GROUP)).unflatten(1, (-1, INPUT_GROUP))
    scales = groups.abs().amax(dim=2, keepdim=True) / INPUT_LARGEST
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    return ((groups * inverse).round() * scales).flatten(1)[:, :num_in]
