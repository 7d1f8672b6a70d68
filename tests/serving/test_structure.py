"""Structured outputs through the HTTP API: `response_format` and `structured_outputs`, strict clients, wrong bodies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from api_server import MODEL, EngineBackend, RunningApi, running_api
from openai import OpenAI
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": "hi"}]
COLOR = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "grün"]}, "dark": {"type": "boolean"}},
    "required": ["color", "dark"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def api() -> Iterator[RunningApi]:
    with running_api(EngineBackend) as api:
        yield api


@pytest.fixture(scope="module")
def client(api: RunningApi) -> OpenAI:
    return OpenAI(base_url=f"{api.url}/v1", api_key="none", _strict_response_validation=True, max_retries=0)


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def chat(client: OpenAI, response_format: Any, **fields: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format=response_format, max_tokens=150, seed=1, **fields
    )


def test_every_type_of_response_format(client: OpenAI) -> None:
    schema_choice = chat(client, json_schema(COLOR)).choices[0]
    jsonschema.validate(json.loads(schema_choice.message.content), COLOR)
    assert schema_choice.finish_reason == "stop"
    assert chat(client, {"type": "json_object"}).choices[0].message.content.startswith("{")
    assert re.fullmatch("[a-c]{4}", chat(client, {"type": "regex", "regex": "[a-c]{4}"}).choices[0].message.content)
    assert chat(client, {"type": "text"}).choices[0].message.content


def test_a_stream_of_several_choices(client: OpenAI) -> None:
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in chat(client, json_schema(COLOR), n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert reasons == {0: "stop", 1: "stop"}
    for text in texts.values():
        jsonschema.validate(json.loads(text), COLOR)


def test_the_clients_own_parser(client: OpenAI) -> None:
    class Answer(BaseModel):
        yes: bool

    reply = client.chat.completions.parse(
        model=MODEL,
        messages=MESSAGES,
        response_format=Answer,
        max_tokens=100,
        seed=2,  # type: ignore[arg-type]
    )
    assert isinstance(reply.choices[0].message.parsed, Answer)


def test_vllms_fields_on_both_endpoints(client: OpenAI) -> None:
    extra = {"structured_outputs": {"choice": ["ja", "nein"]}}
    reply = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=20, extra_body=extra)
    assert {choice.text for choice in reply.choices} <= {"ja", "nein"}
    extra = {"structured_outputs": {"json": json.dumps(COLOR), "disable_any_whitespace": True}}
    text = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100, extra_body=extra)  # type: ignore[arg-type]
    assert " " not in (text.choices[0].message.content or " ")
    extra = {"response_format": json_schema(COLOR)}
    reply = client.completions.create(model=MODEL, prompt="a", max_tokens=150, extra_body=extra)
    jsonschema.validate(json.loads(reply.choices[0].text), COLOR)


def test_cut_by_max_tokens(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,  # type: ignore[arg-type]
        response_format=json_schema(COLOR),  # type: ignore[arg-type]
        max_tokens=3,
    )
    assert reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type", "'text', 'json_object'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs json_schema"),
        ({"response_format": {"type": "text", "regex": "a"}}, "response_format.regex", "does not take regex"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "is missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
            "should match pattern",
        ),
        ({"response_format": json_schema({"type": "strnig"})}, "response_format.json_schema.schema", "Invalid type"),
        (
            {"response_format": json_schema({"type": "integer", "multipleOf": 99_999_989})},
            "response_format.json_schema.schema",
            "takes more than 2 s",
        ),
        ({"response_format": {"type": "regex", "regex": "(a"}}, "response_format.regex", "unclosed group"),
        ({"structured_outputs": {}}, "structured_outputs", "it has none"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "it has regex, choice"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "unknown field"),
        ({"structured_outputs": {"choice": "ab"}}, "structured_outputs.choice", "valid list"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar", "cannot be used"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "leave one out",
        ),
        ({"guided_regex": "a"}, "guided_regex", 'now written "structured_outputs": {"regex": ...}'),
    ],
)
def test_wrong_ones_are_named(api: RunningApi, fields: dict[str, Any], param: str, words: str) -> None:
    body = {"model": MODEL, "messages": MESSAGES, **fields}
    reply = httpx.post(f"{api.url}/v1/chat/completions", json=body, timeout=90)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert "structured_outputs.json" not in error["message"]
