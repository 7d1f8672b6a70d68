"""The checker sees each broken promise, and nothing else, in histories written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepseek_ray.chaos.checks import (
    DESCRIPTOR_GRACE,
    check,
    first_token_seconds,
    gaps_before_and_during,
    stall,
    stalls,
)
from deepseek_ray.chaos.history import Arrival, Call, Fault, History, Reference, read_history

REFERENCES = [Reference([5, 6, 7, 8], [-0.5, -0.25, -1.0, -2.0])]


def arrival(time: float, index: int, ids: list[int], logprobs: list[float] | None = None) -> Arrival:
    place = REFERENCES[0].token_ids.index(ids[0]) if ids[0] in REFERENCES[0].token_ids else 0
    return Arrival(time, index, ids, REFERENCES[0].logprobs[place : place + len(ids)] if logprobs is None else logprobs)


def call(*arrivals: Arrival, **changes: Any) -> Call:
    fields = {"sent": 0.0, "deadline": 10.0, "ended": 5.0, "finish_reason": "length"} | changes
    return Call("r", 0, arrivals=list(arrivals), **fields)


GOOD = [arrival(1, 0, [5]), arrival(2, 1, [6, 7]), arrival(3, 3, [8])]


def kinds(*calls: Call, **fields: Any) -> list[str]:
    return [violation.kind for violation in check(History(0, list(calls), **fields), REFERENCES)]


def test_a_history_without_a_broken_promise() -> None:
    assert kinds(call(*GOOD)) == []


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (call(GOOD[0], GOOD[1], GOOD[1], GOOD[2]), "order"),
        (call(GOOD[0], GOOD[2]), "order"),
        (call(GOOD[1], GOOD[0], GOOD[2]), "order"),
        (call(GOOD[0], GOOD[1]), "order"),
        (call(GOOD[0], arrival(2, 1, [6, 9]), GOOD[2]), "token"),
        (call(GOOD[0], arrival(2, 1, [6, 7], [-0.25, -1.0000001]), GOOD[2]), "logprob"),
        (call(*GOOD[:1], error="UnavailableError: gone"), "failed"),
        (call(*GOOD, ended=11.5), "late"),
        (call(*GOOD, ended=None), "unfinished"),
    ],
    ids=["repeated", "lost", "reordered", "cut short", "other token", "other bits", "error", "late", "no end"],
)
def test_each_broken_promise_is_seen(broken: Call, kind: str) -> None:
    assert kinds(broken) == [kind]


def test_a_deadline_has_a_second_of_grace() -> None:
    assert kinds(call(*GOOD, ended=10.9)) == []


@pytest.mark.parametrize("name", ["num_running", "num_waiting", "num_kv_blocks_used", "in_flight"])
def test_work_that_is_left_over_is_seen(name: str) -> None:
    counters = {"attention_worker/0": {name: 1.0, "frames": 7.0}, "expert_shard/0": {"calls": 3.0}}
    assert kinds(call(*GOOD), counters=counters) == ["left over"]


def test_descriptors_that_are_left_open_are_seen() -> None:
    grown = {"expert_shard/0": (40, 40 + DESCRIPTOR_GRACE + 1), "expert_shard/1": (40, 40 + DESCRIPTOR_GRACE)}
    (violation,) = check(History(0, [call(*GOOD)], descriptors=grown), REFERENCES)
    assert (violation.kind, violation.where) == ("left over", "expert_shard/0")
    assert f"{40 + DESCRIPTOR_GRACE + 1} open descriptors, 40 before" in violation.detail


def test_a_process_that_a_fault_left_behind_is_seen() -> None:
    history = History(0, [call(*GOOD)], strays=["pid 7 ray::d/expert_shard/0"])
    (violation,) = check(history, REFERENCES)
    assert (violation.kind, violation.where) == ("left over", "pid 7 ray::d/expert_shard/0")


def test_a_stall_is_the_largest_gap_from_the_fault_on_less_the_usual_one() -> None:
    times = [0.0, 0.1, 0.2, 0.3, 2.3, 2.4, 2.9]
    stream = Call("r", 0, 0.0, 100.0, [Arrival(time, n, [n], []) for n, time in enumerate(times)])
    assert stall(stream, Fault("f", "t", struck=0.35, healed=0.35)) == pytest.approx(2.0 - 0.1)
    assert stall(stream, Fault("f", "t", struck=2.35, healed=2.35)) == pytest.approx(0.5 - 0.1), (
        "the gap before is over"
    )
    assert stall(stream, Fault("f", "t", struck=3.0, healed=3.0)) is None, "it was over"
    assert stall(stream, Fault("f", "t", struck=0.05, healed=0.05)) is None, "it had hardly begun"


def test_only_streams_in_mid_generation_have_a_stall_and_only_later_calls_a_first_token() -> None:
    early = Call("a", 0, 0.0, 9.0, [Arrival(t, 0, [1], []) for t in (0.1, 0.2, 0.3, 0.9)])
    late = Call("b", 0, 0.5, 9.0, [Arrival(t, 0, [1], []) for t in (0.7, 0.8)])
    history = History(0, [early, late], [Fault("f", "t", 0.4, 0.4)])
    assert stalls(history) == [pytest.approx(0.5)]
    assert first_token_seconds(history) == [pytest.approx(0.2)]
    assert stalls(History(0, [early])) == []


def test_gaps_are_sorted_by_the_time_of_the_fault() -> None:
    stream = Call("a", 0, 0.0, 9.0, [Arrival(t, 0, [1], []) for t in (0.0, 1.0, 3.0, 3.5, 9.0)])
    history = History(0, [stream], [Fault("f", "t", struck=2.0, healed=3.2), Fault("g", "t", struck=3.3, healed=3.4)])
    # 0-1 ends before the fault; 1-3 and 3-3.5 overlap it; 3.5-9 begins when all is over.
    assert gaps_before_and_during(history) == ([1.0], [2.0, 0.5])
    assert gaps_before_and_during(History(0, [stream])) == ([], [])


def test_histories_are_files(tmp_path: Path) -> None:
    history = History(3, [call(*GOOD)], [Fault("kill", "x", 1.0, 2.0)], {"router/0": {"in_flight": 0.0}})
    history.write(tmp_path / "h.json")
    assert read_history(tmp_path / "h.json") == history
