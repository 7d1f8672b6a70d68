"""Whether anybody still wants a deployment."""

from __future__ import annotations

from dataclasses import dataclass, field

AWAY_SECONDS = 5.0


@dataclass
class Leases:
    """Owners renew, and release what they no longer want. A deployment whose last owner released it is an orphan at
    once; one whose owners fell silent is after `timeout_seconds`. Times are monotonic."""

    timeout_seconds: float
    started: float
    _last_renewed: dict[str, float] = field(default_factory=dict)
    _released_last: bool = False
    _asked: float = field(init=False)

    def __post_init__(self) -> None:
        self._asked = self.started

    def renew(self, owner: str, now: float) -> None:
        self._last_renewed[owner] = now
        self._released_last = False

    def release(self, owner: str) -> None:
        if self._last_renewed.pop(owner, None) is not None:
            self._released_last = not self._last_renewed

    def orphaned(self, now: float) -> bool:
        """True when nobody holds a lease; a router that just started waits for the first, since owners may live.

        To be asked every second or so. A time without a question does not count: the router itself was stopped, or cut
        off from its cluster, and no owner could reach it.
        """
        away = now - self._asked
        self._asked = now
        if away > AWAY_SECONDS:
            self.started += away
            self._last_renewed = {owner: renewed + away for owner, renewed in self._last_renewed.items()}
        if self._released_last:
            return True
        latest = max(self._last_renewed.values(), default=self.started)
        return now - latest > self.timeout_seconds
