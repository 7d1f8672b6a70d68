"""`/v1/embeddings` over real sockets, with a real if small encoder and OpenAI's own client."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from api_server import listening
from encoders import MAX_LENGTH, WIDTH, WORDS, write_encoder
from openai import OpenAI

from deepseek_ray.config.serving import EmbeddingsConfig
from deepseek_ray.serving.auth import ApiKeys
from deepseek_ray.serving.batch_runner import BatchRunner
from deepseek_ray.serving.batching import DynamicBatchScheduler
from deepseek_ray.serving.embeddings import EmbeddingsApi, EncoderModel
from deepseek_ray.serving.embeddings_app import build_embeddings_api
from deepseek_ray.serving.limits import ApiLimits

MODEL = "encoder"
TEXTS = ["abc", "the quick brown fox", "jumps over the lazy dog"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = write_encoder(tmp_path_factory.mktemp("place") / MODEL)
    api = build_embeddings_api(EmbeddingsConfig(model_dir=str(directory), threads=1, max_waiting=8), 0, ApiKeys())
    with listening(api) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=url + "/v1", api_key="none", _strict_response_validation=True, max_retries=0)


def post(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(url + "/v1/embeddings", json={"model": MODEL, **fields}, timeout=30)


def vectors(client: OpenAI, texts: Any, **fields: Any) -> np.ndarray:
    reply = client.embeddings.create(model=MODEL, input=texts, encoding_format="float", **fields)
    assert [item.index for item in reply.data] == list(range(len(reply.data)))
    return np.array([item.embedding for item in reply.data])


def test_a_list_gives_the_vectors_of_each_text_alone(client: OpenAI) -> None:
    together = vectors(client, TEXTS)
    assert together.shape == (3, WIDTH)
    alone = np.concatenate([vectors(client, text) for text in TEXTS])
    assert np.abs(together - alone).max() < 1e-5
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_both_encodings_hold_the_same_numbers(client: OpenAI, url: str) -> None:
    (item,) = post(url, input="abc", encoding_format="base64").json()["data"]
    decoded = np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
    assert np.array_equal(decoded, vectors(client, "abc")[0].astype("f4"))
    # What OpenAI's client asks for when it is not told.
    plain = OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    assert np.allclose(plain.embeddings.create(model=MODEL, input="abc").data[0].embedding, decoded)


def test_fewer_dimensions_are_the_first_ones_at_length_one(client: OpenAI) -> None:
    whole, short = vectors(client, "abc")[0], vectors(client, "abc", dimensions=8)[0]
    assert np.allclose(short, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-6)


def test_token_ids_are_taken_as_they_are(client: OpenAI) -> None:
    text = vectors(client, "ab")
    ids = [WORDS.index(word) for word in ("[CLS]", "a", "##b", "[SEP]")]
    assert np.allclose(vectors(client, ids), text, atol=1e-6)
    assert np.allclose(vectors(client, [ids, ids]), np.concatenate([text, text]), atol=1e-6)


def test_usage_counts_tokens_with_special_ones(url: str) -> None:
    reply = post(url, input=["ab", "abc"], user="somebody").json()
    assert reply["object"] == "list"
    assert reply["model"] == MODEL
    assert reply["usage"] == {"prompt_tokens": 9, "total_tokens": 9}


def test_the_model_is_listed(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.max_model_len) == (MODEL, MAX_LENGTH)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": ["a", ""]}, 400, "input"),
        ({"input": ["a"] * 9}, 400, "input"),
        ({"input": [[1], []]}, 400, "input"),
        ({"input": [-1]}, 400, "input"),
        ({"input": [10**9]}, 400, "input"),
        ({"input": ["a", 1]}, 400, "input"),
        ({"input": {"text": "a"}}, 400, "input"),
        ({"input": "a " * MAX_LENGTH}, 400, "input"),
        ({}, 400, "input"),
        ({"input": "a", "dimensions": 0}, 400, "dimensions"),
        ({"input": "a", "dimensions": WIDTH + 1}, 400, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format"),
        ({"input": "a", "pooling": "max"}, 400, "pooling"),
        ({"input": "a", "model": "other"}, 404, "model"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_named(url: str, fields: dict[str, Any], status: int, param: str) -> None:
    reply = post(url, **fields)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param)
    assert error["type"] == "invalid_request_error"
    assert "place" not in error["message"]


class SlowEncoder:
    """Encodes when it is let."""

    width = 4

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.batches: list[int] = []

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [[1] for _ in texts]

    def check_ids(self, ids: Sequence[int]) -> None:
        pass

    def encode(self, batch: list[list[int]]) -> list[np.ndarray]:
        self.batches.append(len(batch))
        assert self.may_go.wait(20)
        if [666] in batch:
            raise RuntimeError("/secret/place")
        return [np.ones(4, "f4")] * len(batch)


@contextmanager
def slow_server(seconds: float) -> Iterator[tuple[str, SlowEncoder]]:
    """Batches and a queue of four, and a deadline of `seconds`."""
    encoder = SlowEncoder()
    runner = BatchRunner(encoder.encode, DynamicBatchScheduler(max_batch=4), max_waiting=4)
    limits = ApiLimits(request_timeout_seconds=seconds)
    api = EmbeddingsApi(EncoderModel(MODEL, "/m", 8, 0), encoder, runner, limits, ApiKeys(), 4, True)
    with listening(api) as (url, _):
        yield url, encoder
        encoder.may_go.set()


def test_those_who_come_while_a_batch_runs_make_the_next_as_far_as_there_is_room() -> None:
    with slow_server(seconds=30) as (url, encoder), ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, url, input="a")
        while not encoder.batches:
            assert not first.done()
        others = [pool.submit(post, url, input=["a"] * 4) for _ in range(2)]
        done, waiting = wait(others, return_when=FIRST_COMPLETED, timeout=20)
        (refused,) = (request.result() for request in done)
        encoder.may_go.set()
        (answered,) = (request.result() for request in waiting)
        assert first.result().status_code == answered.status_code == 200
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert encoder.batches == [1, 4]


def test_a_deadline_ends_a_request_and_the_next_is_served() -> None:
    with slow_server(seconds=0.5) as (url, encoder):
        late = post(url, input="a")
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        encoder.may_go.set()
        assert post(url, input="a").status_code == 200


def test_a_failing_encoder_tells_nothing_but_the_request_id() -> None:
    with slow_server(seconds=30) as (url, encoder):
        encoder.may_go.set()
        reply = post(url, input=[666])
        assert reply.status_code == 500
        assert "secret" not in reply.text
        assert post(url, input="a").status_code == 200
