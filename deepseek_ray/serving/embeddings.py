"""`/v1/embeddings`: inputs to vectors, in the shape of OpenAI's API."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import msgspec
import numpy as np
from pydantic import BeforeValidator

from deepseek_ray.errors import DeadlineExceededError, RequestError
from deepseek_ray.serving.auth import ApiKeys
from deepseek_ray.serving.batch_runner import BatchRunner
from deepseek_ray.serving.body import parse_body
from deepseek_ray.serving.exchange import Exchange
from deepseek_ray.serving.http_app import Handler, HttpApp, check_media_type
from deepseek_ray.serving.limits import ApiLimits
from deepseek_ray.serving.models import find_model
from deepseek_ray.serving.schema import StrictFields, parse_request, text_or_ids

Vector = np.ndarray[Any, np.dtype[np.float32]]


class Encoder(Protocol):
    """`models.text_encoder.TextEncoder`, or a stand-in."""

    width: int

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]: ...

    def check_ids(self, ids: Sequence[int]) -> None:
        """RequestError for an input that the model cannot take."""
        ...


@dataclass(frozen=True)
class EncoderModel:
    """What is served."""

    served_model_name: str
    model_dir: str
    max_model_len: int
    created: int


class EmbeddingsRequest(StrictFields):
    model: str
    input: Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(text_or_ids)]
    """Text, texts, token ids, or lists of token ids; ids are used as they are, without special tokens."""
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    """Only that many numbers of each vector, brought back to length 1."""


class Embedding(msgspec.Struct):
    index: int
    embedding: list[float] | str
    """Numbers, or base64 of little-endian float32."""
    object: Literal["embedding"] = "embedding"


class EmbeddingsUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(msgspec.Struct):
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
    object: Literal["list"] = "list"


class EmbeddingsApi(HttpApp):
    """The HTTP application of one encoder."""

    def __init__(
        self,
        model: EncoderModel,
        encoder: Encoder,
        runner: BatchRunner[list[int], Vector],
        limits: ApiLimits,
        keys: ApiKeys,
        max_inputs: int,
        echo_request_id: bool,
    ) -> None:
        """`runner` turns token ids into vectors; `max_inputs` of one request."""
        self._served = {model.served_model_name: model}
        super().__init__(self._served, keys, echo_request_id)
        self._encoder = encoder
        self._runner = runner
        self._limits = limits
        self._max_inputs = max_inputs

    async def ready(self) -> bool:
        return True

    def post(self) -> dict[str, Handler]:
        return {"/v1/embeddings": self._embed}

    async def _embed(self, exchange: Exchange) -> None:
        check_media_type(exchange)
        body = await exchange.read_body(self._limits.max_body_bytes, self._limits.body_timeout_seconds)
        await exchange.unless_client_leaves(self._answer(exchange, body))

    async def _answer(self, exchange: Exchange, body: bytes) -> None:
        seconds = self._limits.request_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                request, rows = await asyncio.to_thread(self._read, body)
                vectors = await self._runner.submit(rows)
        except TimeoutError:
            raise DeadlineExceededError(f"the request's deadline of {seconds:g} s is over; send fewer inputs") from None
        await exchange.reply(_reply(request, rows, vectors))

    def _read(self, body: bytes) -> tuple[EmbeddingsRequest, list[list[int]]]:
        """The request and the token ids of each input; RequestError."""
        request = parse_request(EmbeddingsRequest, parse_body(body, self._limits.max_json_depth))
        find_model(request.model, self._served)
        if request.dimensions is not None and not 1 <= request.dimensions <= self._encoder.width:
            raise RequestError(
                f"dimensions is {request.dimensions}; this model has vectors of {self._encoder.width} numbers: send 1 "
                f"to {self._encoder.width}",
                param="dimensions",
            )
        rows = self._token_ids(request.input)
        for row in rows:
            self._encoder.check_ids(row)
        return request, rows

    def _token_ids(self, given: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
        inputs: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        if not 0 < len(inputs) <= self._max_inputs:
            raise RequestError(f"input holds {len(inputs)} inputs; send 1 to {self._max_inputs}", param="input")
        if not isinstance(inputs[0], str):
            return inputs
        if "" in inputs:
            raise RequestError("input holds an empty string; send text", param="input")
        return self._encoder.tokenize(inputs)


def _reply(request: EmbeddingsRequest, rows: list[list[int]], vectors: Sequence[Vector]) -> EmbeddingsReply:
    num_tokens = sum(map(len, rows))
    data = [
        Embedding(index, _written(_shortened(vector, request.dimensions), request.encoding_format))
        for index, vector in enumerate(vectors)
    ]
    return EmbeddingsReply(data, request.model, EmbeddingsUsage(num_tokens, num_tokens))


def _shortened(vector: Vector, dimensions: int | None) -> Vector:
    if dimensions is None:
        return vector
    short = vector[:dimensions]
    return short / max(float(np.linalg.norm(short)), 1e-12)


def _written(vector: Vector, encoding_format: str | None) -> list[float] | str:
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
