"""Tensors of a checkpoint as the inference decoder wants them: packed for the kernels, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_ray.kernels.base import Kernels, PackedWeight
from deepseek_ray.kernels.quantize import Quantization
from deepseek_ray.models.checkpoint import CheckpointReader


class DecoderWeights:
    """Reads tensors by name (the reader refuses NaN and infinity) and packs them."""

    def __init__(
        self,
        reader: CheckpointReader,
        dtype: torch.dtype,
        kernels: Kernels,
        device: torch.device,
        quantization: Quantization | None,
    ) -> None:
        self.quantization: Quantization | None = quantization
        self.reader = reader
        self.dtype = dtype
        self.device = device
        self.kernels = kernels

    def plain(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.reader.tensor(name, dtype or self.dtype).to(self.device)

    def norm(self, name: str) -> Tensor:
        return self.plain(name, torch.float32).contiguous()

    def differ(self, name: str, other: str) -> bool:
        """Whether there is a tensor of this name, and it is not the same as another one."""
        return name in self.reader and not torch.equal(self.plain(name), self.plain(other))

    def linear(self, *names: str) -> PackedWeight:
        """One layer; several names are stacked by output features."""
        weights = [self.plain(name) for name in names]
        packed = self.kernels.pack([torch.cat(weights)], self.quantization)
        for name, weight in zip(names, weights, strict=True):
            self.reader.let_go(name, weight)
        return packed

    def heads(self, weights: list[Tensor]) -> PackedWeight:
        """One layer for each head: 8 bits where others have fewer, for they are few and every query meets them."""
        return self.kernels.pack(weights, self.quantization and "int8")

    def bias(self, name: str) -> Tensor | None:
        return self.plain(name, torch.float32) if name in self.reader else None


def biased(kernels: Kernels, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """`x [T, K] @ weight.T + bias -> [T, N]` in x's dtype; the sum is in float32."""
    if bias is None:
        return kernels.linear(x, weight)
    return (kernels.linear(x, weight, torch.float32) + bias).to(x.dtype)
