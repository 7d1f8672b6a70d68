"""Which cache blocks belong to whom, and how many there are. Only numbers: the latents live in `nn/paged.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_ray.config.engine import EngineConfig
from deepseek_ray.engine.prefix_cache import NamedBlock, PrefixCache
from deepseek_ray.errors import ConfigError

DEFAULT_KV_CACHE_LIMIT_BYTES = 1 << 30


class KVBlocks:
    """Hands out cache blocks of `block_size` tokens.

    Every block is in use by one or more block tables, or free. A free one may still hold what a prefix cache can find:
    those are handed out last, and count as free all the same. A block of several tables is full, so nobody writes it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefixes = PrefixCache()
        self._empty = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is reused first, still warm
        self._num_users = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._empty) + self.prefixes.num_unused

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def try_grow(self, block_table: list[int], num_tokens: int, found: Sequence[int] = ()) -> bool:
        """Append `found`, then blocks of its own, to `block_table` until `num_tokens` tokens fit; False and no change
        when too few are free. `found` are blocks that the prefix cache holds."""
        missing = blocks_for(num_tokens, self.block_size) - len(block_table) - len(found)
        if missing > self.num_free - sum(map(self.prefixes.is_unused, found)):
            return False
        for block in found:
            assert self.prefixes.holds(block), f"block {block} is to be shared and holds nothing"
            self.prefixes.use(block)
            self._num_users[block] += 1
            block_table.append(block)
        for _ in range(missing):
            block = self._take()
            self._num_users[block] = 1
            block_table.append(block)
        return True

    def release(self, block_table: list[int]) -> None:
        """Give back every block of `block_table` and empty it. The last ones are given up first."""
        while block_table:
            block = block_table.pop()
            assert self._num_users[block], f"block {block} is freed twice"
            self._num_users[block] -= 1
            if self._num_users[block]:
                continue
            if self.prefixes.holds(block):
                self.prefixes.unuse(block)
            else:
                self._empty.append(block)

    def check_writable(self, block: int) -> None:
        """A step writes latents into the block: it must be one table's own, and hold nothing that others may find."""
        assert self._num_users[block] == 1, f"block {block} is written and has {self._num_users[block]} users"
        assert not self.prefixes.holds(block), f"block {block} is written and others may find it"

    def insert(self, key: bytes, parent: bytes) -> int | None:
        """A free block for content from elsewhere, which the prefix cache finds from now on; the caller fills it now.

        None when the content is here, or there is no room. It takes the place of what was unused longest, never of what
        is in use.
        """
        if self.prefixes.find([key]):
            self.prefixes.renew(key)
            return None
        num_before_it = self.prefixes.renew(parent)
        if num_before_it == self.num_free:
            return None  # it would cost a block that it cannot do without
        block = self._take()
        self.prefixes.add(NamedBlock(block, key, parent))
        self.prefixes.unuse(block)
        self.prefixes.renew(key)
        return block

    def forget(self, block_table: Sequence[int]) -> None:
        """What these blocks, which are in use, hold is not to be found any more."""
        for block in block_table:
            assert self._num_users[block], f"block {block} is free"
            self.prefixes.forget(block)

    def _take(self) -> int:
        block = self._empty.pop() if self._empty else self.prefixes.give_up()
        assert not self._num_users[block], f"block {block} is free and in use"
        return block


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
