"""Where `chat` and `complete` get their text from: a server, or a model loaded into this process."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from deepseek_ray.errors import DeepSeekRayError, RequestError, UnavailableError
from deepseek_ray.messages import GenerateRequest, SamplingParams

if TYPE_CHECKING:
    import httpx

Message = dict[str, str]
_HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(/v1)?/?")


class TextSource(Protocol):
    """Streams text; raises DeepSeekRayError."""

    def chat(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[str]: ...
    def complete(self, prompt: str, params: SamplingParams) -> Iterator[str]: ...


def open_source(target: str, dtype: str, threads: int | None) -> TextSource:
    """`target` is http(s)://..., host:port, or a model directory; `dtype` and `threads` count for the last."""
    if target.startswith(("http://", "https://")):
        return ServerSource(target)
    if _HOST_AND_PORT.fullmatch(target) and not Path(target).exists():
        return ServerSource(f"http://{target}")
    return LocalSource(Path(target), dtype, threads)


class ServerSource:
    """The first model of a server that speaks the OpenAI API. `OPENAI_API_KEY` is sent when it is set."""

    def __init__(self, url: str) -> None:
        import httpx

        base = url.rstrip("/")
        key = os.environ.get("OPENAI_API_KEY")
        self._client = httpx.Client(
            base_url=base if base.endswith("/v1") else f"{base}/v1",
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(600, connect=10),
        )
        self._url = url
        self._model = self._first_model()

    def chat(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[str]:
        for choice in self._stream("chat/completions", {"messages": list(messages), **_fields(params)}):
            yield choice["delta"].get("content") or ""

    def complete(self, prompt: str, params: SamplingParams) -> Iterator[str]:
        for choice in self._stream("completions", {"prompt": prompt, **_fields(params)}):
            yield choice["text"]

    def _first_model(self) -> str:
        import httpx

        try:
            answer = self._client.get("models")
            if answer.status_code != 200:
                raise _error_of(answer)
            return answer.json()["data"][0]["id"]
        except httpx.TransportError as error:
            raise UnavailableError(f"{self._url} cannot be reached ({error}); is the server running?") from None
        except (ValueError, LookupError, TypeError):
            raise UnavailableError(f"{self._url} does not answer as an OpenAI API; check the address") from None

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        import httpx

        asked = {"model": self._model, "stream": True, **body}
        try:
            with self._client.stream("POST", path, json=asked) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise _error_of(answer)
                yield from _choices(answer)
        except httpx.TransportError as error:
            raise UnavailableError(f"the connection to {self._url} broke ({error}); ask again") from None


class LocalSource:
    """A model in this process, without Ray."""

    def __init__(self, model_dir: Path, dtype: str, threads: int | None) -> None:
        from deepseek_ray.config.engine import DeploymentConfig
        from deepseek_ray.serving.model_dir import check_model_dir

        values = {"model_dir": str(model_dir), "dtype": dtype, "threads": threads}
        config = DeploymentConfig.parse(values, "command line")
        check_model_dir(model_dir)
        from deepseek_ray.engine.offline import LocalBackend

        self._backend = LocalBackend(config)
        assert self._backend.tokenizer is not None, "check_model_dir has read it"
        self._tokenizer = self._backend.tokenizer

    def chat(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[str]:
        text = self._tokenizer.apply_chat_template(messages)
        return self._generate(self._tokenizer.encode(text, add_special_tokens=False), params)

    def complete(self, prompt: str, params: SamplingParams) -> Iterator[str]:
        return self._generate(self._tokenizer.encode(prompt), params)

    def _generate(self, prompt: list[int], params: SamplingParams) -> Iterator[str]:
        from deepseek_ray.engine.requests import check_request

        request = GenerateRequest(request_id=os.urandom(8).hex(), prompt_token_ids=prompt, params=params)
        check_request(request, self._backend.vocab_size, self._backend.max_model_len)
        for event in self._backend.run([request]):
            if event.error is not None:
                raise DeepSeekRayError(event.error)
            yield event.text


def _fields(params: SamplingParams) -> dict[str, Any]:
    """What differs from the defaults, which client and server share; `max_tokens` always, whose default is not."""
    defaults = msgspec.structs.asdict(SamplingParams())
    given = {name: value for name, value in msgspec.structs.asdict(params).items() if value != defaults[name]}
    return given if params.max_tokens is None else {**given, "max_tokens": params.max_tokens}


def _choices(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise UnavailableError(chunk["error"]["message"])
        yield from chunk["choices"]
    raise UnavailableError("the stream broke off before its end; ask again")


def _error_of(answer: httpx.Response) -> DeepSeekRayError:
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = answer.text[:200] or "no reason given"
    kind = RequestError if 400 <= answer.status_code < 500 else UnavailableError
    return kind(f"the server answered {answer.status_code}: {message}")
