"""Admission: plain decisions, checked by hand."""

from __future__ import annotations

import pytest

from deepseek_ray.control.admission import Admission
from deepseek_ray.control.membership import WorkerView
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


def test_without_workers_a_request_is_told_to_retry() -> None:
    with pytest.raises(UnavailableError, match="no attention worker"):
        Admission(max_in_flight=1).admit("a", 1, 60, [], now=0)
