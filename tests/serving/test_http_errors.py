"""Every way a request can be wrong, or go wrong, over real HTTP: one clear error in OpenAI's shape, never a 5xx."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_server import MODEL, EngineBackend, FakeModel, RunningApi, ScriptedBackend, error_of, running_api
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_ray.errors import (
    DeadlineExceededError,
    GenerationError,
    OverloadedError,
    RequestError,
    UnavailableError,
)
from deepseek_ray.serving.limits import ApiLimits
from deepseek_ray.serving.schema import ChatRequest, CompletionRequest

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
SMALL = ApiLimits(max_body_bytes=64 * 1024, max_prompts=4, max_choices=8, max_messages=4)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningApi]:
    with running_api(EngineBackend, SMALL) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningApi) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as http:
        yield http


WRONG_FIELDS = [
    # field, value, words of the message
    ("max_tokens", 0, "max_tokens is 0; it must be between 1 and"),
    ("max_tokens", -5, "max_tokens is -5"),
    ("max_tokens", 2**63, "max_tokens is 9223372036854775808"),
    ("max_tokens", 1.5, "valid integer"),
    ("max_tokens", "7", "valid integer"),
    ("max_tokens", True, "valid integer"),
    ("temperature", -0.1, "temperature is -0.1; it must be between 0 and 100"),
    ("temperature", "hot", "valid number"),
    ("top_p", 0, "top_p is 0"),
    ("top_p", 1.01, "top_p is 1.01"),
    ("top_k", -2, "top_k is -2"),
    ("min_p", 2, "min_p is 2"),
    ("n", 0, "n is 0; it must be between 1 and 16"),
    ("n", 10**9, "n is 1000000000"),
    ("presence_penalty", 2.1, "between -2 and 2"),
    ("frequency_penalty", -3, "between -2 and 2"),
    ("repetition_penalty", 0, "repetition_penalty is 0"),
    ("min_tokens", 17, "min_tokens is 17, above max_tokens 16"),
    ("seed", 2**70, "seed is"),
    ("stop", [str(i) for i in range(17)], "stop has 17 strings; at most 16"),
    ("stop", [""], "a stop string has 0 characters"),
    ("stop", "x" * 257, "a stop string has 257 characters"),
    ("stop", [1], "a string or a list of strings"),
    ("stop_token_ids", [-1], "token id -1; the vocabulary has ids 0 to 260"),
    ("stop_token_ids", [261], "token id 261"),
    ("stop_token_ids", list(range(1025)), "lists 1025 token ids; at most 1024"),
    ("logit_bias", {"261": 1}, "token id 261"),
    ("logit_bias", {"-1": 1}, "token id -1"),
    ("logit_bias", {"1": 101}, "holds 101"),
    ("logit_bias", {"one": 1}, "token ids, written as decimal numbers"),
    ("logprobs", 21, "logprobs is 21; it must be between 0 and 20"),
    ("logprobs", -1, "logprobs is -1"),
    ("best_of", 2, "best_of is 2 and n is 1"),
    ("suffix", "end", "suffix is not supported"),
    ("stream", "yes", "valid boolean"),
    ("stream_options", {"include_usage": True}, "needs stream to be true"),
    ("prompt", [], "prompt holds 0 prompts"),
    ("prompt", "", "the prompt is empty"),
    ("prompt", [[1], []], "a list of lists of token ids"),
    ("prompt", [[1], [261]], "token id 261"),
    ("prompt", [-1], "token id -1"),
    ("prompt", ["a"] * 5, "prompt holds 5 prompts; send 1 to 4"),
    ("prompt", None, "a string, a list of strings"),
    ("prompt", {"text": "a"}, "a string, a list of strings"),
    ("request_id", "a b\r\nc", "pattern"),
    ("cache_salt", "", "at least 1 character"),
    ("cache_salt", "x" * 513, "at most 512 characters"),
    ("cache_salt", 5, "valid string"),
    ("tempreature", 1, "unknown field 'tempreature'; did you mean 'temperature'?"),
]


@pytest.mark.parametrize(("field", "value", "words"), WRONG_FIELDS, ids=[f"{f}={v!r:.20}" for f, v, _ in WRONG_FIELDS])
def test_a_wrong_field_is_named_with_value_and_limit(client: httpx.Client, field: str, value: Any, words: str) -> None:
    started = time.monotonic()
    error = error_of(client.post(COMPLETIONS, json={"model": MODEL, "prompt": "hi", field: value}), 400)
    assert time.monotonic() - started < 1
    assert words in error["message"]
    assert error["param"].split(".")[0] == field
    assert error["type"] == "invalid_request_error"


WRONG_CHATS = [
    ({"messages": []}, "messages", "messages holds 0 messages; send 1 to 4"),
    ({"messages": MESSAGES * 5}, "messages", "messages holds 5 messages"),
    ({"messages": ["hi"]}, "messages.0", "an object with role and content"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'robot'"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role", "'tool'"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "missing"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "text only"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content", "a string under 'text'"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages.0.tool_calls", "unknown field"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs is not true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs is 21"),
    ({"logprobs": 3}, "logprobs", "valid boolean"),
    ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
    ({"tool_choice": "required"}, "tool_choice", "tool_choice is not supported"),
    ({"functions": [{}]}, "functions", "functions is not supported"),
    ({"guided_json": {}}, "guided_json", 'now written "structured_outputs": {"json": ...}'),
    ({"audio": {"voice": "x"}}, "audio", "audio is not supported"),
    ({"modalities": ["text", "audio"]}, "modalities", "modalities is not supported"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "chat_template is not supported"),
    ({"suffix": "x"}, "suffix", "suffix is not supported"),
    ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages", "context holds 256 tokens"),
]


@pytest.mark.parametrize(("fields", "param", "words"), WRONG_CHATS, ids=[f"{f!r:.60}" for f, _, _ in WRONG_CHATS])
def test_a_wrong_conversation(client: httpx.Client, fields: dict[str, Any], param: str, words: str) -> None:
    error = error_of(client.post(CHAT, json={"model": MODEL, "messages": MESSAGES, **fields}), 400)
    assert (error["param"], words in error["message"]) == (param, True), error


def test_a_prompt_longer_than_the_context(client: httpx.Client) -> None:
    error = error_of(client.post(COMPLETIONS, json={"model": MODEL, "prompt": "x" * 256}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "256 tokens" in error["message"]
    assert "272" in error["message"]
    assert "shorten prompt" in error["message"]


def test_too_many_outputs_of_one_request(client: httpx.Client) -> None:
    error = error_of(client.post(COMPLETIONS, json={"model": MODEL, "prompt": ["a"] * 3, "n": 3}), 400)
    assert "3 prompts with n 3 make 9 outputs; at most 8" in error["message"]


WRONG_BODIES = [
    (b"", "empty"),
    (b"{", "not valid JSON"),
    (b"[]", "JSON array"),
    (b'"text"', "JSON string"),
    (b"7", "JSON number"),
    (b"null", "JSON null"),
    (b'{"a": 1}x', "not valid JSON"),
    (b'{"temperature": NaN}', "NaN is not a JSON number"),
    (b'{"temperature": Infinity}', "Infinity"),
    (b'{"temperature": -Infinity}', "-Infinity"),
    (b'{"temperature": 1e400}', "1e400 is too large"),
    (b'{"n": 1' + b"0" * 5000 + b"}", "not valid JSON"),
    (b'{"n": 1, "n": 2}', "'n' occurs twice"),
    (b'{"prompt": "\xff\xfe"}', "not UTF-8"),
    ('{"prompt": "x"}'.encode("utf-16"), "not UTF-8"),
    (b'{"prompt": "\\ud800"}', "lone surrogate U+D800"),
    (b'{"\\udfff": 1}', "lone surrogate U+DFFF"),
    (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "deeper than 64"),
    (b'{"a": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "deeper than 64"),
]


@pytest.mark.parametrize(("body", "words"), WRONG_BODIES, ids=[repr(b[:24]) for b, _ in WRONG_BODIES])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_body_that_is_not_strict_json(client: httpx.Client, path: str, body: bytes, words: str) -> None:
    error = error_of(client.post(path, content=body, headers={"content-type": "application/json"}), 400)
    assert words in error["message"]
    assert error["code"] == "invalid_json"


def test_a_body_over_the_limit_is_refused_while_it_is_read(client: httpx.Client, server: RunningApi) -> None:
    assert error_of(client.post(COMPLETIONS, json={"prompt": "x" * 70_000}), 413)["code"] == "request_too_large"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
        for _ in range(3):  # 96 KiB of a body that never ends
            raw.sendall(chunk)
        assert b" 413 " in raw.recv(4096).splitlines()[0]


def test_routes_and_methods(client: httpx.Client) -> None:
    assert error_of(client.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(client.get("//v1/models"), 404)
    assert error_of(client.get("/v1/models/"), 404)
    assert error_of(client.post("/v1/responses", json={}), 404)
    wrong = client.get(CHAT)
    assert error_of(wrong, 405)["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"
    assert client.post("/v1/models").headers["allow"] == "GET"
    assert client.request("TRACE", "/health").status_code == 405
    assert client.head("/health").status_code == 200
    assert "access-control-allow-origin" not in client.options(CHAT, headers={"origin": "http://x"}).headers


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_only_json_is_read(client: httpx.Client, media_type: str | None) -> None:
    headers = {"content-type": media_type} if media_type else {}
    error = error_of(client.post(CHAT, content=b"{}", headers=headers), 415)
    assert "Content-Type: application/json" in error["message"]


def test_unknown_model(client: httpx.Client) -> None:
    error = error_of(client.post(CHAT, json={"model": "gpt-4", "messages": MESSAGES}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert MODEL in error["message"]
    assert error_of(client.get("/v1/models/../../etc/passwd"), 404)


def test_health_and_ready(client: httpx.Client, server: RunningApi) -> None:
    backend = server.api.contexts[MODEL].backend
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    backend.is_ready = False  # type: ignore[attr-defined]
    try:
        answer = client.get("/ready")
        assert error_of(answer, 503)
        assert int(answer.headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 200
    finally:
        backend.is_ready = True  # type: ignore[attr-defined]


def test_request_ids_are_echoed_when_they_are_harmless(client: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    answer = client.post(COMPLETIONS, json=body, headers={"x-request-id": "abc-1.2_3"})
    assert (answer.headers["x-request-id"], answer.json()["id"]) == ("abc-1.2_3", "cmpl-abc-1.2_3")
    for hostile in ("a b", "x" * 129, b"\xff\xfe", "<script>"):
        echoed = client.post(COMPLETIONS, json=body, headers={"x-request-id": hostile}).headers["x-request-id"]
        assert len(echoed) == 32
        assert echoed.isalnum()


ERRORS = [
    (OverloadedError("full", retry_after_seconds=2.3), 429, "overloaded", "3"),
    (UnavailableError("draining"), 503, "unavailable", "2"),
    (DeadlineExceededError("late"), 504, "deadline_exceeded", None),
    (RequestError("bad id", "prompt", "why"), 400, "why", None),
    (GenerationError("NaN"), 500, "generation_failed", None),
]


@pytest.mark.parametrize(("error", "status", "code", "retry_after"), ERRORS, ids=[str(e[1]) for e in ERRORS])
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_backend_raises(
    error: Exception, status: int, code: str, retry_after: str | None, stream: bool
) -> None:
    with running_api(lambda: ScriptedBackend(error=error)) as running:
        asked = {"model": MODEL, "messages": MESSAGES, "stream": stream}
        answer = httpx.post(running.url + CHAT, json=asked)
        assert error_of(answer, status)["code"] == code
        assert answer.headers.get("retry-after") == retry_after


def test_an_unexpected_error_tells_nothing_but_the_request_id() -> None:
    canary = "/home/someone/secret.py"
    with running_api(lambda: ScriptedBackend(error=ValueError(canary))) as running:
        answer = httpx.post(running.url + CHAT, json={"model": MODEL, "messages": MESSAGES})
        error = error_of(answer, 500)
        assert answer.headers["x-request-id"] in error["message"]
        assert canary not in answer.text
        assert "ValueError" not in answer.text
        assert "Traceback" not in answer.text
        assert httpx.get(running.url + "/ready").status_code == 500


def test_an_error_of_the_template_does_not_tell_where_the_model_lies() -> None:
    place = FakeModel().model_dir
    with running_api(lambda: ScriptedBackend(error=RequestError(f"{place}/tokenizer.json is odd"))) as running:
        answer = httpx.post(running.url + CHAT, json={"model": MODEL, "messages": MESSAGES})
        assert error_of(answer, 400)["message"] == f"{MODEL}/tokenizer.json is odd"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_error_after_the_first_byte_ends_the_stream_visibly(path: str) -> None:
    with running_api(lambda: ScriptedBackend(texts=["some", " text"], error=UnavailableError("gone"))) as running:
        asked = {"model": MODEL, "stream": True, **({"messages": MESSAGES} if path == CHAT else {"prompt": "x"})}
        answer = httpx.post(running.url + path, json=asked)
        assert answer.status_code == 200
        events = answer.text.strip().split("\n\n")
        assert "[DONE]" not in answer.text
        assert json.loads(events[-1].removeprefix("data: "))["error"]["message"] == "gone"
        assert " text" in events[-2]


def test_line_separators_do_not_break_events() -> None:
    text = "a\u2028b\u2029c\u0085d\r\ne"
    with running_api(lambda: ScriptedBackend(texts=[text])) as running:
        asked = {"model": MODEL, "messages": MESSAGES, "stream": True}
        with httpx.stream("POST", running.url + CHAT, json=asked) as answer:
            lines = [line for line in answer.iter_lines() if line]
        deltas = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in deltas) == text


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150)
@given(
    path=st.sampled_from([CHAT, COMPLETIONS]),
    fields=st.dictionaries(
        st.sampled_from([*ChatRequest.model_fields, *CompletionRequest.model_fields, "tools", "suffix", "user"]),
        JSON_VALUES,
        max_size=4,
    ),
)
def test_no_field_value_makes_the_server_fail(client: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, **fields}
    if path == COMPLETIONS:
        del asked["messages"]
        asked = {"prompt": "hi", **asked}
    answer = client.post(path, json=asked)
    assert answer.status_code in (200, 400, 404, 413), answer.text
    if answer.status_code != 200:
        error_of(answer, answer.status_code)


@settings(max_examples=150)
@given(path=st.sampled_from([CHAT, COMPLETIONS]), body=st.binary(max_size=200))
def test_no_bytes_make_the_server_fail(client: httpx.Client, path: str, body: bytes) -> None:
    error_of(client.post(path, content=body, headers={"content-type": "application/json"}), 400)
