"""Which cache blocks belong to whom, and how many there are. Only numbers: the latents live in `nn/paged.py`."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_ray.config.engine import EngineConfig
from deepseek_ray.errors import ConfigError

DEFAULT_KV_CACHE_LIMIT_BYTES = 1 << 30


class KVBlocks:
    """Hands out cache blocks of `block_size` tokens. Every block is either free or in exactly one block table."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is reused first, still warm
        self._in_use = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def try_grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Append blocks to `block_table` until `num_tokens` tokens fit; False and no change when too few are free."""
        missing = blocks_for(num_tokens, self.block_size) - len(block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = self._free.pop()
            assert not self._in_use[block], f"block {block} is on the free list and in use"
            self._in_use[block] = 1
            block_table.append(block)
        return True

    def release(self, block_table: list[int]) -> None:
        """Give back every block of `block_table` and empty it."""
        while block_table:
            block = block_table.pop()
            assert self._in_use[block], f"block {block} is freed twice"
            self._in_use[block] = 0
            self._free.append(block)


def blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


@dataclass(frozen=True)
class CachePlan:
    num_blocks: int
    max_model_len: int
    """Longest prompt + output in tokens. One sequence of this length always fits when it runs alone."""


def plan_cache(config: EngineConfig, model_max_len: int, bytes_per_block: int) -> CachePlan:
    """Size the cache and settle the context length, see `EngineConfig.kv_cache_bytes`.

    A context length that was asked for and does not fit is a ConfigError; one taken from the model
    (`model_max_len`, its `max_position_embeddings`) is cut to what the cache holds.
    """
    if config.max_model_len is not None and config.max_model_len > model_max_len:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}; this model was made for at most {model_max_len} tokens "
            f"(max_position_embeddings); lower max_model_len"
        )
    max_model_len = config.max_model_len or model_max_len
    # The last token of a sequence is never fed back, so its latent is never stored.
    blocks_per_sequence = blocks_for(max_model_len - 1, config.block_size)
    if config.kv_cache_bytes is None:
        wanted = config.max_num_seqs * blocks_per_sequence
        num_blocks = min(wanted, DEFAULT_KV_CACHE_LIMIT_BYTES // bytes_per_block)
    else:
        num_blocks = config.kv_cache_bytes // bytes_per_block
    least_blocks = 1 if config.max_model_len is None else blocks_per_sequence
    if num_blocks < least_blocks:
        given = "None (at most 1 GiB)" if config.kv_cache_bytes is None else f"{config.kv_cache_bytes}"
        longest = min(max_model_len, least_blocks * config.block_size + 1)
        raise ConfigError(
            f"kv_cache_bytes is {given}; one sequence of {longest} tokens takes {least_blocks * bytes_per_block} "
            "bytes; raise kv_cache_bytes to at least that, or lower max_model_len"
        )
    return CachePlan(num_blocks, min(max_model_len, num_blocks * config.block_size + 1))
