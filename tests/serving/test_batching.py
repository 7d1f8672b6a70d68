"""When batches are sent: rules one by one, and simulations with a clock of their own."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest

from deepseek_ray import DynamicBatchScheduler
from deepseek_ray.errors import ConfigError
from deepseek_ray.serving.batching import BatchDecision


def measured(scheduler: DynamicBatchScheduler, size: int, seconds: float) -> DynamicBatchScheduler:
    """After one batch of `size` that took `seconds`, all of which were in flight together."""
    assert scheduler.decide([0.0] * size, 1e9).run == size
    scheduler.started(size, 0.0)
    scheduler.finished(seconds)
    return scheduler


def test_who_is_alone_is_not_kept_waiting() -> None:
    assert DynamicBatchScheduler().decide([5.0], 5.0) == BatchDecision(1)


def test_a_full_batch_is_sent_and_the_rest_stays() -> None:
    scheduler = DynamicBatchScheduler(min_batch=4, max_batch=8)
    assert scheduler.decide([5.0] * 20, 5.0) == BatchDecision(8)


def test_fewer_than_min_batch_wait_as_long_as_the_threshold_allows() -> None:
    scheduler = DynamicBatchScheduler(min_batch=4, max_batch=8, latency_threshold=100)
    assert scheduler.decide([5.0, 5.05], 5.06) == BatchDecision(0, pytest.approx(5.1))
    assert scheduler.decide([5.0, 5.05], 5.1) == BatchDecision(2)


def test_the_measured_time_of_a_batch_is_part_of_the_latency() -> None:
    scheduler = measured(DynamicBatchScheduler(min_batch=4, max_batch=8, latency_threshold=100), 4, 0.03)
    assert scheduler.decide([5.0], 5.0) == BatchDecision(0, pytest.approx(5.07))
    assert scheduler.predicted_seconds(8) == pytest.approx(0.06)
    assert scheduler.predicted_seconds(1) == pytest.approx(0.03)


def test_as_many_as_were_together_are_waited_for_until_they_do_not_come() -> None:
    scheduler = measured(DynamicBatchScheduler(max_batch=8, latency_threshold=100), 4, 0.03)
    assert scheduler.decide([5.0, 5.01], 5.01).run == 0
    assert scheduler.decide([5.0, 5.01, 5.02, 5.02], 5.02).run == 4
    assert scheduler.decide([6.0, 6.0], 6.071).run == 2  # late: two have left
    scheduler.started(2, 6.071)
    scheduler.finished(6.1)
    assert scheduler.decide([7.0, 7.0], 7.0).run == 2


def test_nothing_is_sent_while_a_batch_runs_or_nobody_waits() -> None:
    scheduler = DynamicBatchScheduler()
    assert scheduler.decide([], 1.0) == BatchDecision(0)
    scheduler.started(1, 1.0)
    assert scheduler.decide([1.0] * 99, 9.0) == BatchDecision(0)
    scheduler.finished(9.0)
    assert scheduler.decide([1.0] * 99, 9.0) == BatchDecision(32)


@pytest.mark.parametrize("arguments", [(0, 4, 10), (5, 4, 10), (1, 4, 0), (1, 4, float("nan"))])
def test_bounds_that_contradict_are_refused(arguments: tuple[int, int, float]) -> None:
    with pytest.raises(ConfigError):
        DynamicBatchScheduler(*arguments)


class Simulation:
    """A server that computes a batch in `base + per_text * size` seconds, on a clock that jumps from event to event."""

    def __init__(self, scheduler: DynamicBatchScheduler, base: float, per_text: float) -> None:
        self.scheduler = scheduler
        self.cost: Callable[[int], float] = lambda size: base + per_text * size
        self.sizes: list[int] = []
        self.latencies: list[float] = []

    def run(self, arrivals: list[float], again: Callable[[float], float | None] = lambda now: None) -> None:
        """`again`: when a client that got its answer at `now` asks the next time; None for never."""
        coming = sorted(arrivals)
        waiting: list[float] = []
        running: list[float] = []
        end = float("inf")
        now = 0.0
        while coming or waiting or running:
            decision = self.scheduler.decide(waiting, now)
            if decision.run:
                assert not running
                running, waiting = waiting[: decision.run], waiting[decision.run :]
                end = now + self.cost(len(running))
                self.scheduler.started(len(running), now)
                self.sizes.append(len(running))
                continue
            wake = float("inf") if decision.wait_until is None else decision.wait_until
            now = max(now, min(wake, end, coming[0] if coming else float("inf")))
            assert now < float("inf"), "nothing would ever happen again"
            while coming and coming[0] <= now:
                waiting.append(heapq.heappop(coming))
            if now >= end:
                self.scheduler.finished(now)
                self.latencies += [now - arrived for arrived in running]
                for time in filter(None, [again(now) for _ in running]):
                    heapq.heappush(coming, time)
                running, end = [], float("inf")


def asks_until(stop: float, pause: float) -> Callable[[float], float | None]:
    return lambda now: now + pause if now < stop else None


def test_one_client_after_the_other_pays_for_its_own_batch_only() -> None:
    simulation = Simulation(DynamicBatchScheduler(), base=0.01, per_text=0.001)
    simulation.run([0.0], asks_until(5.0, pause=0.002))
    assert set(simulation.sizes) == {1}
    assert max(simulation.latencies) == pytest.approx(0.011)


def test_sixteen_clients_come_together() -> None:
    simulation = Simulation(DynamicBatchScheduler(), base=0.01, per_text=0.001)
    simulation.run([0.001 * client for client in range(16)], asks_until(5.0, pause=0.002))
    assert simulation.sizes[5:-5] == [16] * len(simulation.sizes[5:-5])


@pytest.mark.parametrize("min_batch", [1, 8])
@pytest.mark.parametrize("rate", [20, 200, 1000])
def test_random_arrivals_stay_within_the_threshold(rate: float, min_batch: int) -> None:
    """Below capacity (32 texts in 42 ms are 760 a second) latency is bounded; above it batches are full."""
    generator = random.Random(3)
    now, arrivals = 0.0, []
    for _ in range(2000):
        now += generator.expovariate(rate)
        arrivals.append(now)
    simulation = Simulation(DynamicBatchScheduler(min_batch, 32, 100), base=0.01, per_text=0.001)
    simulation.run(arrivals)
    assert sum(simulation.sizes) == len(simulation.latencies) == 2000
    assert max(simulation.sizes) <= 32
    if rate < 760:
        # One that arrives while a batch runs may have to wait for its end.
        assert max(simulation.latencies) < 0.1 + 0.042
    else:
        assert sum(simulation.sizes[5:-5]) / len(simulation.sizes[5:-5]) > 30
    if rate == 20 and min_batch == 1:
        assert sorted(simulation.latencies)[1000] < 0.1
