"""How long to wait for an answer before asking somebody else."""

from __future__ import annotations

import math

_FACTOR = 4.0
"""An answer that takes this many times what recent ones let expect is overdue."""
_MOST = 10.0
"""Times the least wait: never wait longer, or one stopped shard would teach endless patience with the next."""
_DECAY = 0.98
"""Per answer: what was slow or fast once is forgotten after some hundred answers."""


class Patience:
    """The least wait, or longer where recent answers were slow, and for a call of much work: a long prefill is no
    failure, and asking a second shard to compute it, too, would hold up both."""

    def __init__(self, least_seconds: float) -> None:
        self._least = least_seconds
        self._slowest = 0.0
        self._seconds_per_pair = math.inf
        """Of the answer that was fastest for its work, of recent ones; before the first, nothing is overdue soon."""

    def seconds(self, pairs: int) -> float:
        """For a call of so many (token, expert) pairs."""
        expected = max(self._slowest, self._seconds_per_pair * pairs)
        return min(max(self._least, _FACTOR * expected), _MOST * self._least)

    def answered(self, seconds: float, pairs: int) -> None:
        """An answer of so many pairs took this long; of none, it was a sign of life."""
        self._slowest = max(seconds, self._slowest * _DECAY)
        if pairs:
            self._seconds_per_pair = min(seconds / pairs, self._seconds_per_pair / _DECAY)
