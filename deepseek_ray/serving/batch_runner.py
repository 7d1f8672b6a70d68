"""A queue in front of something that computes batches, run as `DynamicBatchScheduler` decides."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from deepseek_ray.errors import OverloadedError
from deepseek_ray.serving.batching import DynamicBatchScheduler

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class _Waiting(Generic[Item, Result]):
    item: Item
    arrived: float
    result: asyncio.Future[Result] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class BatchRunner(Generic[Item, Result]):
    """Belongs to one event loop. `compute` runs in a thread, one batch at a time; its results are in order."""

    def __init__(
        self,
        compute: Callable[[list[Item]], Sequence[Result]],
        scheduler: DynamicBatchScheduler,
        max_waiting: int,
    ) -> None:
        self._compute = compute
        self._scheduler = scheduler
        self._max_waiting = max_waiting
        self._queue: list[_Waiting[Item, Result]] = []
        self._news = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Results of `items`, in order. OverloadedError when they do not fit into the queue; what `compute` raises."""
        if len(self._queue) + len(items) > self._max_waiting:
            raise OverloadedError(
                f"{len(self._queue)} inputs wait and {len(items)} came; the limit is {self._max_waiting}; try later"
            )
        now = time.monotonic()
        entries = [_Waiting[Item, Result](item, now) for item in items]
        self._queue += entries
        self._news.set()
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run())
        try:
            return list(await asyncio.gather(*(entry.result for entry in entries)))
        finally:
            for entry in entries:  # of a client that left: not worth computing
                entry.result.cancel()

    async def _run(self) -> None:
        """Until nothing waits."""
        while self._queue:
            self._news.clear()
            decision = self._scheduler.decide([entry.arrived for entry in self._queue], time.monotonic())
            if decision.run:
                await self._run_batch(decision.run)
            else:
                await self._wait(decision.wait_until)
            self._queue = [entry for entry in self._queue if not entry.result.done()]

    async def _run_batch(self, size: int) -> None:
        batch, self._queue = self._queue[:size], self._queue[size:]
        self._scheduler.started(len(batch), time.monotonic())
        try:
            results = await asyncio.to_thread(self._compute, [entry.item for entry in batch])
        except Exception as error:
            for entry in batch:
                if not entry.result.done():
                    entry.result.set_exception(error)
            return
        finally:
            self._scheduler.finished(time.monotonic())
        for entry, result in zip(batch, results, strict=True):
            if not entry.result.done():
                entry.result.set_result(result)

    async def _wait(self, until: float | None) -> None:
        timeout = None if until is None else max(0.0, until - time.monotonic())
        try:
            await asyncio.wait_for(self._news.wait(), timeout)
        except TimeoutError:
            return
