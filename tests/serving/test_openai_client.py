"""The real OpenAI client, with strict validation of every answer, against the API over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import openai
import pytest
from api_server import MODEL, EngineBackend, RunningApi, running_api
from fakes import byte_tokenizer
from openai import OpenAI


@pytest.fixture(scope="module")
def server() -> Iterator[RunningApi]:
    with running_api(EngineBackend) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningApi) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", _strict_response_validation=True, max_retries=0) as strict:
        yield strict


MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == [MODEL]
    card = client.models.retrieve(MODEL)
    assert (card.id, card.object, card.owned_by, card.created) == (MODEL, "model", "deepseek-ray", 1_700_000_000)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/name")


def test_chat_and_its_stream_say_the_same(client: OpenAI) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    choice = whole.choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    assert choice.message.content
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    prompt = byte_tokenizer().apply_chat_template(MESSAGES)
    assert whole.usage.prompt_tokens == len(prompt.encode())
    assert whole.usage.completion_tokens == 24


def test_usage_says_what_the_prefix_cache_had(client: OpenAI) -> None:
    asked = {"model": MODEL, "prompt": "a prompt of forty characters, and no more", "max_tokens": 2}

    def cached(**extra: object) -> int:
        usage = client.completions.create(**asked, **extra).usage
        assert usage.prompt_tokens == 41
        return usage.prompt_tokens_details.cached_tokens

    assert cached(extra_body={"cache_salt": "one"}) == 0
    assert cached(extra_body={"cache_salt": "one"}) == 32
    assert cached(extra_body={"cache_salt": "two"}) == 0
    assert [cached(), cached(), cached(n=2)] == [0, 32, 32], "a prompt counts once"
    *_, last = client.completions.create(**asked, n=2, stream=True, stream_options={"include_usage": True})
    assert last.usage.prompt_tokens_details.cached_tokens == 32
    assert cached(logprobs=1, echo=True) == 0, "its log-probabilities are asked for: every token is computed"


def test_without_include_usage_no_chunk_has_usage(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=3, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_content_parts_and_the_developer_role(client: OpenAI) -> None:
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "hello"},
    ]
    asked = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    assert (
        client.chat.completions.create(messages=parts, **asked).choices[0].message
        == client.chat.completions.create(messages=MESSAGES, **asked).choices[0].message
    )


def test_an_answer_can_be_sent_back_as_it_came(client: OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=4)
    again = [*MESSAGES, first.choices[0].message.model_dump(), {"role": "user", "content": "more"}]
    assert client.chat.completions.create(model=MODEL, messages=again, max_tokens=4).choices[0].message.content


def test_chat_logprobs(client: OpenAI) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    entries = whole.choices[0].logprobs.content
    assert len(entries) == 6
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0  # greedy: the most likely token was taken
        assert entry.top_logprobs[0].bytes == entry.bytes
    shown = [e.bytes for e in entries if len(e.bytes) == 1]  # every token is a byte, but for the special ones
    assert bytes(b for bs in shown for b in bs).decode(errors="replace") == whole.choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True))
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert streamed == entries
    alone = client.chat.completions.create(**asked, logprobs=True)
    assert [entry.logprob for entry in alone.choices[0].logprobs.content] == [entry.logprob for entry in entries]
    assert all(entry.top_logprobs == [] for entry in alone.choices[0].logprobs.content)


def test_n_choices_are_those_of_single_requests(client: OpenAI) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 1.5}
    whole = client.chat.completions.create(**asked, n=3, seed=5)
    singles = [client.chat.completions.create(**asked, seed=5 + i).choices[0].message.content for i in range(3)]
    assert [choice.message.content for choice in whole.choices] == singles
    assert len(set(singles)) == 3
    assert whole.usage.completion_tokens == 36
    assert whole.usage.prompt_tokens == client.chat.completions.create(**asked).usage.prompt_tokens
    texts = ["", "", ""]
    opened: set[int] = set()
    for chunk in client.chat.completions.create(**asked, n=3, seed=5, stream=True):
        (choice,) = chunk.choices
        assert (choice.delta.role == "assistant") == (choice.index not in opened)
        opened.add(choice.index)
        texts[choice.index] += choice.delta.content or ""
    assert texts == singles


def test_stop_strings_and_ids(client: OpenAI, server: RunningApi) -> None:
    asked = {"model": MODEL, "prompt": "abc", "max_tokens": 20, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[5:7]
    stopped = client.completions.create(**asked, stop=[stop]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")
    streamed = raw_stream(server, **asked, stop=[stop])
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == stopped.text
    first = client.completions.create(**asked, logprobs=0).choices[0].logprobs.tokens[0]
    ended = client.completions.create(**asked, extra_body={"stop_token_ids": [first.encode()[0]]}).choices[0]
    assert ended.finish_reason == "stop"


def test_completions_take_text_and_ids_one_or_many(client: OpenAI) -> None:
    asked = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    first = client.completions.create(prompt="one", **asked).choices[0].text
    second = client.completions.create(prompt="two!", **asked).choices[0].text
    both = client.completions.create(prompt=["one", "two!"], **asked)
    assert [choice.text for choice in both.choices] == [first, second]
    assert (both.usage.prompt_tokens, both.usage.completion_tokens) == (7, 12)
    assert client.completions.create(prompt=list(b"one"), **asked).choices[0].text == first
    ids = client.completions.create(prompt=[list(b"one"), list(b"two!")], n=2, **asked)
    assert [choice.text for choice in ids.choices] == [first, first, second, second]
    assert [choice.index for choice in ids.choices] == [0, 1, 2, 3]


def test_sixteen_tokens_are_the_default_of_completions(client: OpenAI) -> None:
    assert client.completions.create(model=MODEL, prompt="x").usage.completion_tokens <= 16


def test_echo_with_logprobs(client: OpenAI, server: RunningApi) -> None:
    asked = {"model": MODEL, "prompt": "hello", "max_tokens": 3, "temperature": 0}
    plain = client.completions.create(**asked, logprobs=2).choices[0]
    echoed = client.completions.create(**asked, logprobs=2, echo=True).choices[0]
    assert echoed.text == "hello" + plain.text
    assert echoed.logprobs.tokens == [*"hello", *plain.logprobs.tokens]
    assert echoed.logprobs.token_logprobs[5:] == plain.logprobs.token_logprobs
    assert echoed.logprobs.text_offset[:6] == [0, 1, 2, 3, 4, 5]
    assert plain.logprobs.text_offset[0] == 0
    assert echoed.logprobs.top_logprobs[0] == {}
    # The entry of a prompt's token is what generating it after the tokens before it would report.
    for place, token in enumerate("hello"[1:], start=1):
        reported = client.completions.create(
            model=MODEL, prompt="hello"[:place], max_tokens=1, logprobs=1, logit_bias={str(ord(token)): 100}
        ).choices[0]
        assert reported.logprobs.tokens == [token]
        assert reported.logprobs.token_logprobs[0] == pytest.approx(echoed.logprobs.token_logprobs[place])
    assert client.completions.create(**asked, echo=True).choices[0].text == echoed.text
    streamed = raw_stream(server, **asked, echo=True, logprobs=2)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == echoed.text
    values = [v for chunk in streamed if (lp := chunk["choices"][0]["logprobs"]) for v in lp["token_logprobs"]]
    assert values == echoed.logprobs.token_logprobs


def test_streamed_completions(client: OpenAI) -> None:
    asked = {"model": MODEL, "prompt": ["one", "two!"], "max_tokens": 5, "temperature": 0}
    whole = client.completions.create(**asked)
    *chunks, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    texts = ["", ""]
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
    assert len(chunks) > 2
    assert texts == [choice.text for choice in whole.choices]
    assert (last.choices, last.usage.completion_tokens) == ([], 10)


def test_streamed_completions_end_with_a_finish_reason(server: RunningApi) -> None:
    """Null until then for every client whose type has room for it."""
    asked = {"model": MODEL, "prompt": "one", "max_tokens": 5, "temperature": 0, "stream": True}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in raw_stream(server, **asked)]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert len(reasons) > 2


def raw_stream(server: RunningApi, **asked: object) -> list[dict]:
    """The events of a completion as any HTTP client gets them."""
    body = httpx.post(f"{server.url}/v1/completions", json={**asked, "stream": True}).text
    events = body.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def test_vllm_fields(client: OpenAI) -> None:
    asked = {"model": MODEL, "prompt": "abc", "temperature": 1.0, "max_tokens": 6}
    greedy = client.completions.create(**{**asked, "temperature": 0}).choices[0].text
    extra = {"top_k": 1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 2, "ignore_eos": True}
    answer = client.completions.create(**asked, extra_body={**extra, "request_id": "mine-1"})
    assert answer.choices[0].text == greedy
    assert answer.id == "cmpl-mine-1"


def test_fields_without_effect_are_accepted(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=2,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        parallel_tool_calls=True,
        logit_bias={},
        stop=None,
        extra_body={"ignore_eos": True},  # drawn at temperature 1: an end of text is possible
    )
    assert answer.choices[0].finish_reason == "length"


def test_errors_are_the_clients_own_classes(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=MODEL, prompt="x" * 250, max_tokens=7)
    assert too_long.value.code == "context_length_exceeded"
    assert "256" in too_long.value.message
    assert "257" in too_long.value.message
    assert client.completions.create(model=MODEL, prompt="x" * 250, max_tokens=6).choices
