"""Full blocks on their way between engines: read out of one's latent cache, found in the other's prefix cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_ray.engine.kv_blocks import KVBlocks
from deepseek_ray.engine.prefix_cache import NamedBlock
from deepseek_ray.nn.paged import LatentCache


class BlockCopy(NamedTuple):
    """The content of a full block and its name."""

    key: bytes
    parent: bytes
    latents: Tensor
    """[num_layers, block_size, width], a tensor of its own, on the CPU."""


class BlockShape(NamedTuple):
    """What the blocks of one engine have in common."""

    num_layers: int
    block_size: int
    width: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.num_layers * self.block_size * self.width * self.dtype.itemsize


class BlockCopies:
    """Of one engine, and of its thread: blocks and latents may change with every step."""

    def __init__(self, blocks: KVBlocks, cache: LatentCache, full_blocks: Callable[[], list[NamedBlock]]) -> None:
        self._blocks = blocks
        self._cache = cache
        self._full_blocks = full_blocks
        self.new_blocks: list[NamedBlock] = []
        """Full blocks that running sequences got with the last step."""
        self.num_blocks = blocks.num_blocks
        layers, _, width = cache.data.shape
        self.shape = BlockShape(layers, cache.block_size, width, cache.data.dtype)

    def running_blocks(self) -> list[NamedBlock]:
        """Every full block of the running sequences."""
        return self._full_blocks()

    def read(self, name: NamedBlock) -> BlockCopy | None:
        """A copy of what the block holds; None when it holds something else by now."""
        (block,) = self._blocks.prefixes.find([name.key]) or (None,)
        if block is None:
            return None
        return BlockCopy(
            name.key, name.parent, self._cache.block(block).cpu().clone(memory_format=torch.contiguous_format)
        )

    def insert(self, copy: BlockCopy) -> bool:
        """Put a block where the prefix cache finds it. False when it is here, or there is no room."""
        shape = (*copy.latents.shape, copy.latents.dtype)
        assert shape == self.shape, f"a copy of shape {shape} for blocks of {self.shape}"
        block = self._blocks.insert(copy.key, copy.parent)
        if block is None:
            return False
        self._cache.block(block).copy_(copy.latents)
        return True
