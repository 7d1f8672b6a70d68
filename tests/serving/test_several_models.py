"""Several models behind one API, without Ray: a request's model decides everything that happens to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from api_server import FakeModel, ScriptedBackend, listening
from fakes import byte_tokenizer

from deepseek_ray.errors import UnavailableError
from deepseek_ray.serving.api import Api
from deepseek_ray.serving.auth import ApiKeys
from deepseek_ray.serving.job import ApiContext
from deepseek_ray.serving.limits import ApiLimits

COMPLETIONS = "/v1/completions"


class Served:
    """`quick` answers "quick"; `slow` never does within its deadline of half a second. Each takes one request."""

    def __init__(self) -> None:
        self.quick, self.slow = ScriptedBackend(["quick"]), ScriptedBackend(wait=True)
        tokenizer = byte_tokenizer()
        limits = [ApiLimits(max_concurrent_requests=1, request_timeout_seconds=seconds) for seconds in (30, 0.5)]
        models = [
            FakeModel("quick", "/secret/quick-dir", max_model_len=256),
            FakeModel("slow", "/secret/slow-dir", max_model_len=16),
        ]
        backends = (self.quick, self.slow)
        parts = zip(backends, [tokenizer] * 2, models, limits, strict=True)
        self.api = Api([ApiContext(*part) for part in parts], ApiKeys(), echo_request_id=True)
        self.url = ""

    def post(self, model: str, prompt: str = "x") -> httpx.Response:
        return httpx.post(self.url + COMPLETIONS, json={"model": model, "prompt": prompt, "max_tokens": 8}, timeout=20)


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    with listening(served.api) as (served.url, _):
        yield served


def test_both_are_listed_and_found(served: Served) -> None:
    listed = httpx.get(served.url + "/v1/models").json()["data"]
    assert [(card["id"], card["max_model_len"]) for card in listed] == [("quick", 256), ("slow", 16)]
    assert httpx.get(served.url + "/v1/models/slow").json()["id"] == "slow"
    missing = httpx.get(served.url + "/v1/models/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    assert "'quick', 'slow'" in missing.json()["error"]["message"]


def test_the_model_decides_backend_context_and_deadline(served: Served) -> None:
    assert served.post("quick").json()["choices"][0]["text"] == "quick"
    assert served.post("slow", prompt="x" * 20).json()["error"]["code"] == "context_length_exceeded"
    assert served.post("quick", prompt="x" * 20).status_code == 200
    late = served.post("slow")
    assert late.status_code == 504
    assert "0.5 s" in late.json()["error"]["message"]


def test_no_error_shows_where_any_of_them_lies(served: Served) -> None:
    served.quick.error = RuntimeError("boom")
    served.slow.error = RuntimeError("boom")
    for model in ("quick", "/secret/slow-dir", "slow"):
        assert "secret" not in served.post(model).text


def test_readiness_asks_all_and_room_is_that_of_all(served: Served) -> None:
    assert httpx.get(served.url + "/ready").status_code == 200
    with ThreadPoolExecutor(2) as pool:
        pending = [pool.submit(served.post, "slow") for _ in range(2)]
        assert served.slow.started.wait(10)
        while served.api.num_generating < 2 and not any(request.done() for request in pending):
            threading.Event().wait(0.001)
        full = served.post("quick")
        assert {request.result().status_code for request in pending} == {504}
    assert full.status_code == 429
    assert "the limit is 2" in full.json()["error"]["message"]


def test_one_that_cannot_generate_makes_the_whole_not_ready(served: Served) -> None:
    served.slow.error = UnavailableError("starting")
    assert httpx.get(served.url + "/ready").status_code == 503
