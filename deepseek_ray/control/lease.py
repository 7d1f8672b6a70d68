"""Whether anybody still wants a deployment."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Leases:
    """Owners renew, and release what they no longer want. A deployment whose last owner released it is an orphan at
    once; one whose owners fell silent is after `timeout_seconds`. Times are monotonic."""

    timeout_seconds: float
    started: float
    _last_renewed: dict[str, float] = field(default_factory=dict)
    _released_last: bool = False

    def renew(self, owner: str, now: float) -> None:
        self._last_renewed[owner] = now
        self._released_last = False

    def release(self, owner: str) -> None:
        if self._last_renewed.pop(owner, None) is not None:
            self._released_last = not self._last_renewed

    def orphaned(self, now: float) -> bool:
        """True when nobody holds a lease; a router that just started waits for the first, since owners may live."""
        if self._released_last:
            return True
        latest = max(self._last_renewed.values(), default=self.started)
        return now - latest > self.timeout_seconds
