"""Whether anybody still wants a deployment."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Leases:
    """Owners renew; a deployment without a live owner for `timeout_seconds` is an orphan. Times are monotonic."""

    timeout_seconds: float
    started: float
    _last_renewed: dict[str, float] = field(default_factory=dict)

    def renew(self, owner: str, now: float) -> None:
        self._last_renewed[owner] = now

    def orphaned(self, now: float) -> bool:
        """True when no owner renewed within the time-out; a router that just started waits as long for the first."""
        latest = max(self._last_renewed.values(), default=self.started)
        return now - latest > self.timeout_seconds
