"""The order of the samples: a permutation of `range(size)` for every (seed, epoch), computed where it is asked for.

A Feistel network on the bits of the index with a keyed mixing function (Luby & Rackoff 1988), walked along its cycle
until it lands below `size` (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). Nothing is stored, so a
set of any size costs the same; any process computes the same order.
"""

from __future__ import annotations

import hashlib

import numpy as np

NUM_ROUNDS = 6
"""Four make a Feistel network pseudo-random; two more because small domains have few bits to mix in each round."""


class SampleOrder:
    """The permutation of one epoch. `size` >= 1 samples; `seed` and `epoch` are any non-negative integers."""

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        assert size >= 1
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.shake_256(f"deepseek_ray sample order {size} {seed} {epoch}".encode()).digest(8 * NUM_ROUNDS)
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Sample indices at `positions` ([...] integers in [0, size)) of the epoch; int64, the same shape."""
        values = self._permute(np.asarray(positions, dtype=np.uint64))
        # The network permutes up to 4 * size values; those outside walk on until they come back inside.
        while (outside := values >= self.size).any():
            values[outside] = self._permute(values[outside])
        return values.astype(np.int64)

    def _permute(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & self._half_mask)
        return (left << self._half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
