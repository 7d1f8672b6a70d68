"""How long to wait for an answer before asking somebody else."""

from __future__ import annotations

_FACTOR = 4.0
"""An answer that takes this many times the slowest recent one is overdue."""
_MOST = 10.0
"""Times the least wait: never wait longer, or one stopped shard would teach endless patience with the next."""
_DECAY = 0.98
"""Per answer: what was slow once is forgotten after some hundred answers."""


class Patience:
    """The least wait, or a multiple of the slowest recent answer if that is longer: a long prefill is no failure."""

    def __init__(self, least_seconds: float) -> None:
        self._least = least_seconds
        self._slowest = 0.0

    @property
    def seconds(self) -> float:
        return min(max(self._least, _FACTOR * self._slowest), _MOST * self._least)

    def answered(self, seconds: float) -> None:
        """An answer took this long."""
        self._slowest = max(seconds, self._slowest * _DECAY)
