"""Every answer against OpenAI's own API description (`openai/openapi_text_2.3.0.yaml` of the test data)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from api_server import MODEL, EngineBackend, RunningApi, ScriptedBackend, running_api

from deepseek_ray.errors import OverloadedError

jsonschema = pytest.importorskip("jsonschema")
_DATA = Path(os.environ.get("DEEPSEEK_RAY_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
_DESCRIPTION = _DATA / "openai" / "openapi_text_2.3.0.yaml"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    if not _DESCRIPTION.is_file():
        pytest.skip(f"{_DESCRIPTION} is not there; set DEEPSEEK_RAY_TEST_DATA to the folder of the test data")
    return _nullable_as_type(yaml.safe_load(_DESCRIPTION.read_text()))


@pytest.fixture(scope="module")
def server() -> Iterator[RunningApi]:
    with running_api(EngineBackend) as running:
        yield running


def _nullable_as_type(node: Any) -> Any:
    """OpenAPI 3.0's `nullable: true`, which this file still uses here and there, in words of JSON Schema."""
    if isinstance(node, list):
        return [_nullable_as_type(item) for item in node]
    if not isinstance(node, dict):
        return node
    plain = {key: _nullable_as_type(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if node.get("nullable") is True else plain


def check(description: dict[str, Any], schema: str, value: Any) -> None:
    whole = {"$ref": f"#/components/schemas/{schema}", "components": description["components"]}
    jsonschema.Draft202012Validator(whole).validate(value)


def events(text: str) -> list[dict[str, Any]]:
    *chunks, done = text.strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


@pytest.mark.parametrize("extra", [{}, {"logprobs": True, "top_logprobs": 2}, {"n": 2}], ids=str)
def test_chat(description: dict[str, Any], server: RunningApi, extra: dict[str, Any]) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6, "temperature": 0, **extra}
    url = server.url + "/v1/chat/completions"
    check(description, "CreateChatCompletionResponse", httpx.post(url, json=asked).json())
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(httpx.post(url, json={**asked, **usage}).text)
    assert len(chunks) > 6
    for chunk in chunks:
        check(description, "CreateChatCompletionStreamResponse", chunk)


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2, "echo": True}, {"n": 2}], ids=str)
def test_completions(description: dict[str, Any], server: RunningApi, extra: dict[str, Any]) -> None:
    asked = {"model": MODEL, "prompt": ["hi", "you"], "max_tokens": 6, "temperature": 0, **extra}
    url = server.url + "/v1/completions"
    check(description, "CreateCompletionResponse", httpx.post(url, json=asked).json())
    official = {"x-stainless-lang": "python"}  # others get a null finish_reason before the end, as from OpenAI
    for chunk in events(httpx.post(url, json={**asked, "stream": True}, headers=official).text):
        check(description, "CreateCompletionResponse", chunk)


def test_models_and_errors(description: dict[str, Any], server: RunningApi) -> None:
    check(description, "ListModelsResponse", httpx.get(server.url + "/v1/models").json())
    check(description, "Model", httpx.get(f"{server.url}/v1/models/{MODEL}").json())
    check(description, "ErrorResponse", httpx.get(server.url + "/v1/nothing").json())
    check(description, "ErrorResponse", httpx.post(server.url + "/v1/completions", json={"n": 0}).json())
    with running_api(lambda: ScriptedBackend(error=OverloadedError("full"))) as running:
        asked = {"model": MODEL, "messages": MESSAGES}
        check(description, "ErrorResponse", httpx.post(running.url + "/v1/chat/completions", json=asked).json())


def test_the_check_can_fail(description: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="created"):
        check(description, "Model", {"id": "x", "object": "model", "owned_by": "y"})
