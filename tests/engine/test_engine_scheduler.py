from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_ray.engine.kv_blocks import KVBlocks, blocks_for
from deepseek_ray.engine.scheduler import ScheduledStep, Scheduler
from deepseek_ray.engine.sequence import Sequence, SequenceStatus
from deepseek_ray.errors import RequestError
from deepseek_ray.messages import GenerateRequest, SamplingParams


def make_sequence(
    name: str, num_prompt: int, num_resumed: int = 0, prompt: list[int] | None = None, **fields: Any
) -> Sequence:
    request = GenerateRequest(
        request_id=name,
        prompt_token_ids=prompt or [1] * num_prompt,
        output_token_ids=[2] * num_resumed,
        params=SamplingParams(),
        **fields,
    )
    return Sequence(request)


def make_scheduler(
    num_blocks: int = 8, block_size: int = 4, max_num_seqs: int = 4, budget: int = 16, prefix_caching: bool = True
) -> Scheduler:
    return Scheduler(KVBlocks(num_blocks, block_size), max_num_seqs, budget, prefix_caching)


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
    scheduler = make_scheduler(num_blocks=3, block_size=4, prefix_caching=False)
    a, b = make_sequence("a", 4), make_sequence("b", 4)
    scheduler.add(a, 9)
    scheduler.add(b, 9)
    run(scheduler, scheduler.schedule())
    run(scheduler, scheduler.schedule())
    scheduler.finish(a)
    assert shape(scheduler.schedule()) == [("b", 0, 5)], "prompt and the token it had"


def test_a_preempted_sequence_finds_what_it_had_computed() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    a, b = make_sequence("a", 4), make_sequence("b", 8, prompt=[5, 5, 5, 5, 6, 6, 6, 6])
    scheduler.add(a, 9)
    scheduler.add(b, 9)
    run(scheduler, scheduler.schedule())
    step = scheduler.schedule()  # a takes the fourth block, b has none for its ninth token
    assert (shape(step), step.preempted) == ([("a", 4, 1)], [b])
    run(scheduler, step)
    scheduler.finish(a)
    assert shape(scheduler.schedule()) == [("b", 8, 1)]
    assert scheduler.num_prefix_cache_hits == 0, "found again is not found"


def test_who_begins_like_another_takes_over_its_full_blocks() -> None:
    scheduler = make_scheduler(num_blocks=20)
    scheduler.add(make_sequence("a", 11), 14)
    run(scheduler, scheduler.schedule())
    for name, num_prompt in (("b", 11), ("c", 8), ("d", 7)):
        scheduler.add(make_sequence(name, num_prompt), 14)
    step = scheduler.schedule()
    assert shape(step) == [("a", 11, 1), ("b", 8, 3), ("c", 4, 4), ("d", 4, 3)], "a last token is always computed"
    assert step.items[1].sequence.block_table[:2] == step.items[0].sequence.block_table[:2]
    assert (scheduler.num_prefix_cache_queries, scheduler.num_prefix_cache_hits) == (37, 16)
    assert scheduler.blocks.num_used == 3 + 1 + 1 + 1
    assert [sequence.num_cached_tokens for sequence in scheduler.running] == [0, 8, 4, 4]


def test_nothing_is_found_before_it_is_computed() -> None:
    scheduler = make_scheduler(num_blocks=20, budget=6)
    scheduler.add(make_sequence("a", 8), 14)
    scheduler.schedule()
    scheduler.add(make_sequence("b", 8), 14)
    step = scheduler.schedule()  # the first one failed
    assert shape(step) == [("a", 0, 6)]
    run(scheduler, step)
    assert shape(scheduler.schedule()) == [("a", 6, 2), ("b", 4, 4)], "of its two blocks the first is full"


@pytest.mark.parametrize(
    ("other", "start"), [({}, 4), ({"cache_salt": "x"}, 0), ({"prompt_logprobs": 0}, 0)], ids=["same", "salt", "scored"]
)
def test_who_shares_and_who_does_not(other: dict[str, Any], start: int) -> None:
    scheduler = make_scheduler(num_blocks=20)
    scheduler.add(make_sequence("a", 8), 14)
    run(scheduler, scheduler.schedule())
    scheduler.add(make_sequence("b", 8, **other), 14)
    assert scheduler.schedule().items[1].start == start


def test_without_the_cache_everything_is_computed() -> None:
    scheduler = make_scheduler(num_blocks=20, prefix_caching=False)
    scheduler.add(make_sequence("a", 8), 14)
    run(scheduler, scheduler.schedule())
    scheduler.add(make_sequence("b", 8), 14)
    assert shape(scheduler.schedule()) == [("a", 8, 1), ("b", 0, 8)]
    assert (scheduler.num_prefix_cache_queries, scheduler.num_prefix_cache_hits) == (0, 0)


def test_a_step_brings_full_blocks_computed_and_found() -> None:
    scheduler = make_scheduler(num_blocks=20)
    a, b = make_sequence("a", 9), make_sequence("b", 13)
    scheduler.add(a, 14)
    names = scheduler.advance(scheduler.schedule())
    assert [name.block for name in names] == a.block_table[:2]
    assert names[1].parent == names[0].key
    scheduler.add(b, 14)
    a.append(3)
    names = scheduler.advance(scheduler.schedule())
    assert [name.block for name in names] == b.block_table[:3], "nothing new of a"
    assert {name.block for name in scheduler.full_blocks()} == {*a.block_table[:2], *b.block_table[:3]}


def test_what_came_out_wrong_is_not_found() -> None:
    scheduler = make_scheduler(num_blocks=20)
    wrong = make_sequence("a", 8)
    scheduler.add(wrong, 14)
    scheduler.advance(scheduler.schedule())
    scheduler.forget(wrong)
    scheduler.finish(wrong)
    scheduler.add(make_sequence("b", 8), 14)
    assert shape(scheduler.schedule()) == [("b", 0, 8)]


def test_at_most_max_num_seqs_run() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(make_sequence(name, 1), 4)
    assert len(scheduler.schedule().items) == 2


def test_who_has_begun_elsewhere_goes_before_those_who_never_ran() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for name, num_resumed in (("runs", 0), ("new", 0), ("first", 2), ("second", 1), ("newer", 0)):
        scheduler.add(make_sequence(name, 4, num_resumed), 9)
        if name == "runs":
            run(scheduler, scheduler.schedule())
    assert [sequence.request.request_id for sequence in scheduler.waiting] == ["first", "second", "new", "newer"]


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
        lengths.append((prompt, resumed, total, arrival, abort, draw(st.integers(0, prompt))))
    return {
        "block_size": block_size,
        "num_blocks": num_blocks,
        "max_num_seqs": draw(st.integers(1, 6)),
        "budget": draw(st.integers(1, 20)),
        "prefix_caching": draw(st.booleans()),
        "sequences": lengths,
    }


@settings(max_examples=150)
@given(workloads())
def test_whatever_comes_nothing_leaks_and_everything_finishes_in_turn(workload: dict) -> None:
    scheduler = make_scheduler(
        *(workload[name] for name in ("num_blocks", "block_size", "max_num_seqs", "budget", "prefix_caching"))
    )
    cache = SlowCache(workload["block_size"])
    arrivals = sorted(enumerate(workload["sequences"]), key=lambda entry: entry[1][3])
    goal: dict[Sequence, int] = {}
    order: list[Sequence] = []
    abort_at: dict[Sequence, int | None] = {}
    step_number = 0
    while arrivals or scheduler.has_sequences:
        assert step_number < 5000, "it does not finish"
        while arrivals and arrivals[0][1][3] <= step_number:
            name, (prompt, resumed, total, _, abort, common) = arrivals.pop(0)
            ids = [1] * common + [4 + name % 3] * (prompt - common)
            sequence = make_sequence(str(name), prompt, resumed, prompt=ids)
            scheduler.add(sequence, total)
            goal[sequence], abort_at[sequence] = total, abort
            new = [other for other in scheduler.waiting if resumed and not other.has_begun]
            order.insert(order.index(new[0]) if new else len(order), sequence)
        step = scheduler.schedule()
        check_step(scheduler, step, order)
        cache.compute(step)
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


class SlowCache:
    """A latent cache whose latents are what they must depend on: every token up to their own."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._latents: dict[tuple[int, int], tuple[int, ...]] = {}

    def compute(self, step: ScheduledStep) -> None:
        for item in step.items:
            tokens, table = item.sequence.token_ids, item.sequence.block_table
            for place in range(item.start + item.num_tokens):
                slot = (table[place // self._block_size], place % self._block_size)
                if place >= item.start:
                    self._latents[slot] = tuple(tokens[: place + 1])
                assert self._latents[slot] == tuple(tokens[: place + 1]), "another sequence's latent"


def check_step(scheduler: Scheduler, step: ScheduledStep, order: list[Sequence]) -> None:
    assert bool(step.items) == scheduler.has_sequences, "every step makes progress"
    assert step.num_tokens <= scheduler.max_num_batched_tokens
    assert len(scheduler.running) <= scheduler.max_num_seqs
    live = [*scheduler.running, *scheduler.waiting]
    assert live == sorted(live, key=order.index), "whoever came earlier runs or waits before whoever came later"
    held = {block for sequence in live for block in sequence.block_table}
    assert len(held) == scheduler.blocks.num_used
    assert all(len(set(sequence.block_table)) == len(sequence.block_table) for sequence in live)
    assert not any(sequence.block_table for sequence in scheduler.waiting)
    for item in step.items:
        assert item.sequence in scheduler.running
        assert item.start == item.sequence.num_computed_tokens
        assert 0 < item.num_tokens <= item.sequence.num_uncomputed_tokens
        assert len(item.sequence.block_table) >= blocks_for(item.start + item.num_tokens, scheduler.blocks.block_size)
    if step.preempted:
        newcomers = [item for item in step.items if item.start == 0 and item.sequence.num_output_tokens == 0]
        assert all(order.index(item.sequence) < order.index(step.preempted[-1]) for item in newcomers)
