"""Expert calls over real links in one process: the remote backend gives the local one's bits, also after a loss."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from deepseek_ray.actors.expert_client import RemoteExperts, ShardDirectory, StepInterruptedError
from deepseek_ray.actors.expert_service import ExpertService
from deepseek_ray.control.membership import ShardAddress
from deepseek_ray.expert_parallel.placement import contiguous_placement, experts_of_shard
from deepseek_ray.expert_parallel.table import RoutingTable
from deepseek_ray.links.base import Link, Transport
from deepseek_ray.links.connect import connect, listen
from deepseek_ray.links.listener import Listener
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore, LocalExperts
from tests.checkpoints import tiny_config, write_random_checkpoint

SECRET = b"s" * 32
LAYER, EXPERTS, HIDDEN = 1, 8, 32
OWNERS = contiguous_placement([LAYER, 2], EXPERTS, 2)


class Shards:
    """Two expert services whose "processes" can end and come back with a higher incarnation."""

    def __init__(self, reader: CheckpointReader, dtype: torch.dtype, transport: Transport) -> None:
        self._reader, self._dtype, self._transport = reader, dtype, transport
        self._listeners: dict[int, Listener] = {}
        self._links: dict[int, list[Link]] = {0: [], 1: []}
        self.incarnation = {0: 0, 1: 0}
        self.directory = ShardDirectory()
        self.epoch = 0
        for shard in range(2):
            self.start(shard)
        self.publish()

    def start(self, shard: int, loaded: bool = True) -> ExpertService:
        self.incarnation[shard] += 1
        self._listeners[shard] = listen("node", "127.0.0.1", "d", SECRET, self._transport, self.incarnation[shard])
        service = ExpertService(_Recording(self._listeners[shard], self._links[shard]), HIDDEN)
        if loaded:
            service.hold(self.store(shard))
        service.start()
        return service

    def store(self, shard: int) -> ExpertStore:
        return ExpertStore(self._reader, experts_of_shard(OWNERS, shard), self._dtype)

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
        self.directory.update(RoutingTable(1, self.epoch, OWNERS), addresses)

    def backend(
        self, ask_for_news: Callable[[], None] = lambda: None, interrupted: Callable[[], bool] = lambda: False
    ) -> RemoteExperts:
        def dial(address: ShardAddress) -> Link:
            return connect(address.endpoints, "node", "d", SECRET, self._transport, 5.0)

        return RemoteExperts(self.directory, dial, 1, ask_for_news, interrupted)


class _Recording:
    """A listener that remembers the links it handed out, so that a test can cut them."""

    def __init__(self, listener: Listener, links: list[Link]) -> None:
        self._listener, self._links = listener, links

    def accept(self, timeout: float | None = None) -> Link | None:
        link = self._listener.accept(timeout)
        if link is not None:
            self._links.append(link)
        return link


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> CheckpointReader:
    directory = tmp_path_factory.mktemp("model")
    return CheckpointReader(write_random_checkpoint(directory / "m", tiny_config()))


@pytest.fixture(params=["shared_memory", "tcp"])
def shards(request: pytest.FixtureRequest, reader: CheckpointReader) -> Iterator[Shards]:
    shards = Shards(reader, torch.float32, request.param)
    yield shards
    for shard in range(2):
        shards.end(shard)


def work(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN, generator=generator), ids


def local_rows(reader: CheckpointReader, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    store = ExpertStore(reader, {LAYER: range(EXPERTS)}, hidden.dtype)
    backend = LocalExperts(store)
    return backend.combine(backend.dispatch(LAYER, hidden, ids))


@pytest.mark.parametrize("tokens", [1, 5, 400])
def test_remote_equals_local_bit_for_bit(shards: Shards, reader: CheckpointReader, tokens: int) -> None:
    backend = shards.backend()
    hidden, ids = work(tokens)
    rows = backend.combine(backend.dispatch(LAYER, hidden, ids))
    assert torch.equal(rows, local_rows(reader, hidden, ids))
    assert backend.num_frames == len(set((ids >= EXPERTS // 2).flatten().tolist()))
    assert backend.num_frames_resent == 0


def test_bfloat16_travels(reader: CheckpointReader) -> None:
    shards = Shards(reader, torch.bfloat16, "auto")
    hidden, ids = work(7)
    backend = shards.backend()
    rows = backend.combine(backend.dispatch(LAYER, hidden.bfloat16(), ids))
    assert torch.equal(rows, local_rows(reader, hidden.bfloat16(), ids))
    for shard in range(2):
        shards.end(shard)


def test_frames_of_a_lost_shard_are_sent_to_its_next_process(shards: Shards, reader: CheckpointReader) -> None:
    returned = threading.Event()

    def news() -> None:  # the router publishes the new process once somebody asks
        if not returned.is_set():
            returned.set()
            shards.start(1)
            shards.publish()

    backend = shards.backend(ask_for_news=news)
    hidden, ids = work(6)
    backend.combine(backend.dispatch(LAYER, hidden, ids))
    shards.end(1)
    rows = backend.combine(backend.dispatch(LAYER, hidden, ids))
    assert returned.is_set()
    assert backend.num_frames_resent >= 1
    assert torch.equal(rows, local_rows(reader, hidden, ids))


def test_a_shard_that_has_not_loaded_yet_is_asked_again(shards: Shards, reader: CheckpointReader) -> None:
    shards.end(1)
    service = shards.start(1, loaded=False)
    shards.publish()

    def news() -> None:
        if not service.loaded:
            service.hold(shards.store(1))
            shards.publish()

    backend = shards.backend(ask_for_news=news)
    hidden, ids = work(6)
    rows = backend.combine(backend.dispatch(LAYER, hidden, ids))
    assert torch.equal(rows, local_rows(reader, hidden, ids))
    assert backend.num_frames_resent >= 1


def test_a_wait_for_experts_is_given_up_when_a_request_ends(shards: Shards, reader: CheckpointReader) -> None:
    shards.end(1)
    backend = shards.backend(interrupted=lambda: True)
    hidden, ids = work(6)
    with pytest.raises(StepInterruptedError):
        backend.combine(backend.dispatch(LAYER, hidden, ids))
    shards.start(1)
    shards.publish()
    rows = backend.combine(backend.dispatch(LAYER, hidden, ids))
    assert torch.equal(rows, local_rows(reader, hidden, ids))


def test_an_older_table_does_not_replace_a_newer_one(shards: Shards) -> None:
    newest = shards.directory.version
    shards.directory.update(RoutingTable(0, 99, OWNERS), {})
    assert shards.directory.version == newest
