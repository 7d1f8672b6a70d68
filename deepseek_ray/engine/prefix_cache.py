"""What full cache blocks hold, so that later sequences find and share them. Only names: the latents live in
`nn/paged.py`.

A full block is named by a chain of hashes: its key covers its own tokens and, through its parent's key, every token
before them, so two blocks of one key hold the same latents. As in vLLM's V1 engine (vllm/v1/core/kv_cache_utils.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

KEY_BYTES = 32
"""Nobody can compute two prompts of one key, which would show one client's prompt to another."""


class NamedBlock(NamedTuple):
    """A cache block and what it holds."""

    block: int
    key: bytes
    parent: bytes
    """Key of the block before it in its sequence; for the first one the root."""


def root_key(cache_salt: str | None) -> bytes:
    """What stands before a sequence's first block. Sequences share blocks only under one salt."""
    salt = b"" if cache_salt is None else b"\1" + cache_salt.encode()
    return hashlib.blake2b(salt, digest_size=KEY_BYTES, person=b"prefix root").digest()


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Of a block that holds `token_ids` and comes after `parent`."""
    return hashlib.blake2b(parent + np.array(token_ids, dtype="<i8").tobytes(), digest_size=KEY_BYTES).digest()


class BlockKeys:
    """The keys of one sequence's full blocks, computed when they are first asked for. Tokens are only ever appended."""

    def __init__(self, token_ids: list[int], cache_salt: str | None) -> None:
        self._token_ids = token_ids
        self._chain = [root_key(cache_salt)]

    def first(self, count: int, block_size: int) -> list[bytes]:
        """Keys of the first `count` blocks."""
        self._extend(count, block_size)
        return self._chain[1 : count + 1]

    def name(self, index: int, block: int, block_size: int) -> NamedBlock:
        """`block` as the sequence's full block number `index`."""
        self._extend(index + 1, block_size)
        return NamedBlock(block, key=self._chain[index + 1], parent=self._chain[index])

    def _extend(self, count: int, block_size: int) -> None:
        for index in range(len(self._chain) - 1, count):
            token_ids = self._token_ids[index * block_size : (index + 1) * block_size]
            assert len(token_ids) == block_size, f"block {index} of {len(self._token_ids)} tokens is not full"
            self._chain.append(block_key(self._chain[-1], token_ids))


class PrefixCache:
    """Which blocks hold what, and in which order those that nobody uses are given up: the one unused longest first."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, NamedBlock] = {}
        self._unused: dict[int, None] = {}  # in order, the next to be given up first

    @property
    def num_unused(self) -> int:
        """Blocks that hold something and are free."""
        return len(self._unused)

    def holds(self, block: int) -> bool:
        return block in self._name_of

    def name_of(self, block: int) -> NamedBlock | None:
        return self._name_of.get(block)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the first keys, up to the first that is not here."""
        found = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            found.append(block)
        return found

    def is_unused(self, block: int) -> bool:
        return block in self._unused

    def add(self, name: NamedBlock) -> bool:
        """A block holds this from now on. False when another one does: one is enough."""
        if name.key in self._block_of:
            return False
        assert name.block not in self._name_of, f"block {name.block} holds something else"
        self._block_of[name.key] = name.block
        self._name_of[name.block] = name
        return True

    def forget(self, block: int) -> None:
        """What a block holds is not to be found any more."""
        if (name := self._name_of.pop(block, None)) is not None:
            del self._block_of[name.key]
            self._unused.pop(block, None)

    def use(self, block: int) -> None:
        self._unused.pop(block, None)

    def unuse(self, block: int) -> None:
        """Nobody uses the block any more; it is given up after those unused longer."""
        self._unused[block] = None

    def give_up(self) -> int:
        """The block unused longest, which holds nothing from now on."""
        block = next(iter(self._unused))
        self.forget(block)
        return block

    def renew(self, key: bytes) -> int:
        """Keep the block of `key` and those before it in its sequence, the first one longest: one that lacks what
        stands before it is of no use. Returns how many of them nobody uses."""
        count = 0
        while (block := self._block_of.get(key)) is not None:
            if block in self._unused:
                del self._unused[block]
                self._unused[block] = None
                count += 1
            key = self._name_of[block].parent
        return count
