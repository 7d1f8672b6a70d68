"""Expert services in this process, behind real links, whose "processes" can end, wait and come back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import cast

import torch

from deepseek_ray.actors.expert_client import RemoteExperts
from deepseek_ray.actors.expert_service import ExpertService
from deepseek_ray.actors.shard_directory import ShardDirectory
from deepseek_ray.actors.tensor_link import TensorPlace
from deepseek_ray.control.reports import ShardAddress
from deepseek_ray.errors import LinkClosedError
from deepseek_ray.expert_parallel.placement import Placement, contiguous_placement, experts_of_shard
from deepseek_ray.expert_parallel.table import RoutingTable
from deepseek_ray.links.base import Link, Transport
from deepseek_ray.links.connect import connect, listen
from deepseek_ray.links.frame import Frame
from deepseek_ray.links.listener import Listener
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore, LocalExperts

SECRET = b"s" * 32
LAYER, EXPERTS, HIDDEN = 1, 8, 32
PLACEMENT = contiguous_placement([LAYER, 2], EXPERTS, range(2))
BOTH = {layer: [(0, 1)] * EXPERTS for layer in (LAYER, 2)}
"""Every expert on both shards."""


class Shards:
    """Two expert services whose "processes" can end and come back with a higher incarnation."""

    def __init__(
        self,
        reader: CheckpointReader,
        dtype: torch.dtype,
        medium: str,
        placement: Placement = PLACEMENT,
        poison: float | None = None,
    ) -> None:
        """`medium`: a transport, or one with "+tensors". `poison`: a value in the input that ends the shard that
        computes with it."""
        transport, _, tensors = medium.partition("+")
        self._reader, self._dtype, self._transport = reader, dtype, cast(Transport, transport)
        self._by_tensor = bool(tensors)
        self.placement = placement
        self.stores: dict[int, ExpertStore] = {}
        self.services: dict[int, ExpertService] = {}
        self.crashed: Callable[[int], None] = lambda shard: None
        self._poison = poison
        self._listeners: dict[int, Listener] = {}
        self._links: dict[int, list[Link]] = {0: [], 1: []}
        self.incarnation = {0: 0, 1: 0}
        self.answers = {0: threading.Event(), 1: threading.Event()}
        """Cleared, a shard takes calls and answers none until it is set."""
        self.copies = 1
        """How often each answer is sent."""
        self.directory = ShardDirectory()
        self.epoch = 0
        for shard in range(2):
            self.start(shard)
        self.publish()

    def start(self, shard: int, loaded: bool = True) -> ExpertStore:
        """A new process of the shard: what it holds."""
        self.incarnation[shard] += 1
        self._listeners[shard] = listen(
            *("node", "127.0.0.1", "d", SECRET, self._transport, self.incarnation[shard]),
            tensors=TensorPlace(f"gloo:shard {shard}") if self._by_tensor else None,
        )
        self.answers[shard].set()
        store = ExpertStore(self._reader, self.experts_of(shard) if loaded else {}, self._dtype)
        self.stores[shard] = store
        if self._poison is not None:
            self._add_poison(shard, store)
        listener = _Recording(self._listeners[shard], self._links[shard], self.answers[shard], lambda: self.copies)
        self.services[shard] = ExpertService(listener, store, HIDDEN)
        self.services[shard].start()
        return store

    def _add_poison(self, shard: int, store: ExpertStore) -> None:
        run = store.run

        def run_or_crash(layer: int, hidden: torch.Tensor, *pairs: torch.Tensor) -> torch.Tensor | None:
            if hidden.eq(self._poison).any():
                self.crashed(shard)
                raise LinkClosedError("the process has crashed")
            return run(layer, hidden, *pairs)

        store.run = run_or_crash  # type: ignore[method-assign]

    def restart(self, shard: int) -> None:
        """The process ends, and the next one is published."""
        self.end(shard)
        self.start(shard)
        self.publish()

    def experts_of(self, shard: int) -> dict[int, list[int]]:
        return experts_of_shard(self.placement, shard)

    def end(self, shard: int) -> None:
        self._listeners[shard].close()
        for link in self._links[shard]:
            link.close()
        self._links[shard].clear()

    def publish(self) -> None:
        self.epoch += 1
        addresses = {
            shard: ShardAddress(self.incarnation[shard], listener.endpoints)
            for shard, listener in self._listeners.items()
        }
        self.directory.update(RoutingTable(1, self.epoch, self.placement), addresses)

    def backend(
        self,
        ask_for_news: Callable[[], None] = lambda: None,
        interrupted: Callable[[], bool] = lambda: False,
        hedge_after_seconds: float = 30.0,
        node_with_our_cores: str | None = None,
    ) -> RemoteExperts:
        def dial(address: ShardAddress) -> Link:
            tensors = TensorPlace("gloo:worker") if self._by_tensor else None
            return connect(address.endpoints, "node", "d", SECRET, self._transport, 5.0, tensors=tensors)

        return RemoteExperts(
            self.directory, dial, 1, ask_for_news, interrupted, hedge_after_seconds, node_with_our_cores
        )


class _Recording:
    """A listener that remembers the links it handed out, so that a test can cut them or hold their answers back."""

    def __init__(
        self, listener: Listener, links: list[Link], answers: threading.Event, copies: Callable[[], int]
    ) -> None:
        self._listener, self._links, self._answers, self._copies = listener, links, answers, copies

    def accept(self, timeout: float | None = None) -> Link | None:
        link = self._listener.accept(timeout)
        if link is not None:
            self._links.append(link)
            send = link.send

            def send_when_allowed(frame: Frame) -> None:
                self._answers.wait()
                for _ in range(self._copies()):
                    send(frame)

            link.send = send_when_allowed  # type: ignore[method-assign]
        return link


def work(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN, generator=generator), ids


def local_rows(reader: CheckpointReader, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return rows_of(reader, LAYER, hidden, ids)


def rows_of(reader: CheckpointReader, layer: int, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    store = ExpertStore(reader, {layer: range(EXPERTS)}, hidden.dtype)
    backend = LocalExperts(store)
    return backend.combine(backend.dispatch(layer, hidden, ids))
