"""An accepted API request: the sequences to generate and what the answer says about itself.

Every endpoint comes through `make_job`, so that nothing reaches an engine by a way with fewer checks.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_ray.engine.requests import check_request, expand_request
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import RequestError
from deepseek_ray.messages import GenerateRequest, SamplingParams
from deepseek_ray.serving.backend import Backend, ServedModel
from deepseek_ray.serving.events import Output
from deepseek_ray.serving.limits import ApiLimits
from deepseek_ray.serving.replies import PromptTokensDetails, Usage
from deepseek_ray.serving.schema import GenerationFields
from deepseek_ray.serving.structure import wanted_structure

_SAMPLING_FIELDS = (
    "n",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "logit_bias",
)


@dataclass(frozen=True)
class ApiContext:
    """What endpoints work with."""

    backend: Backend
    tokenizer: Tokenizer
    model: ServedModel
    limits: ApiLimits


@dataclass(frozen=True)
class Job:
    id: str
    """Id of the answer: `chatcmpl-...` or `cmpl-...`."""
    created: int
    model: str
    prompts: list[list[int]]
    requests: list[GenerateRequest]
    """One per choice; choice i continues prompt i // n."""
    typed_client: bool = False
    """The client is an official OpenAI library, which holds answers to its types (it can be told to refuse others)."""

    @property
    def choices_per_prompt(self) -> int:
        return len(self.requests) // len(self.prompts)

    def counts_prompt(self, index: int) -> bool:
        """Whether choice `index` is the first one of its prompt. A prompt counts once, however many choices it has."""
        return index % self.choices_per_prompt == 0

    def usage(self, completion_tokens: int, cached_tokens: int) -> Usage:
        """`cached_tokens`: found in the prefix cache, of the choices that count."""
        prompt_tokens = sum(map(len, self.prompts))
        total = prompt_tokens + completion_tokens
        return Usage(prompt_tokens, completion_tokens, total, PromptTokensDetails(cached_tokens))

    def usage_of(self, outputs: Sequence[Output]) -> Usage:
        """Of the whole answer."""
        cached = sum(output.num_cached_tokens for i, output in enumerate(outputs) if self.counts_prompt(i))
        return self.usage(sum(output.num_tokens for output in outputs), cached)


def make_job(
    context: ApiContext,
    fields: GenerationFields,
    params: SamplingParams,
    prompts: Sequence[list[int]],
    prompt_field: str,
    answer_id: str,
    prompt_logprobs: int | None = None,
) -> Job:
    """Check `params` and every prompt (token ids) against the model and the limits; RequestError names the field."""
    num_choices = len(prompts) * params.n
    if num_choices > context.limits.max_choices:
        raise RequestError(
            f"{len(prompts)} prompts with n {params.n} make {num_choices} outputs; at most {context.limits.max_choices}"
            " per request: send fewer, or several requests",
            param="n",
        )
    requests: list[GenerateRequest] = []
    for prompt in prompts:
        _check_length(len(prompt), params.max_tokens, context.model.max_model_len, prompt_field)
        # The id is always fresh: two clients that choose the same one must not meet in the engine.
        request = GenerateRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt,
            params=params,
            deadline_seconds=context.limits.request_timeout_seconds,
            prompt_logprobs=prompt_logprobs,
            cache_salt=fields.cache_salt,
        )
        expanded = expand_request(request)
        _check_request(expanded[0], context, prompt_field)
        requests += expanded
    return Job(answer_id, int(time.time()), fields.model, list(prompts), requests)


def sampling_params(
    fields: GenerationFields, max_tokens: int | None, logprobs: int | None, vocab_size: int
) -> SamplingParams:
    """The request's sampling fields over the defaults, checked."""
    given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(fields, name)) is not None}
    structure = wanted_structure(fields)
    params = SamplingParams(**given, max_tokens=max_tokens, logprobs=logprobs, structured_outputs=structure)
    params.validate(vocab_size)
    return params


def _check_request(request: GenerateRequest, context: ApiContext, prompt_field: str) -> None:
    try:
        check_request(request, context.model.vocab_size, context.model.max_model_len)
    except RequestError as error:
        if error.param == "prompt":
            error.param = prompt_field
        raise


def _check_length(num_prompt_tokens: int, max_tokens: int | None, max_model_len: int, prompt_field: str) -> None:
    wanted = num_prompt_tokens + (1 if max_tokens is None else max_tokens)
    if wanted > max_model_len:
        asked = "at least 1 token of output" if max_tokens is None else f"{max_tokens} tokens of output"
        raise RequestError(
            f"this model's context holds {max_model_len} tokens; the request needs {wanted} ({num_prompt_tokens} in "
            f"{prompt_field} and {asked}); shorten {prompt_field} or lower max_tokens",
            param=prompt_field,
            code="context_length_exceeded",
        )
