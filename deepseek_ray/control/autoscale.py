"""How many attention workers and expert shards a deployment should have, from what they report: no I/O, no clock.

Attention workers follow cache use and queue, expert shards follow how busy the busiest is. A need must last before it
counts, longer for fewer than for more, and after a change there is a rest: the change must show before the next one.
"""

from __future__ import annotations

import msgspec

from deepseek_ray.config.engine import AutoscaleConfig

CROWDED_CACHE = 0.85
"""Part of the cache in use from which on another worker is wanted."""
ROOMY_CACHE = 0.5
"""Part of the cache that the others would use, below which one worker less is enough."""
BUSY_SHARD = 0.85
"""Part of the time that the busiest shard computes, from which on another shard is wanted."""
IDLE_SHARD = 0.4
"""The same, as it would be with one shard less, below which that is enough."""


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What a deployment looks like now."""

    workers: int
    shards: int
    cache_use: float
    """Part of all workers' cache blocks that is in use, 0 to 1."""
    waiting: int
    """Requests that wait for a seat in an engine."""
    shard_busy: float
    """Part of the time since the last observation that the busiest shard computed, 0 to 1."""


class Decision(msgspec.Struct, frozen=True):
    """New numbers; None leaves one as it is."""

    workers: int | None = None
    shards: int | None = None


class _Trend:
    """Since when one direction has been wanted without a break."""

    def __init__(self) -> None:
        self._direction = 0
        self._since = 0.0

    def lasts(self, direction: int, now: float) -> float:
        """Seconds for which `direction` (-1, 0 or 1) has been wanted."""
        if direction != self._direction:
            self._direction, self._since = direction, now
        return now - self._since


class AutoscalePolicy:
    """`decide` is asked about once a second."""

    def __init__(self, config: AutoscaleConfig) -> None:
        self._config = config
        self._workers, self._shards = _Trend(), _Trend()
        self._rest_until = float("-inf")

    def decide(self, seen: Observation, now: float) -> Decision | None:
        """What to change, None for nothing. One step at a time, each role for itself."""
        config = self._config
        workers = self._step(
            self._workers, _workers_wanted(seen), seen.workers, config.min_workers, config.max_workers, now
        )
        shards = self._step(self._shards, _shards_wanted(seen), seen.shards, config.min_shards, config.max_shards, now)
        if now < self._rest_until or (workers is None and shards is None):
            return None
        self._rest_until = now + config.rest_seconds
        return Decision(workers, shards)

    def _step(self, trend: _Trend, direction: int, count: int, least: int, most: int, now: float) -> int | None:
        if not least <= count <= most:  # the limits, not the load, ask for it
            return min(max(count, least), most)
        lasted = trend.lasts(direction, now)
        needed = self._config.up_seconds if direction > 0 else self._config.down_seconds
        wanted = min(max(count + direction, least), most)
        return None if wanted == count or lasted < needed else wanted


def _workers_wanted(seen: Observation) -> int:
    if seen.waiting or seen.cache_use > CROWDED_CACHE:
        return 1
    fewer = seen.workers - 1
    return -1 if fewer and seen.cache_use * seen.workers / fewer < ROOMY_CACHE else 0


def _shards_wanted(seen: Observation) -> int:
    if seen.shard_busy > BUSY_SHARD:
        return 1
    fewer = seen.shards - 1
    return -1 if fewer and seen.shard_busy * seen.shards / fewer < IDLE_SHARD else 0


class Observer:
    """Turns the members' reported figures into observations."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._time: float | None = None

    def observe(self, stats: dict[str, dict[str, float]], workers: int, shards: int, now: float) -> Observation | None:
        """stats: `role/id` -> figures, as members report them. None the first time: there is no interval yet."""
        engines = [figures for member, figures in stats.items() if member.startswith("attention_worker/")]
        compute = {member: figures.get("compute_seconds", 0.0) for member, figures in stats.items()}
        before, elapsed = self._before, now - self._time if self._time is not None else 0.0
        self._before, self._time = compute, now
        if elapsed <= 0:
            return None
        total = sum(figures.get("num_kv_blocks_total", 0.0) for figures in engines)
        used = sum(figures.get("num_kv_blocks_used", 0.0) for figures in engines)
        spent = [max(0.0, seconds - before.get(member, seconds)) for member, seconds in compute.items()]
        return Observation(
            workers=workers,
            shards=shards,
            cache_use=used / total if total else 0.0,
            waiting=int(sum(figures.get("num_waiting", 0.0) for figures in engines)),
            shard_busy=min(1.0, max(spent, default=0.0) / elapsed),
        )
