"""A decode step of attention workers and expert shards on given machines, event by event.

Each attention worker computes one micro-batch at a time, in the order in which they become ready; a layer's routed
experts go to every shard as one call; a shard computes all waiting calls of the oldest one's layer at once
(`actors/joint_calls.py`); a micro-batch goes on when all shards have answered. So micro-batches hide each other's
experts and links (ping-pong, as MegaScale-Infer, arXiv 2504.02263, has it). What an operator takes is
`Probes.seconds`: bytes or arithmetic.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.roofline import Operator, Probes, attention_operators, expert_operator, head_operator
from deepseek_ray.config.model import ModelConfig

_ROW_BYTES = 2
"""Of each number that travels: bfloat16."""


class Machine(NamedTuple):
    """What one attention worker or one expert shard runs on."""

    probes: Probes
    efficiency: float = 1.0
    """Part of what the probes allow that operators reach."""

    def seconds(self, operators: Sequence[Operator]) -> float:
        return sum(self.probes.seconds(operator) for operator in operators) / self.efficiency


class Network(NamedTuple):
    """Between two machines, one way."""

    latency_seconds: float
    bytes_per_second: float
    call_seconds: float = 0.0
    """Of the worker's own time, to send a layer's calls and to take their answers."""

    def seconds(self, num_bytes: float) -> float:
        return self.latency_seconds + num_bytes / self.bytes_per_second


@dataclass(frozen=True)
class Deployment:
    """Who serves what. Every shard holds an equal part of the experts."""

    attention_workers: int
    expert_shards: int
    sequences: int
    """Of one attention worker."""
    context: int
    micro_batches: int = 1
    busiest_shard: float = 1.0
    """Load of the busiest shard over the mean."""
    joint_calls: bool = True
    """Off, a shard computes one call after the other."""
    attention: Machine | None = None
    experts: Machine | None = None
    network: Network | None = None


class Prediction(NamedTuple):
    step_seconds: float
    """Between two tokens of a sequence."""
    tokens_per_second: float
    """Of all workers."""
    attention_busy: float
    """Part of the time in which an attention worker computes."""
    experts_busy: float
    """The same of the busiest shard."""


def simulate(config: ModelConfig, deployment: Deployment, steps: int = 4) -> Prediction:
    """Decode `steps` tokens of every sequence."""
    return _Simulation(config, deployment).run(steps)


@dataclass
class _Call:
    """A layer's experts of one micro-batch, on their way through the shards."""

    worker: int
    micro_batch: int
    layers_done: int
    unanswered: int
    answered: float = 0.0
    """When the last answer arrived so far."""


class _Shard:
    """Computes what waits, all calls of the oldest one's layer at once."""

    def __init__(self, config: ModelConfig, deployment: Deployment, part: float) -> None:
        assert deployment.experts and deployment.network
        self._config, self._machine, self._part = config, deployment.experts, part
        self._joint = deployment.joint_calls
        self._rows = deployment.sequences / deployment.micro_batches
        pairs = self._rows * config.num_experts_per_tok * part
        row_bytes = config.hidden_size * _ROW_BYTES
        self.there = deployment.network.seconds(min(self._rows, pairs) * row_bytes)
        self.back = deployment.network.seconds(pairs * row_bytes)
        self.waiting: list[_Call] = []
        self.computing: list[_Call] = []
        self.busy = 0.0
        self._seconds = functools.cache(self._seconds_of)

    def start(self) -> float:
        """Take what is next; seconds until it is computed."""
        layers, first = self._config.num_hidden_layers, self.waiting[0]
        layer = first.layers_done % layers
        same = [call is first or (self._joint and call.layers_done % layers == layer) for call in self.waiting]
        self.computing = list(itertools.compress(self.waiting, same))
        self.waiting = [call for call, taken in zip(self.waiting, same, strict=True) if not taken]
        seconds = self._seconds(len(self.computing))
        self.busy += seconds
        return seconds

    def _seconds_of(self, calls: int) -> float:
        return self._machine.seconds([expert_operator(self._config, calls * self._rows, self._part)])


class _Simulation:
    def __init__(self, config: ModelConfig, deployment: Deployment) -> None:
        assert deployment.attention and deployment.network
        self._config, self._deployment = config, deployment
        self._layers = config.num_hidden_layers
        rows = deployment.sequences / deployment.micro_batches
        attention, call_seconds = deployment.attention, deployment.network.call_seconds
        self._attention = [
            attention.seconds(list(attention_operators(config, layer, rows, deployment.context)))
            + (call_seconds if config.is_moe_layer(layer) else 0.0)
            for layer in range(self._layers)
        ]
        self._attention[-1] += attention.seconds([head_operator(config, rows)])
        # The busiest shard and one that stands for all others, to which the same happens.
        count = deployment.expert_shards
        busiest = min(1.0, deployment.busiest_shard / count)
        parts = [busiest, (1 - busiest) / (count - 1)] if count > 1 else [1.0]
        self._shards = [_Shard(config, deployment, part) for part in parts]
        self._worker_free = [0.0] * deployment.attention_workers
        self._worker_busy = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._now = self._end = 0.0

    def run(self, steps: int) -> Prediction:
        deployment = self._deployment
        for worker in range(deployment.attention_workers):
            for micro_batch in range(deployment.micro_batches):
                self._at(0.0, functools.partial(self._attend, worker, micro_batch, 0, steps * self._layers))
        while self._events:
            self._now, _, happen = heapq.heappop(self._events)
            happen()
        sequences = deployment.sequences * deployment.attention_workers
        return Prediction(
            step_seconds=self._end / steps,
            tokens_per_second=sequences * steps / self._end,
            attention_busy=self._worker_busy / deployment.attention_workers / self._end,
            experts_busy=self._shards[0].busy / self._end,
        )

    def _at(self, time: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), happen))

    def _attend(self, worker: int, micro_batch: int, layers_done: int, total: int) -> None:
        """A micro-batch is ready for its next layer; the worker takes it when it is free."""
        if layers_done == total:
            self._end = max(self._end, self._now)
            return
        layer = layers_done % self._layers
        self._worker_free[worker] = max(self._worker_free[worker], self._now) + self._attention[layer]
        self._worker_busy += self._attention[layer]
        ready = self._worker_free[worker]
        if not self._config.is_moe_layer(layer):
            self._at(ready, functools.partial(self._attend, worker, micro_batch, layers_done + 1, total))
            return
        call = _Call(worker, micro_batch, layers_done, unanswered=len(self._shards))
        for shard in self._shards:
            self._at(ready + shard.there, functools.partial(self._arrive, shard, call, total))

    def _arrive(self, shard: _Shard, call: _Call, total: int) -> None:
        shard.waiting.append(call)
        if not shard.computing:
            self._at(self._now + shard.start(), functools.partial(self._answer, shard, total))

    def _answer(self, shard: _Shard, total: int) -> None:
        """A shard is done with what it took; it takes what waits."""
        for call in shard.computing:
            call.answered = max(call.answered, self._now + shard.back)
            call.unanswered -= 1
            if not call.unanswered:
                again = functools.partial(self._attend, call.worker, call.micro_batch, call.layers_done + 1, total)
                self._at(call.answered, again)
        shard.computing = []
        if shard.waiting:
            self._at(self._now + shard.start(), functools.partial(self._answer, shard, total))
