"""Expert calls over real links in one process: the remote backend gives the local one's bits, also after a loss."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from deepseek_ray.actors.expert_client import StepInterruptedError
from deepseek_ray.expert_parallel.table import RoutingTable
from deepseek_ray.models.checkpoint import CheckpointReader
from tests.expert_shards import EXPERTS, LAYER, PLACEMENT, Shards, local_rows, rows_of, work


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


@pytest.mark.parametrize("medium", ["auto", "auto+tensors"])
def test_bfloat16_travels(reader: CheckpointReader, medium: str) -> None:
    shards = Shards(reader, torch.bfloat16, medium)
    hidden, ids = work(7)
    backend = shards.backend()
    rows = backend.combine(backend.dispatch(LAYER, hidden.bfloat16(), ids))
    assert {link.takes_tensors for link in backend._links.open} == {"tensors" in medium}
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
    backend = twins.backend(hedge_after_seconds=0.2)
    hidden, ids = work(9)
    backend.combine(backend.dispatch(LAYER, hidden, ids))  # opens the links
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


def test_an_overdue_call_goes_to_where_its_experts_are_now(twins: Shards, reader: CheckpointReader) -> None:
    """The shard hangs with its link open; nobody else has its experts, until the router says that another one has."""
    everything = {layer: [(1,)] * EXPERTS for layer in (LAYER, 2)}
    twins.placement = everything
    twins.publish()
    twins.answers[1].clear()
    backend = twins.backend(hedge_after_seconds=0.05)
    hidden, ids = work(9)
    ticket = backend.dispatch(LAYER, hidden, ids)
    twins.placement = {layer: [(0,)] * EXPERTS for layer in (LAYER, 2)}
    twins.publish()
    assert torch.equal(backend.combine(ticket), local_rows(reader, hidden, ids))
    twins.answers[1].set()
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


def test_an_older_table_does_not_replace_a_newer_one(shards: Shards) -> None:
    newest = shards.directory.version
    shards.directory.update(RoutingTable(0, 99, PLACEMENT), {})
    assert shards.directory.version == newest


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_several_calls_are_on_their_way_at_once(
    shards: Shards, reader: CheckpointReader, order: tuple[int, ...]
) -> None:
    """Micro-batches: answers to one come while another one is waited for."""
    backend = shards.backend()
    works = [work(5 + seed, seed) for seed in range(3)]
    tickets = [backend.dispatch(LAYER, *each) for each in works]
    for place in order:
        assert torch.equal(backend.combine(tickets[place]), local_rows(reader, *works[place]))
    assert backend.num_frames_resent == 0
    backend.close()


def test_all_calls_on_their_way_go_to_the_next_process_of_a_lost_shard(
    shards: Shards, reader: CheckpointReader
) -> None:
    backend = shards.backend()
    works = [work(9, seed) for seed in range(3)]
    shards.answers[1].clear()
    tickets = [backend.dispatch(LAYER, *each) for each in works]
    shards.restart(1)
    for ticket, each in zip(tickets, works, strict=True):
        assert torch.equal(backend.combine(ticket), local_rows(reader, *each))
    assert backend.num_frames_resent >= 3
    backend.close()


def test_a_step_that_is_given_up_waits_for_none_of_its_calls(shards: Shards, reader: CheckpointReader) -> None:
    ended = threading.Event()
    backend = shards.backend(interrupted=ended.is_set)
    shards.answers[1].clear()
    hidden, ids = work(9)
    first, _ = (backend.dispatch(LAYER, hidden, ids) for _ in range(2))
    ended.set()
    with pytest.raises(StepInterruptedError):
        backend.combine(first)
    shards.answers[1].set()
    ended.clear()
    assert torch.equal(backend.combine(backend.dispatch(LAYER, hidden, ids)), local_rows(reader, hidden, ids))
    backend.close()
