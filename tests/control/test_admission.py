"""Admission: plain decisions, checked by hand."""

from __future__ import annotations

import msgspec
import pytest

from deepseek_ray.control.admission import Admission
from deepseek_ray.control.reports import WorkerView
from deepseek_ray.errors import OverloadedError, UnavailableError
from deepseek_ray.links.base import Endpoints


def workers(count: int) -> list[WorkerView]:
    endpoints = Endpoints(node_id="node", unix_name=None, tcp_host=None, tcp_port=0, incarnation=1)
    return [WorkerView(id, incarnation=1, endpoints=endpoints) for id in range(count)]


def test_the_worker_with_the_fewest_outstanding_tokens_is_chosen() -> None:
    admission = Admission(max_in_flight=8)
    assert admission.admit("a", 100, 60, workers(2), now=0).id == 0
    assert admission.admit("b", 10, 60, workers(2), now=0).id == 1
    assert admission.admit("c", 10, 60, workers(2), now=0).id == 1
    admission.release("a")
    assert admission.admit("d", 10, 60, workers(2), now=0).id == 0


def test_admission_is_bounded_and_says_so() -> None:
    admission = Admission(max_in_flight=1)
    admission.admit("a", 1, 60, workers(1), now=0)
    with pytest.raises(OverloadedError, match="1 requests are in flight, the limit is 1") as caught:
        admission.admit("b", 1, 60, workers(1), now=0)
    assert caught.value.retry_after_seconds > 0
    admission.release("a")
    assert admission.admit("b", 1, 60, workers(1), now=0).id == 0


def test_a_request_nobody_released_is_forgotten_at_its_deadline() -> None:
    admission = Admission(max_in_flight=1)
    admission.admit("a", 1, 60, workers(1), now=0)
    assert admission.admit("b", 1, 60, workers(1), now=61).id == 0


def test_a_retry_replaces_its_first_try_and_avoids_the_lost_worker() -> None:
    admission = Admission(max_in_flight=1)
    admission.admit("a", 1, 60, workers(2), now=0)
    assert admission.admit("a", 1, 60, workers(2), now=0, avoid=[(0, 1)]).id == 1
    assert admission.in_flight == 1


def test_a_retry_goes_to_who_has_the_copies_of_the_lost_worker() -> None:
    admission = Admission(max_in_flight=2, kv_copies=True)
    admission.admit("busy", 1000, 60, workers(3)[2:], now=0)
    lost = [(0, 1), (1, 1)]
    assert admission.admit("a", 1, 60, workers(3), now=0, avoid=lost[1:]).id == 2, "though it has most to do"
    assert admission.admit("b", 1, 60, workers(4), now=0, avoid=lost[1:]).id == 0, "it has no room"
    assert admission.admit("c", 1, 60, workers(4), now=0, avoid=[(3, 1)]).id == 0, "the ring is closed"
    without = Admission(max_in_flight=2)
    without.admit("busy", 1000, 60, workers(3)[2:], now=0)
    assert without.admit("a", 1, 60, workers(3), now=0, avoid=lost[1:]).id == 0


@pytest.mark.parametrize(("lost", "chosen"), [([2, 0], 1), ([1, 0], 2), ([0, 3], 1)])
def test_of_several_losses_the_last_one_had_the_copies(lost: list[int], chosen: int) -> None:
    admission = Admission(max_in_flight=2, kv_copies=True)
    admission.admit("busy", 1000, 60, [workers(4)[chosen]], now=0)
    avoid = [(id, 1) for id in lost]
    assert admission.admit("a", 1, 60, workers(4), now=0, avoid=avoid).id == chosen


def test_the_next_life_of_a_lost_worker_has_no_copies() -> None:
    again = [msgspec.structs.replace(workers(1)[0], incarnation=2), workers(2)[1]]
    assert Admission(max_in_flight=2, kv_copies=True).admit("a", 1, 60, again, now=0, avoid=[(0, 1)]).id == 1


def test_without_workers_a_request_is_told_to_retry() -> None:
    with pytest.raises(UnavailableError, match="no attention worker"):
        Admission(max_in_flight=1).admit("a", 1, 60, [], now=0)
