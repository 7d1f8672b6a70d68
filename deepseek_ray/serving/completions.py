"""`/v1/completions`: prompts, as text or token ids, to their continuations."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import RequestError
from deepseek_ray.messages import SamplingParams, TokenEvent, TokenLogprob
from deepseek_ray.serving.events import Output, collect, generate_all
from deepseek_ray.serving.job import ApiContext, Job, make_job, sampling_params
from deepseek_ray.serving.logprobs import CompletionLogprobWriter
from deepseek_ray.serving.replies import CompletionChoice, CompletionLogprobs, CompletionReply
from deepseek_ray.serving.schema import CompletionRequest
from deepseek_ray.serving.stream import DONE, StreamUsage, encode_event


def plan_completion(request: CompletionRequest, context: ApiContext, answer_id: str) -> Job:
    """Tokenise the prompts; RequestError names the field that cannot be honoured."""
    max_tokens = SamplingParams().max_tokens if request.max_tokens is None else request.max_tokens
    params = sampling_params(request, max_tokens, request.logprobs, context.model.vocab_size)
    prompts = _prompts(request)
    if not 0 < len(prompts) <= context.limits.max_prompts:
        raise RequestError(
            f"prompt holds {len(prompts)} prompts; send 1 to {context.limits.max_prompts}", param="prompt"
        )
    ids = [context.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    prompt_logprobs = request.logprobs if request.echo else None
    return make_job(context, request, params, ids, "prompt", answer_id, prompt_logprobs)


async def reply_completion(request: CompletionRequest, job: Job, context: ApiContext) -> CompletionReply:
    """The whole answer."""
    outputs = await collect(context.backend, job.requests)

    def choice(index: int, output: Output) -> CompletionChoice:
        writer = _ChoiceWriter(request, job, index, context.tokenizer)
        return CompletionChoice(
            index,
            writer.opening + output.text,
            writer.logprobs(output.prompt_logprobs, output.logprobs),
            output.finish_reason,
        )

    return CompletionReply(
        id=job.id,
        created=job.created,
        model=job.model,
        choices=[choice(index, output) for index, output in enumerate(outputs)],
        usage=job.usage_of(outputs),
    )


async def stream_completion(request: CompletionRequest, job: Job, context: ApiContext) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events: text as it comes, finish reasons, usage when asked for, `[DONE]`."""
    usage = StreamUsage(job, request.stream_options)
    writers: dict[int, _ChoiceWriter] = {}

    def chunk(choices: list[CompletionChoice]) -> bytes:
        return encode_event(
            CompletionReply(id=job.id, created=job.created, model=job.model, choices=choices, usage=usage.of_chunk)
        )

    async with aclosing(generate_all(context.backend, job.requests)) as events:
        async for index, event in events:
            usage.add(index, event)
            opening = ""
            if index not in writers:
                writers[index] = _ChoiceWriter(request, job, index, context.tokenizer)
                opening = writers[index].opening
            if opening or event.text or event.logprobs or event.finish_reason:
                yield chunk([_chunk_choice(index, event, opening, writers[index], job.typed_client)])
    if usage.wanted:
        yield encode_event(
            CompletionReply(id=job.id, created=job.created, model=job.model, choices=[], usage=usage.total)
        )
    yield DONE


class _ChoiceWriter:
    """One choice's echoed prompt and log-probabilities."""

    def __init__(self, request: CompletionRequest, job: Job, index: int, tokenizer: Tokenizer) -> None:
        prompt_index = index // job.choices_per_prompt
        self._prompt_ids = job.prompts[prompt_index]
        prompt = _prompts(request)[prompt_index]
        self._echo = bool(request.echo)
        self._wants_logprobs = request.logprobs is not None
        self.opening = ""
        """What the choice's text begins with: the prompt when it is to be echoed."""
        if self._echo:
            self.opening = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        self._prompt_writer = CompletionLogprobWriter(tokenizer)
        self._output_writer = CompletionLogprobWriter(tokenizer, self._prompt_ids, len(self.opening))

    def logprobs(
        self, prompt_entries: Sequence[TokenLogprob] | None, entries: Sequence[TokenLogprob]
    ) -> CompletionLogprobs | None:
        if not self._wants_logprobs:
            return None
        output = self._output_writer.write(entries)
        if not self._echo or prompt_entries is None:
            return output
        echoed = self._prompt_writer.write_prompt(self._prompt_ids[0], prompt_entries)
        return CompletionLogprobs(
            echoed.tokens + output.tokens,
            echoed.token_logprobs + output.token_logprobs,
            echoed.top_logprobs + output.top_logprobs,
            echoed.text_offset + output.text_offset,
        )


def _chunk_choice(
    index: int, event: TokenEvent, opening: str, writer: _ChoiceWriter, typed_client: bool
) -> CompletionChoice:
    """One chunk's choice. Before the end `finish_reason` is null, as OpenAI's own API sends it. The type of OpenAI's
    libraries has no null there, though, and their strict validation ends the stream at one: they get "length"."""
    logprobs = writer.logprobs(event.prompt_logprobs, event.logprobs) if event.logprobs else None
    unfinished = "length" if typed_client else None
    return CompletionChoice(index, opening + event.text, logprobs, event.finish_reason or unfinished)


def _prompts(request: CompletionRequest) -> Sequence[str | list[int]]:
    """The prompts of a request, whichever of the four forms it took."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [prompt]
    return prompt  # type: ignore[return-value]
