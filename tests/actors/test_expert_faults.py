"""Experts that crash their process or give nonsense: who is to blame is found, nobody else notices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from deepseek_ray.actors.expert_client import RemoteExperts
from deepseek_ray.control.reports import ShardAddress
from deepseek_ray.errors import ExpertsCrashedError, LinkLostError
from deepseek_ray.expert_parallel.placement import Placement
from deepseek_ray.links.base import Link
from deepseek_ray.links.connect import connect
from deepseek_ray.links.frame import Frame
from deepseek_ray.models.checkpoint import CheckpointReader
from tests.expert_shards import BOTH, LAYER, PLACEMENT, SECRET, Shards, local_rows, rows_of, work


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


@pytest.mark.parametrize("bad", [0, 1])
def test_of_several_calls_the_one_with_the_token_is_named(reader: CheckpointReader, bad: int) -> None:
    """Two micro-batches; the row counts from the beginning of the step, whichever of them is waited for."""
    shards = Shards(reader, torch.float32, "auto", BOTH, poison=666.0)
    shards.crashed = shards.restart
    backend = shards.backend()
    works = [work(5), work(4, seed=1)]
    works[bad][0][3, 7] = 666.0

    def run() -> None:
        tickets = [backend.dispatch(LAYER, *each, first_row=5 * place) for place, each in enumerate(works)]
        for ticket in tickets:
            backend.combine(ticket)

    with pytest.raises(ExpertsCrashedError) as e:
        run()
    assert e.value.row == 5 * bad + 3
    good = works[1 - bad]
    assert torch.equal(backend.combine(backend.dispatch(LAYER, *good)), local_rows(reader, *good))
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
