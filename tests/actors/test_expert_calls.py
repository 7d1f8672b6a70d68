"""Expert calls over real links in one process: the remote backend gives the local one's bits, also after a loss."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from deepseek_ray.actors.expert_client import RemoteExperts, StepInterruptedError
from deepseek_ray.actors.expert_service import ExpertService
from deepseek_ray.actors.shard_directory import ShardDirectory
from deepseek_ray.control.reports import ShardAddress
from deepseek_ray.errors import ExpertsCrashedError, LinkClosedError, LinkLostError
from deepseek_ray.expert_parallel.placement import Placement, contiguous_placement, experts_of_shard
from deepseek_ray.expert_parallel.table import RoutingTable
from deepseek_ray.links.base import Link, Transport
from deepseek_ray.links.connect import connect, listen
from deepseek_ray.links.frame import Frame
from deepseek_ray.links.listener import Listener
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore, LocalExperts
from tests.checkpoints import tiny_config, write_random_checkpoint

SECRET = b"s" * 32
LAYER, EXPERTS, HIDDEN = 1, 8, 32
PLACEMENT = contiguous_placement([LAYER, 2], EXPERTS, range(2))


class Shards:
    """Two expert services whose "processes" can end and come back with a higher incarnation."""

    def __init__(
        self,
        reader: CheckpointReader,
        dtype: torch.dtype,
        transport: Transport,
        placement: Placement = PLACEMENT,
        poison: float | None = None,
    ) -> None:
        """`poison`: a value in the input that ends the shard that computes with it."""
        self._reader, self._dtype, self._transport = reader, dtype, transport
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
        self._listeners[shard] = listen("node", "127.0.0.1", "d", SECRET, self._transport, self.incarnation[shard])
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
            return connect(address.endpoints, "node", "d", SECRET, self._transport, 5.0)

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


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> CheckpointReader:
    directory = tmp_path_factory.mktemp("model")
    return CheckpointReader(write_random_checkpoint(directory / "m", tiny_config()))


BOTH = {layer: [(0, 1)] * EXPERTS for layer in (LAYER, 2)}
"""Every expert on both shards."""


@pytest.fixture(params=["shared_memory", "tcp"])
def twins(request: pytest.FixtureRequest, reader: CheckpointReader) -> Iterator[Shards]:
    """Two shards that hold all experts each."""
    shards = Shards(reader, torch.float32, request.param, BOTH)
    yield shards
    for shard in range(2):
        shards.end(shard)


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
    return rows_of(reader, LAYER, hidden, ids)


def rows_of(reader: CheckpointReader, layer: int, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    store = ExpertStore(reader, {layer: range(EXPERTS)}, hidden.dtype)
    backend = LocalExperts(store)
    return backend.combine(backend.dispatch(layer, hidden, ids))


@pytest.mark.parametrize("tokens", [1, 5, 400])
def test_remote_equals_local_bit_for_bit(shards: Shards, reader: CheckpointReader, tokens: int) -> None:
    backend = shards.backend()
    hidden, ids = work(tokens)
    rows = backend.combine(backend.dispatch(LAYER, hidden, ids))
    assert torch.equal(rows, local_rows(reader, hidden, ids))
    assert backend.num_frames == len(set((ids >= EXPERTS // 2).flatten().tolist()))
    assert backend.num_frames_resent == 0


@pytest.mark.parametrize(("node", "shared"), [("node", True), ("another", False), (None, False)])
def test_it_knows_whether_shards_compute_on_its_cores(shards: Shards, node: str | None, shared: bool) -> None:
    backend = shards.backend(node_with_our_cores=node)
    ticket = backend.dispatch(LAYER, *work(4))
    assert backend.uses_our_cores(ticket) == shared
    backend.combine(ticket)
    backend.close()


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
    store = shards.start(1, loaded=False)
    shards.publish()

    def news() -> None:
        if not store.held:
            for layer, experts in shards.experts_of(1).items():
                for expert in experts:
                    store.load(layer, expert)
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


def test_replicas_share_the_work_and_give_the_same_bits(twins: Shards, reader: CheckpointReader) -> None:
    backend = twins.backend()
    hidden, ids = work(9)
    assert torch.equal(backend.combine(backend.dispatch(LAYER, hidden, ids)), local_rows(reader, hidden, ids))
    assert backend.num_frames == 2
    backend.close()


def test_frames_of_a_lost_shard_go_to_the_replica_without_a_word_from_the_router(
    twins: Shards, reader: CheckpointReader
) -> None:
    backend = twins.backend()
    hidden, ids = work(9)
    backend.combine(backend.dispatch(LAYER, hidden, ids))
    ticket = backend.dispatch(LAYER, hidden, ids)
    twins.end(1)
    assert torch.equal(backend.combine(ticket), local_rows(reader, hidden, ids))
    assert backend.lost_shards() == {1: 1}
    frames = backend.num_frames
    assert torch.equal(backend.combine(backend.dispatch(2, hidden, ids)), rows_of(reader, 2, hidden, ids))
    assert backend.num_frames == frames + 1, "the lost shard is not asked again"
    backend.close()


def test_a_lost_shard_is_asked_again_once_it_can_be_reached(twins: Shards, reader: CheckpointReader) -> None:
    backend = twins.backend()
    hidden, ids = work(9)
    backend.combine(backend.dispatch(LAYER, hidden, ids))
    twins.end(1)
    backend.combine(backend.dispatch(LAYER, hidden, ids))
    twins.start(1)
    twins.publish()
    deadline = time.monotonic() + 10
    while backend.lost_shards():
        assert time.monotonic() < deadline, "nobody looked for the new process"
        assert torch.equal(backend.combine(backend.dispatch(LAYER, hidden, ids)), local_rows(reader, hidden, ids))
    frames = backend.num_frames
    backend.combine(backend.dispatch(LAYER, hidden, ids))
    assert backend.num_frames == frames + 2
    backend.close()


def test_an_overdue_call_goes_to_the_replica_and_its_late_answer_is_dropped(
    twins: Shards, reader: CheckpointReader
) -> None:
    backend = twins.backend(hedge_after_seconds=0.05)
    hidden, ids = work(9)
    twins.answers[1].clear()
    assert torch.equal(backend.combine(backend.dispatch(LAYER, hidden, ids)), local_rows(reader, hidden, ids))
    assert backend.num_frames_hedged == 1
    frames = backend.num_frames
    other, other_ids = work(9, seed=1)
    assert torch.equal(backend.combine(backend.dispatch(LAYER, other, other_ids)), local_rows(reader, other, other_ids))
    assert backend.num_frames == frames + 1, "a suspect is left alone"
    twins.answers[1].set()
    deadline, frames = time.monotonic() + 10, 0
    while frames < 2:  # heard again, it is asked again
        assert time.monotonic() < deadline
        before = backend.num_frames
        rows = backend.combine(backend.dispatch(LAYER, other, other_ids))
        assert torch.equal(rows, local_rows(reader, other, other_ids))
        frames = backend.num_frames - before
    backend.close()


def test_answers_that_come_twice_change_nothing(shards: Shards, reader: CheckpointReader) -> None:
    """The second copies arrive while later calls wait, whose places they must not take."""
    shards.copies = 2
    backend = shards.backend()
    for seed in range(5):
        hidden, ids = work(6, seed)
        assert torch.equal(backend.combine(backend.dispatch(LAYER, hidden, ids)), local_rows(reader, hidden, ids))
    backend.close()


def test_a_slow_shard_without_a_replica_is_waited_for(shards: Shards, reader: CheckpointReader) -> None:
    backend = shards.backend(hedge_after_seconds=0.05)
    hidden, ids = work(6)
    shards.answers[1].clear()
    ticket = backend.dispatch(LAYER, hidden, ids)
    threading.Timer(0.3, shards.answers[1].set).start()
    assert torch.equal(backend.combine(ticket), local_rows(reader, hidden, ids))
    assert backend.num_frames_hedged == 0
    assert backend.num_frames_resent == 0
    backend.close()


@pytest.mark.parametrize("placement", [PLACEMENT, BOTH], ids=["one replica", "two replicas"])
def test_an_expert_whose_weights_went_bad_is_named_and_read_anew(
    reader: CheckpointReader, placement: Placement, caplog: pytest.LogCaptureFixture
) -> None:
    shards = Shards(reader, torch.float32, "auto", placement)
    hidden, ids = work(9)
    bad = int(ids[0, 0])
    for store in shards.stores.values():
        if store.holds(LAYER, bad):
            store.weights_of(LAYER, bad).fill_(torch.nan)
    backend = shards.backend()
    rows = backend.combine(backend.dispatch(LAYER, hidden, ids))
    assert torch.equal(rows, local_rows(reader, hidden, ids))
    assert backend.num_experts_wrong == 1
    assert f"experts [{bad}] of layer {LAYER} on shard" in caplog.text
    assert torch.equal(backend.combine(backend.dispatch(LAYER, hidden, ids)), rows)
    assert backend.num_experts_wrong == 1, "it was mended"
    backend.close()
    for shard in range(2):
        shards.end(shard)


def test_values_that_are_not_finite_without_a_fault_of_the_experts_come_back_as_they_are(
    shards: Shards, reader: CheckpointReader
) -> None:
    backend = shards.backend()
    hidden, ids = work(4)
    hidden[2] = torch.inf
    rows = backend.combine(backend.dispatch(LAYER, hidden, ids))
    assert rows[2].isnan().any()
    assert torch.equal(rows[[0, 1, 3]], local_rows(reader, hidden, ids)[[0, 1, 3]])
    assert backend.num_experts_wrong == 0
    backend.close()


@pytest.mark.parametrize("placement", [PLACEMENT, BOTH], ids=["one replica", "two replicas"])
@pytest.mark.parametrize("row", [0, 5, 8])
def test_a_token_that_crashes_shards_is_found_after_two_crashes(
    reader: CheckpointReader, placement: Placement, row: int
) -> None:
    shards = Shards(reader, torch.float32, "auto", placement, poison=666.0)
    shards.crashed = shards.restart
    backend = shards.backend()
    hidden, ids = work(9)
    hidden[row, 3] = 666.0
    with pytest.raises(
        ExpertsCrashedError, match=f"in layer {LAYER} has crashed the process of its experts twice"
    ) as e:
        backend.combine(backend.dispatch(LAYER, hidden, ids))
    assert e.value.row == row
    # The token's experts are on both shards: each may fall once, and once more over the token alone.
    assert sum(shards.incarnation.values()) - 2 <= 4
    others = [other for other in range(9) if other != row]
    rows = backend.combine(backend.dispatch(LAYER, hidden[others], ids[others]))
    assert torch.equal(rows, local_rows(reader, hidden[others], ids[others]))
    backend.close()
    for shard in range(2):
        shards.end(shard)


def test_a_token_is_not_to_blame_when_it_waits_for_its_turn(shards: Shards, reader: CheckpointReader) -> None:
    """The shard dies twice, the second time over another worker's token while this one's wait."""
    backend = shards.backend()
    hidden, ids = work(9)
    backend.combine(backend.dispatch(LAYER, hidden, ids))
    shards.answers[1].clear()
    ticket = backend.dispatch(2, hidden, ids)
    shards.restart(1)
    with shards.services[1].calls.alone(), ThreadPoolExecutor() as threads:
        rows = threads.submit(backend.combine, ticket)
        while not shards.services[1].num_calls:  # sent again, token by token
            assert not rows.done()
        shards.restart(1)
    assert torch.equal(rows.result(), rows_of(reader, 2, hidden, ids))
    backend.close()


@pytest.mark.parametrize("copies", [1, 2])
def test_a_shard_that_dies_once_is_nobody_s_fault(twins: Shards, reader: CheckpointReader, copies: int) -> None:
    """The same deaths without a poisoned token: each is answered alone, and answers that come twice count once."""
    twins.copies = copies
    backend = twins.backend()
    hidden, ids = work(9)
    backend.combine(backend.dispatch(LAYER, hidden, ids))
    for layer in (LAYER, 2, LAYER):
        twins.answers[1].clear()
        ticket = backend.dispatch(layer, hidden, ids)
        twins.restart(1)
        assert torch.equal(backend.combine(ticket), rows_of(reader, layer, hidden, ids))
    backend.close()


def test_a_token_is_not_to_blame_for_a_link_that_was_cut_off(shards: Shards, reader: CheckpointReader) -> None:
    """The shard dies once, and while its tokens are sent alone the network is gone for a while."""
    cuts = [LinkLostError("no packet reaches the peer")]
    dialled: list[Link] = []

    def dial(address: ShardAddress) -> Link:
        link = connect(address.endpoints, "node", "d", SECRET, "auto", 5.0)
        dialled.append(link)
        receive, is_second_of_a_shard = link.receive, len(dialled) == 3

        def receive_or_be_cut_off(timeout: float | None = None) -> Frame | None:
            if is_second_of_a_shard and cuts:
                raise cuts.pop()
            return receive(timeout)

        link.receive = receive_or_be_cut_off  # type: ignore[method-assign]
        return link

    backend = RemoteExperts(shards.directory, dial, 1, lambda: None, lambda: False, 30.0)
    hidden, ids = work(9)
    backend.combine(backend.dispatch(LAYER, hidden, ids))
    shards.answers[1].clear()
    ticket = backend.dispatch(LAYER, hidden, ids)
    shards.restart(1)
    assert torch.equal(backend.combine(ticket), local_rows(reader, hidden, ids))
    assert not cuts, "the link was cut off"
    backend.close()


def test_an_older_table_does_not_replace_a_newer_one(shards: Shards) -> None:
    newest = shards.directory.version
    shards.directory.update(RoutingTable(0, 99, PLACEMENT), {})
    assert shards.directory.version == newest
