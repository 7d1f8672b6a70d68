"""The fields that give an output its shape: OpenAI's `response_format`, and vLLM's `structured_outputs`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from deepseek_ray.engine.grammar_check import MAX_PROCESSES, GrammarChecker
from deepseek_ray.errors import RequestError
from deepseek_ray.messages import StructuredOutputsParams


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class JsonSchemaFormat(_Fields):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    """Accepted and without effect: say in a message what the fields mean."""
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """Without effect: the output always follows the schema."""


class ResponseFormat(_Fields):
    """`regex` is ours; the other types are OpenAI's."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchemaFormat | None = None
    regex: str | None = None


class StructuredOutputs(_Fields):
    """`StructuredOutputsParams` as a client writes it."""

    json_value: Annotated[str | dict[str, Any] | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None


class HasStructure(Protocol):
    """A request body, as far as this file is concerned."""

    @property
    def response_format(self) -> ResponseFormat | None: ...
    @property
    def structured_outputs(self) -> StructuredOutputs | None: ...


def wanted_structure(fields: HasStructure) -> StructuredOutputsParams | None:
    """What a body asks for, None for free text; RequestError names the field that is missing or one too many."""
    wanted = _of_response_format(fields.response_format) if fields.response_format else None
    if fields.structured_outputs is None:
        given = wanted
    elif wanted is not None:
        raise RequestError(
            "structured_outputs and response_format both give the output a shape; leave one out", "structured_outputs"
        )
    else:
        given = StructuredOutputsParams(**fields.structured_outputs.model_dump(by_alias=True))
    if given is not None:
        with _in_words_of(fields):
            given.validate()
    return given


class StructureChecker:
    """Tries constraints out before a request is admitted, without holding up the event loop."""

    def __init__(self) -> None:
        self._checker = GrammarChecker()
        # Threads of its own: requests that wait here for a seat must not keep others from the loop's.
        self._threads = ThreadPoolExecutor(MAX_PROCESSES, thread_name_prefix="grammar check")

    async def check(self, fields: HasStructure, structure: StructuredOutputsParams) -> None:
        """RequestError naming the field that holds what cannot be used."""
        with _in_words_of(fields):
            await asyncio.get_running_loop().run_in_executor(self._threads, self._checker.check, structure)


def _of_response_format(wanted: ResponseFormat) -> StructuredOutputsParams | None:
    for name in ("json_schema", "regex"):
        if (wanted.type == name) != (getattr(wanted, name) is not None):
            verb = "needs" if wanted.type == name else "does not take"
            raise RequestError(f"response_format of type {wanted.type!r} {verb} {name}", f"response_format.{name}")
    if wanted.json_schema is not None:
        return StructuredOutputsParams(json=wanted.json_schema.json_schema)
    if wanted.regex is not None:
        return StructuredOutputsParams(regex=wanted.regex)
    return StructuredOutputsParams(json_object=True) if wanted.type == "json_object" else None


@contextmanager
def _in_words_of(fields: HasStructure) -> Iterator[None]:
    """Errors name the field the client has sent."""
    try:
        yield
    except RequestError as error:
        if fields.structured_outputs is not None or error.param is None:
            raise
        names = {"structured_outputs.json": "response_format.json_schema.schema"}
        name = names.get(error.param, error.param.replace("structured_outputs", "response_format"))
        raise RequestError(error.message.replace(error.param, name, 1), name, error.code) from None
