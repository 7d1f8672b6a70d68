"""Calls that wait for a shard are computed together, with the bits of calls computed one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from deepseek_ray.actors.expert_frames import CallContent
from deepseek_ray.actors.joint_calls import JointCalls
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore
from tests.checkpoints import tiny_config, write_random_checkpoint

LAYER, OTHER_LAYER, HELD = 1, 2, 6


class Shard:
    """Computes with real experts, when it is let; remembers layer and pairs of every computation."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store
        self._may_compute = threading.Event()
        self.computed: list[tuple[int, int]] = []
        self.calls = JointCalls(self._compute)
        self.threads = ThreadPoolExecutor(8)

    def _compute(self, layer: int, content: CallContent) -> torch.Tensor | None:
        self._may_compute.wait(10)
        self.computed.append((layer, len(content.pair_experts)))
        if content.hidden.isinf().any():
            raise RuntimeError("infinite")
        return self._store.run(layer, *content)

    def send_at_once(self, *calls: tuple[int, CallContent]) -> list[Future[torch.Tensor | None]]:
        """The first is being computed while the others come."""
        results = []
        for number, (layer, content) in enumerate(calls):
            results.append(self.threads.submit(self.calls.run, layer, content))
            self._wait_until(lambda number=number: self._num_here() == number + 1)  # type: ignore[misc]
        self._may_compute.set()
        return results

    def _num_here(self) -> int:
        return len(self.calls._waiting) + self.calls._computing.locked()

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        pause = threading.Event()
        for _ in range(10000):
            if holds():
                return
            pause.wait(0.001)
        pytest.fail("a call did not arrive")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    reader = CheckpointReader(write_random_checkpoint(tmp_path_factory.mktemp("joint") / "m", tiny_config()))
    return ExpertStore(reader, {LAYER: range(HELD), OTHER_LAYER: range(HELD)}, torch.float32)


@pytest.fixture
def shard(store: ExpertStore) -> Iterator[Shard]:
    shard = Shard(store)
    yield shard
    shard.threads.shutdown()


def call(seed: int, rows: int = 3, experts: int = HELD) -> CallContent:
    generator = torch.Generator().manual_seed(seed)
    pair_rows = torch.arange(rows).repeat_interleave(2)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(rows)])
    return CallContent(torch.randn(rows, 32, generator=generator), pair_rows, chosen.flatten())


def test_calls_of_one_layer_that_wait_are_computed_together(shard: Shard, store: ExpertStore) -> None:
    calls = [(LAYER, call(0)), (LAYER, call(1)), (OTHER_LAYER, call(2)), (LAYER, call(3, rows=5))]
    for result, (layer, content) in zip(shard.send_at_once(*calls), calls, strict=True):
        rows = result.result()
        assert rows is not None
        assert torch.equal(rows, store.run(layer, *content))  # type: ignore[arg-type]
    assert sorted(shard.computed) == [(LAYER, 6), (LAYER, 6 + 10), (OTHER_LAYER, 6)]
    assert shard.calls.num_computations == 3


def test_a_call_for_an_expert_that_is_not_here_does_not_spoil_the_others(shard: Shard, store: ExpertStore) -> None:
    missing = CallContent(torch.ones(1, 32), torch.zeros(1, dtype=torch.int64), torch.tensor([HELD]))
    fine = call(4)
    results = shard.send_at_once((OTHER_LAYER, call(0)), (LAYER, missing), (LAYER, fine))
    assert results[1].result() is None
    assert torch.equal(results[2].result(), store.run(LAYER, *fine))  # type: ignore[arg-type]


def test_an_error_is_that_of_every_call_it_was_computed_with(shard: Shard) -> None:
    bad = call(5)
    bad.hidden[0] = torch.inf
    results = shard.send_at_once((OTHER_LAYER, call(0)), (LAYER, bad), (LAYER, call(6)))
    assert results[0].exception() is None
    for result in results[1:]:
        with pytest.raises(RuntimeError, match="infinite"):
            result.result()
    assert shard.calls.run(LAYER, call(7)) is not None, "the next call is computed"


def test_alone_means_alone(shard: Shard) -> None:
    shard._may_compute.set()
    with shard.calls.alone() as compute:
        waiting = [shard.threads.submit(shard.calls.run, LAYER, call(seed)) for seed in (8, 9)]
        shard._wait_until(lambda: len(shard.calls._waiting) == 2)
        assert compute(LAYER, call(10)) is not None
        assert shard.computed == [(LAYER, 6)]
    assert all(result.result() is not None for result in waiting)
    assert shard.computed == [(LAYER, 6), (LAYER, 12)]
