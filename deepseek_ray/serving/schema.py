"""Request bodies of the OpenAI API, with the sampling fields that vLLM adds.

A field is honoured, or accepted because it does not change what is generated (`_IGNORED`), or refused by name. Types
are strict: "5" is not a number. Ranges are checked in one place, `SamplingParams.validate`.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from deepseek_ray.errors import RequestError
from deepseek_ray.serving.structure import ResponseFormat, StructuredOutputs

RequestT = TypeVar("RequestT", bound=BaseModel)


def _token_id_keys(value: Any) -> Any:
    """`logit_bias` is an object, so its token ids arrive as strings."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(key) if len(key) <= 10 else _bad_token_id(key): bias for key, bias in value.items()}
    except ValueError:
        raise PydanticCustomError("token_id", "keys must be token ids, written as decimal numbers") from None


def _bad_token_id(key: str) -> int:
    raise ValueError(key)


def _string_or_strings(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return value
    raise PydanticCustomError("stop", "send a string or a list of strings")


def text_or_ids(value: Any) -> Any:
    if isinstance(value, str) or _is_ids(value):
        return value
    if isinstance(value, list) and (all(isinstance(item, str) for item in value) or all(map(_is_ids, value))):
        return value
    raise PydanticCustomError(
        "prompt", "send a string, a list of strings, a list of token ids or a list of lists of token ids"
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _text_content(value: Any) -> Any:
    """A string, or parts of which every one is text; joined, since templates take text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("content", "send a string or a list of text parts")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError(
                "content_part",
                "this model takes text only; every part must have type 'text', one has {kind}",
                {"kind": ascii(kind)[:80]},
            )
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("content_part", "a part of type 'text' needs a string under 'text'")
    return "".join(part["text"] for part in value)


class StrictFields(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


class StreamOptions(StrictFields):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's: usage so far in every chunk."""
    include_obfuscation: bool | None = None
    """Accepted and without effect: chunks are never padded."""


class GenerationFields(StrictFields):
    """What both generating endpoints take. None means the default of `SamplingParams`."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: Annotated[str | list[str] | None, BeforeValidator(lambda v: v if v is None else _string_or_strings(v))] = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(_token_id_keys)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """vLLM's: latents are shared only with requests of the same salt, so that nobody without it can find out by the
    time a request takes which prompts were sent here."""
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")] | None = None
    """vLLM's: part of the answer's id."""


class ChatMessage(StrictFields):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_content)]
    name: str | None = None
    """Accepted and without effect: templates of this family do not show names."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        """Clients send earlier answers back as they came, with `"refusal": null, "tool_calls": null` and the like."""
        if not isinstance(value, dict):
            raise PydanticCustomError("message", "send an object with role and content")
        return {key: item for key, item in value.items() if item is not None}


class ChatRequest(GenerationFields):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionRequest(GenerationFields):
    prompt: Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(text_or_ids)]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    """Only the value of `n`, which asks for nothing more."""

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise RequestError(
                f"best_of is {self.best_of} and n is {self.n or 1}; they must be equal: choose among the outputs of n "
                "on your side",
                param="best_of",
                code="unsupported_parameter",
            )
        return self


_IGNORED = frozenset(
    {
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)

_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    # name: (is this value the default, which asks for nothing?, why not and what to do)
    "audio": (lambda value: False, "this model writes text only"),
    "chat_template": (lambda value: False, "the server's own template is used"),
    "chat_template_kwargs": (lambda value: value == {}, "the server's own template is used as it is"),
    "function_call": (lambda value: value in ("none", "auto"), "calling functions is not supported"),
    "functions": (lambda value: value == [], "calling functions is not supported"),
    **{
        f"guided_{name}": (lambda value: False, f'it is now written "structured_outputs": {{"{name}": ...}}')
        for name in ("choice", "grammar", "json", "regex")
    },
    "modalities": (lambda value: value == ["text"], 'only ["text"] is possible'),
    "reasoning_effort": (lambda value: value == "none", "this server does not steer reasoning"),
    "suffix": (lambda value: value == "", "text can only be continued, not filled in"),
    "tool_choice": (lambda value: value in ("none", "auto"), "calling tools is not supported"),
    "tools": (lambda value: value == [], "calling tools is not supported"),
    "web_search_options": (lambda value: False, "the server has no web search"),
}


def parse_request(kind: type[RequestT], values: Mapping[str, Any]) -> RequestT:
    """A body's values as `kind`; RequestError names the first field that is wrong."""
    wanted = {}
    for name, value in values.items():
        if name in kind.model_fields or (name not in _IGNORED and name not in _REFUSED):
            wanted[name] = value
        elif name in _REFUSED and value is not None:
            is_default, remedy = _REFUSED[name]
            if not is_default(value):
                raise RequestError(f"{name} is not supported: {remedy}; leave it out", name, "unsupported_parameter")
    try:
        return kind.model_validate(wanted)
    except ValidationError as error:
        raise _describe(error.errors(include_url=False)[0], kind) from None


def _describe(problem: ErrorDetails, kind: type[BaseModel]) -> RequestError:
    *path, last = problem["loc"]
    param = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(last), kind.model_fields, n=1) if not path else []
        hint = f"did you mean {near[0]!r}?" if near else "leave it out"
        return RequestError(f"unknown field {ascii(param)[:200]}; {hint}", param, "unknown_parameter")
    if problem["type"] == "missing":
        return RequestError(f"{param} is missing; it is required", param, "missing_required_parameter")
    return RequestError(f"{param} is {reprlib.repr(problem['input'])}: {problem['msg']}", param, "invalid_value")
