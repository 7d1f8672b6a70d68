from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_ray.engine.kv_blocks import KVBlocks, blocks_for
from deepseek_ray.engine.scheduler import ScheduledStep, Scheduler
from deepseek_ray.engine.sequence import Sequence, SequenceStatus
from deepseek_ray.errors import RequestError
from deepseek_ray.messages import GenerateRequest, SamplingParams


def make_sequence(name: str, num_prompt: int, num_resumed: int = 0) -> Sequence:
    request = GenerateRequest(
        request_id=name, prompt_token_ids=[1] * num_prompt, output_token_ids=[2] * num_resumed, params=SamplingParams()
    )
    return Sequence(request)


def make_scheduler(num_blocks: int = 8, block_size: int = 4, max_num_seqs: int = 4, budget: int = 16) -> Scheduler:
    return Scheduler(KVBlocks(num_blocks, block_size), max_num_seqs, budget)


def shape(step: ScheduledStep) -> list[tuple[str, int, int]]:
    return [(item.sequence.request.request_id, item.start, item.num_tokens) for item in step.items]


def run(scheduler: Scheduler, step: ScheduledStep) -> None:
    """What an engine does with a step."""
    scheduler.advance(step)
    for sequence in step.sampled:
        sequence.append(3)


def test_prompts_are_cut_to_the_budget_and_decodes_come_first() -> None:
    scheduler = make_scheduler(num_blocks=20, budget=10)
    for name, num_prompt in (("a", 4), ("b", 9)):
        scheduler.add(make_sequence(name, num_prompt), 20)
    step = scheduler.schedule()
    assert shape(step) == [("a", 0, 4), ("b", 0, 6)]
    assert [sequence.request.request_id for sequence in step.sampled] == ["a"]
    run(scheduler, step)
    step = scheduler.schedule()
    assert shape(step) == [("a", 4, 1), ("b", 6, 3)]
    assert [sequence.request.request_id for sequence in step.sampled] == ["a", "b"]


def test_a_step_that_failed_is_scheduled_again() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", 4), 20)
    first = shape(scheduler.schedule())
    assert shape(scheduler.schedule()) == first


def test_the_last_one_is_preempted_and_nobody_admitted() -> None:
    scheduler = make_scheduler(num_blocks=3, block_size=4)
    sequences = {name: make_sequence(name, 4) for name in "abc"}
    scheduler.add(sequences["a"], 9)
    scheduler.add(sequences["b"], 9)
    run(scheduler, scheduler.schedule())  # a and b have one full block each
    scheduler.add(sequences["c"], 9)
    step = scheduler.schedule()  # a takes the third block, b has none and preempts itself; its block stays free
    assert shape(step) == [("a", 4, 1)]
    assert step.preempted == [sequences["b"]]
    assert [sequence.request.request_id for sequence in scheduler.waiting] == ["b", "c"]
    assert (sequences["b"].num_computed_tokens, sequences["b"].block_table) == (0, [])
    assert (scheduler.blocks.num_free, scheduler.num_preemptions) == (1, 1)


def test_a_preempted_sequence_is_computed_again_with_its_output() -> None:
    scheduler = make_scheduler(num_blocks=3, block_size=4)
    a, b = make_sequence("a", 4), make_sequence("b", 4)
    scheduler.add(a, 9)
    scheduler.add(b, 9)
    run(scheduler, scheduler.schedule())
    run(scheduler, scheduler.schedule())
    scheduler.finish(a)
    assert shape(scheduler.schedule()) == [("b", 0, 5)], "prompt and the token it had"


def test_at_most_max_num_seqs_run() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(make_sequence(name, 1), 4)
    assert len(scheduler.schedule().items) == 2


def test_a_sequence_that_can_never_fit_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    scheduler.add(make_sequence("fits", 4), 9)  # 8 tokens are stored, the ninth is never fed back
    with pytest.raises(RequestError, match=r"10 tokens.*3 cache blocks.*there are 2.*lower max_tokens"):
        scheduler.add(make_sequence("too long", 4), 10)


@st.composite
def workloads(draw: st.DrawFn) -> dict:
    block_size = draw(st.integers(1, 5))
    num_blocks = draw(st.integers(2, 12))
    capacity = num_blocks * block_size + 1
    lengths = []
    for _ in range(draw(st.integers(1, 12))):
        total = draw(st.integers(2, capacity))
        prompt = draw(st.integers(1, total - 1))
        resumed = draw(st.integers(0, total - 1 - prompt))
        arrival, abort = draw(st.integers(0, 10)), draw(st.none() | st.integers(0, 20))
        lengths.append((prompt, resumed, total, arrival, abort))
    return {
        "block_size": block_size,
        "num_blocks": num_blocks,
        "max_num_seqs": draw(st.integers(1, 6)),
        "budget": draw(st.integers(1, 20)),
        "sequences": lengths,
    }


@settings(max_examples=150)
@given(workloads())
def test_whatever_comes_nothing_leaks_and_everything_finishes_in_turn(workload: dict) -> None:
    scheduler = make_scheduler(
        workload["num_blocks"], workload["block_size"], workload["max_num_seqs"], workload["budget"]
    )
    arrivals = sorted(enumerate(workload["sequences"]), key=lambda entry: entry[1][3])
    goal: dict[Sequence, int] = {}
    order: list[Sequence] = []
    abort_at: dict[Sequence, int | None] = {}
    step_number = 0
    while arrivals or scheduler.has_sequences:
        assert step_number < 5000, "it does not finish"
        while arrivals and arrivals[0][1][3] <= step_number:
            name, (prompt, resumed, total, _, abort) = arrivals.pop(0)
            sequence = make_sequence(str(name), prompt, resumed)
            scheduler.add(sequence, total)
            goal[sequence], abort_at[sequence] = total, abort
            order.append(sequence)
        step = scheduler.schedule()
        check_step(scheduler, step, order)
        scheduler.advance(step)
        for sequence in step.sampled:
            sequence.append(3)
            if sequence.num_tokens == goal[sequence]:
                scheduler.finish(sequence)
        for sequence, when in abort_at.items():
            if when == step_number and sequence.status is not SequenceStatus.FINISHED:
                scheduler.finish(sequence)
        step_number += 1
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
    for sequence in order:
        assert sequence.status is SequenceStatus.FINISHED
        assert abort_at[sequence] is not None or sequence.num_tokens == goal[sequence]


def check_step(scheduler: Scheduler, step: ScheduledStep, order: list[Sequence]) -> None:
    assert bool(step.items) == scheduler.has_sequences, "every step makes progress"
    assert step.num_tokens <= scheduler.max_num_batched_tokens
    assert len(scheduler.running) <= scheduler.max_num_seqs
    live = [*scheduler.running, *scheduler.waiting]
    assert live == sorted(live, key=order.index), "whoever came earlier runs or waits before whoever came later"
    held = [block for sequence in live for block in sequence.block_table]
    assert len(held) == len(set(held)) == scheduler.blocks.num_used
    assert not any(sequence.block_table for sequence in scheduler.waiting)
    for item in step.items:
        assert item.sequence in scheduler.running
        assert item.start == item.sequence.num_computed_tokens
        assert 0 < item.num_tokens <= item.sequence.num_uncomputed_tokens
        assert len(item.sequence.block_table) >= blocks_for(item.start + item.num_tokens, scheduler.blocks.block_size)
    if step.preempted:
        newcomers = [item for item in step.items if item.start == 0 and item.sequence.num_output_tokens == 0]
        assert all(order.index(item.sequence) < order.index(step.preempted[-1]) for item in newcomers)
