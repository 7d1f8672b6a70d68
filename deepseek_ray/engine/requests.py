"""A request before it runs: is it one that can be served, what are its seeds. No torch, so ingresses use it too."""

from __future__ import annotations

import hashlib
import math

import msgspec

from deepseek_ray.errors import RequestError
from deepseek_ray.messages import GenerateRequest, SamplingParams


def check_request(request: GenerateRequest, vocab_size: int, max_model_len: int) -> None:
    """RequestError (with `param`) when no engine of this vocabulary and context length can serve the request."""
    if request.params.n != 1:
        raise RequestError(f"n is {request.params.n}; an engine takes one sequence: expand the request", param="n")
    request.params.validate(vocab_size)
    if not request.prompt_token_ids:
        raise RequestError("the prompt is empty; it needs at least one token", param="prompt")
    if len(request.prompt_token_ids) >= max_model_len:
        raise RequestError(
            f"the prompt has {len(request.prompt_token_ids)} tokens; the context holds {max_model_len} including at "
            "least one of output; shorten the prompt, or raise max_model_len and kv_cache_bytes",
            param="prompt",
            code="context_length_exceeded",
        )
    _check_ids(request.prompt_token_ids, "prompt", vocab_size)
    _check_ids(request.output_token_ids, "output_token_ids", vocab_size)
    if request.deadline_seconds is not None and math.isnan(request.deadline_seconds):
        raise RequestError("deadline_seconds is not a number", param="deadline_seconds")


def check_needs_no_tokenizer(params: SamplingParams) -> None:
    """RequestError for what a model without a tokenizer cannot do."""
    if params.stop_strings:
        raise RequestError("stop strings need a tokenizer and this model has none; use stop_token_ids", "stop")
    if params.structured_outputs is not None:
        raise RequestError("structured outputs need a tokenizer and this model has none", "structured_outputs")


def _check_ids(token_ids: list[int], param: str, vocab_size: int) -> None:
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{param} holds token id {token_id}; the vocabulary has ids 0 to {vocab_size - 1}", param=param
            )


def max_output_tokens(request: GenerateRequest, max_model_len: int) -> int:
    """Most tokens the output can have: `max_tokens`, cut to what the context leaves beside the prompt."""
    room = max_model_len - len(request.prompt_token_ids)
    return room if request.params.max_tokens is None else min(request.params.max_tokens, room)


def expand_request(request: GenerateRequest) -> list[GenerateRequest]:
    """One request per wanted output: ids `<id>-0`, `<id>-1`, ..., and as in vLLM output i samples with `seed + i`."""
    if request.params.n == 1:
        return [request]
    return [
        msgspec.structs.replace(
            request, request_id=f"{request.request_id}-{index}", params=_params_of_output(request.params, index)
        )
        for index in range(request.params.n)
    ]


def _params_of_output(params: SamplingParams, index: int) -> SamplingParams:
    seed = params.seed
    if seed is not None:
        seed = (seed + index + 2**63) % 2**64 - 2**63  # stays within the range that SamplingParams allows
    return msgspec.structs.replace(params, n=1, seed=seed)


def sampling_seed(request: GenerateRequest, engine_seed: int) -> int:
    """The request's own seed, else one that every engine with the same `engine_seed` derives for this request id."""
    if request.params.seed is not None:
        return request.params.seed
    digest = hashlib.sha256(f"{engine_seed}:{request.request_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
