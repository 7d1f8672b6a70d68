"""When to compute a batch, and how large a one: a decision without clock, queue or model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_ray.errors import ConfigError

_SMOOTHING = 0.3
"""Weight of the newest batch in the measured time."""


@dataclass(frozen=True)
class BatchDecision:
    """Compute the `run` oldest now; with 0, ask again when something happens, at the latest at `wait_until`."""

    run: int
    wait_until: float | None = None
    """Seconds of the caller's clock; None when only an event can change anything."""


class DynamicBatchScheduler:
    """Batches as large as the load makes them, without making anybody wait for company that does not come.

    A batch is sent when `max_batch` wait, when as many wait as were in flight together lately (more are not to be
    expected: whoever asks one after the other waits for answers), or when the oldest would otherwise exceed the latency
    threshold, given the measured time of a batch. Fewer than `min_batch` are sent only for the last reason.
    """

    def __init__(self, min_batch: int = 1, max_batch: int = 32, latency_threshold: float = 100) -> None:
        """`latency_threshold`: milliseconds from arrival to result. ConfigError for bounds that contradict."""
        if not 1 <= min_batch <= max_batch:
            raise ConfigError(f"min_batch is {min_batch} and max_batch {max_batch}; give 1 <= min_batch <= max_batch")
        if not latency_threshold > 0:
            raise ConfigError(f"latency_threshold is {latency_threshold} ms; give more than 0")
        self._min_batch = min_batch
        self._max_batch = max_batch
        self._threshold_seconds = latency_threshold / 1000
        self._expected = 1
        """As many as were in flight together lately."""
        self._running = 0
        self._started = 0.0
        self._batch_seconds = 0.0
        self._batch_size = 1.0

    def decide(self, arrivals: Sequence[float], now: float) -> BatchDecision:
        """`arrivals`: when each that waits came, oldest first. `started` must follow when something is to run."""
        waiting = len(arrivals)
        self._expected = max(self._expected, waiting + self._running)
        if self._running or not waiting:
            return BatchDecision(0)
        size = min(waiting, self._max_batch)
        wanted = min(self._max_batch, max(self._min_batch, self._expected))
        latest = arrivals[0] + self._threshold_seconds - self.predicted_seconds(size)
        if waiting >= wanted:
            return BatchDecision(size)
        if now >= latest:
            self._expected = waiting  # the others did not come
            return BatchDecision(size)
        return BatchDecision(0, latest)

    def started(self, size: int, now: float) -> None:
        self._running, self._started = size, now

    def finished(self, now: float) -> None:
        seconds, size = now - self._started, self._running
        known = self._batch_seconds > 0
        self._batch_seconds += (_SMOOTHING if known else 1.0) * (seconds - self._batch_seconds)
        self._batch_size += (_SMOOTHING if known else 1.0) * (size - self._batch_size)
        self._running = 0

    def predicted_seconds(self, size: int) -> float:
        """Time of a batch: as measured, and in proportion for larger ones."""
        return self._batch_seconds * max(1.0, size / self._batch_size)
