"""Auxiliary-loss-free load balancing of the routed experts (arXiv 2408.15664, algorithm 1).

The gate selects experts by score plus a correction bias. After each optimiser step the bias of every expert moves by
`speed` towards even load; the bias takes part in selection only, so no gradient is involved.

Letters: L mixture-of-experts layers, E routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from deepseek_ray.training.ranks import Ranks


class BalancedLayer(Protocol):
    """What the balancer needs of a mixture-of-experts layer (`nn/moe.py`)."""

    def take_counts(self) -> Tensor:
        """[E] int64: tokens sent to each expert since the last call, without recomputed forwards; resets to zero."""
        ...

    @property
    def correction_bias(self) -> Tensor | None:
        """[E] float32, changed in place; None for gates that have no such bias."""
        ...


def bias_after_step(bias: Tensor, counts: Tensor, speed: float) -> Tensor:
    """bias + speed * sign(mean(counts) - counts). bias: [..., E] float32; counts: [..., E], summed over the step."""
    load = counts.to(torch.float64)
    direction = torch.sign(load.mean(dim=-1, keepdim=True) - load)
    return bias + speed * direction.to(bias.dtype)


def max_violation(counts: Tensor) -> Tensor:
    """(max load - mean load) / mean load over the last dimension; 0 is perfect balance. counts: [..., E] -> [...]."""
    load = counts.to(torch.float64)
    mean = load.mean(dim=-1)
    return torch.where(mean > 0, (load.amax(dim=-1) - mean) / mean.clamp(min=1e-12), torch.zeros_like(mean))


class Balancer:
    """Moves the correction biases of a model's layers once per optimiser step.

    Counts are summed over micro-batches (the layers accumulate them) and over ranks (one all-reduce for all layers),
    so every rank computes the same new biases and they never need to be broadcast.
    """

    def __init__(self, layers: Sequence[BalancedLayer], speed: float, ranks: Ranks) -> None:
        self._layers = layers
        self._speed = speed
        self._ranks = ranks

    def step(self) -> Tensor:
        """Update the biases and return the counts of the step, [L, E] int64, summed over ranks."""
        counts = self.take_counts()
        with torch.no_grad():
            for layer, load in zip(self._layers, counts, strict=True):
                if layer.correction_bias is not None and self._speed:
                    layer.correction_bias.copy_(bias_after_step(layer.correction_bias, load, self._speed))
        return counts

    def take_counts(self) -> Tensor:
        """[L, E] int64 since the last call, summed over ranks; [0, 0] for a model without routed experts."""
        if not self._layers:
            return torch.zeros(0, 0, dtype=torch.int64)
        return self._ranks.sum(torch.stack([layer.take_counts() for layer in self._layers]))
