"""Which attention worker takes a request, or that none can: bounded, by outstanding tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from deepseek_ray.control.peers import next_in_ring
from deepseek_ray.control.reports import WorkerView
from deepseek_ray.errors import OverloadedError, UnavailableError


@dataclass
class _InFlight:
    worker: int
    tokens: int
    expires: float


@dataclass
class Admission:
    """Requests in flight per worker. A client that dies without a release is forgotten at its request's deadline."""

    max_in_flight: int
    """Most requests one worker may run or queue."""
    kv_copies: bool = False
    """Whether workers copy their cache blocks to a peer."""
    _requests: dict[str, _InFlight] = field(default_factory=dict)

    def admit(
        self,
        request_id: str,
        tokens: int,
        seconds: float,
        workers: Sequence[WorkerView],
        now: float,
        avoid: Sequence[tuple[int, int]] = (),
    ) -> WorkerView:
        """The worker with the fewest outstanding tokens; `avoid` lists (id, incarnation) of lost ones, the latest last.

        With `kv_copies` a request whose worker was lost goes to the peer that has copies of what was computed for it,
        if that one has room. Raises UnavailableError without workers, OverloadedError when each is full.
        """
        self._requests = {key: entry for key, entry in self._requests.items() if entry.expires > now}
        self._requests.pop(request_id, None)
        candidates = [worker for worker in workers if (worker.id, worker.incarnation) not in avoid]
        if not candidates:
            raise UnavailableError("no attention worker answers right now; retry in a few seconds")
        load = {worker.id: [0, 0] for worker in candidates}
        for entry in self._requests.values():
            if entry.worker in load:
                load[entry.worker][0] += 1
                load[entry.worker][1] += entry.tokens
        free = [worker for worker in candidates if load[worker.id][0] < self.max_in_flight]
        if not free:
            count = sum(requests for requests, _ in load.values())
            raise OverloadedError(
                f"{count} requests are in flight, the limit is {self.max_in_flight} for each of {len(candidates)} "
                "attention workers; retry after the given time",
                retry_after_seconds=1.0,
            )
        peer = next_in_ring(avoid[-1][0], (worker.id for worker in candidates)) if self.kv_copies and avoid else None
        chosen = min(free, key=lambda worker: (worker.id != peer, load[worker.id][1], worker.id))
        self._requests[request_id] = _InFlight(chosen.id, tokens, now + seconds)
        return chosen

    def release(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def in_flight_of(self, worker: int) -> int:
        """Requests that were given to a worker and are not over."""
        return sum(entry.worker == worker for entry in self._requests.values())

    @property
    def in_flight(self) -> int:
        return len(self._requests)
