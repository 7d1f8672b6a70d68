"""A step's batch and the paged latent KV cache it reads and writes.

Letters: T tokens of the step, S sequences of the step, B cache blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedBatch:
    """The tokens one engine step computes, flat, sequence after sequence."""

    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64: place of each token in its sequence; a token attends to positions 0..itself."""
    slots: Tensor
    """[T] int64: where each token's latent goes in the cache, block * block_size + offset."""
    sequence_rows: Tensor
    """[T] int32: which row of `block_tables` each token belongs to."""
    block_tables: Tensor
    """[S, max_blocks] int32: cache blocks of each sequence in order; unused entries are 0."""
    logit_rows: Tensor
    """[n] int64: the tokens whose logits are wanted."""

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    def part(self, first: int, last: int) -> PagedBatch:
        """The tokens from `first` on, before `last`, without wishes for logits."""
        return PagedBatch(
            self.token_ids[first:last],
            self.positions[first:last],
            self.slots[first:last],
            self.sequence_rows[first:last],
            self.block_tables,
            self.logit_rows[:0],
        )

    def to(self, device: torch.device) -> PagedBatch:
        return PagedBatch(*(getattr(self, name.name).to(device, non_blocking=True) for name in fields(self)))


class LatentCache:
    """Latents of every layer: `(RMSNorm(c), RoPE(k_rope))`, `kv_lora_rank + qk_rope_head_dim` values per token."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.data = torch.zeros(num_layers, num_blocks * block_size, width, dtype=dtype, device=device)

    def layer(self, layer: int) -> Tensor:
        """[num_blocks * block_size, width] of one layer."""
        return self.data[layer]

    def block(self, block: int) -> Tensor:
        """[num_layers, block_size, width] of one block."""
        return self.data[:, block * self.block_size : (block + 1) * self.block_size]

    @staticmethod
    def bytes_per_block(num_layers: int, block_size: int, width: int, dtype: torch.dtype) -> int:
        return num_layers * block_size * width * dtype.itemsize
