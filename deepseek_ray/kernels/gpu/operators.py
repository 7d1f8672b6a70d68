"""`FastKernels` on a CUDA device: products of whole batches by torch, everything between them in Triton.

No operator of a decode step waits for the GPU, so that a step can be captured as a graph (`models/graphed_decoder.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseek_ray.kernels.base import Choice, ExpertWeights, Place, Rotation
from deepseek_ray.kernels.build import KernelBuildError
from deepseek_ray.kernels.fast import FastKernels
from deepseek_ray.kernels.gpu import experts, gate, latents
from deepseek_ray.kernels.gpu import rows as row_operators
from deepseek_ray.kernels.native import NativeKernels


class GpuKernels(FastKernels):
    """See the module. Weights of fewer bits have no operator of ours yet: their experts are torch's, one by one."""

    name = "Triton and torch, whole batches"
    is_capturable = True

    def __init__(self) -> None:
        try:
            self._on_host: NativeKernels | None = NativeKernels()
        except KernelBuildError:
            self._on_host = None

    def draw(self, logits: NDArray[np.float32], rows: Sequence[int], places: Sequence[Place]) -> list[int] | None:
        """On the host, where the logits are by then."""
        return None if self._on_host is None else self._on_host.draw(logits, rows, places)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return row_operators.rms_norm(x, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return row_operators.silu_mul(gate_up)

    def combine_slots(self, rows: Tensor, weights: Tensor, more: Sequence[Tensor] = ()) -> Tensor:
        return functools.reduce(torch.add, more, row_operators.combine_slots(rows, weights))

    def choose_experts(self, scores: Tensor, bias: Tensor | None, choice: Choice) -> tuple[Tensor, Tensor]:
        return gate.choose_experts(scores, bias, choice)

    def expert_table(self, held: Mapping[int, ExpertWeights], num_experts: int) -> Any | None:
        return experts.device_table(held, num_experts)

    def run_experts(self, table: Any, hidden: Tensor, token_rows: Tensor, ids: Tensor) -> Tensor | None:
        return experts.run_experts(table, hidden, token_rows, ids)

    def write_latents(
        self, kv: Tensor, norm: Tensor, eps: float, rotation: Rotation, slots: Tensor, cache: Tensor
    ) -> bool:
        latents.write_latents(kv, norm, eps, rotation, slots, cache)
        return True

    def turn_query(self, absorbed: Tensor, query: Tensor, rotation: Rotation) -> Tensor:
        return latents.turn_query(absorbed, query, rotation)

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
        pages = latents.Pages(cache, block_tables, block_size)
        return latents.attend(query, pages, sequence_rows, positions, value_width, scale)
