"""`/v1/chat/completions`: a conversation to an answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from deepseek_ray.errors import RequestError
from deepseek_ray.messages import TokenEvent
from deepseek_ray.serving.events import Output, collect, generate_all
from deepseek_ray.serving.job import ApiContext, Job, make_job, sampling_params
from deepseek_ray.serving.logprobs import chat_logprobs
from deepseek_ray.serving.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatReply,
    ReplyMessage,
)
from deepseek_ray.serving.schema import ChatRequest
from deepseek_ray.serving.stream import DONE, StreamUsage, encode_event


def plan_chat(request: ChatRequest, context: ApiContext, answer_id: str) -> Job:
    """Render and tokenise the conversation; RequestError names the field that cannot be honoured."""
    _check_logprobs(request)
    num_messages = len(request.messages)
    if not 0 < num_messages <= context.limits.max_messages:
        raise RequestError(
            f"messages holds {num_messages} messages; send 1 to {context.limits.max_messages}", param="messages"
        )
    try:
        params = sampling_params(request, _max_tokens(request), _num_logprobs(request), context.model.vocab_size)
    except RequestError as error:
        raise _in_chat_words(error, request) from None
    text = context.tokenizer.apply_chat_template(
        [{"role": _TEMPLATE_ROLES.get(m.role, m.role), "content": m.content} for m in request.messages]
    )
    prompt = context.tokenizer.encode(text, add_special_tokens=False)  # the template writes them
    return make_job(context, request, params, [prompt], "messages", answer_id)


_TEMPLATE_ROLES = {"developer": "system"}
"""OpenAI's newer name; templates know the older one."""


async def reply_chat(request: ChatRequest, job: Job, context: ApiContext) -> ChatReply:
    """The whole answer."""
    outputs = await collect(context.backend, job.requests)

    def choice(index: int, output: Output) -> ChatChoice:
        logprobs = chat_logprobs(output.logprobs, context.tokenizer) if request.logprobs else None
        return ChatChoice(index, ReplyMessage(output.text), logprobs, output.finish_reason)

    return ChatReply(
        id=job.id,
        created=job.created,
        model=job.model,
        choices=[choice(index, output) for index, output in enumerate(outputs)],
        usage=job.usage_of(outputs),
    )


async def stream_chat(request: ChatRequest, job: Job, context: ApiContext) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events: roles, text as it comes, finish reasons, usage when asked for, `[DONE]`."""
    usage = StreamUsage(job, request.stream_options)

    def chunk(choices: list[ChatChunkChoice]) -> bytes:
        return encode_event(
            ChatChunk(id=job.id, created=job.created, model=job.model, choices=choices, usage=usage.of_chunk)
        )

    opened = False
    async with aclosing(generate_all(context.backend, job.requests)) as events:
        async for index, event in events:
            if not opened:  # with the first event, so that a refused request is still an error with its own status
                opened = True
                for place in range(len(job.requests)):
                    yield chunk([ChatChunkChoice(place, ChatDelta("assistant", ""))])
            usage.add(index, event)
            if event.text or event.logprobs or event.finish_reason:
                yield chunk([_chunk_choice(index, event, request, context)])
    if usage.wanted:
        yield encode_event(ChatChunk(id=job.id, created=job.created, model=job.model, choices=[], usage=usage.total))
    yield DONE


def _chunk_choice(index: int, event: TokenEvent, request: ChatRequest, context: ApiContext) -> ChatChunkChoice:
    delta = ChatDelta(content=event.text) if event.text else ChatDelta()
    logprobs = chat_logprobs(event.logprobs, context.tokenizer) if request.logprobs and event.logprobs else None
    return ChatChunkChoice(index, delta, logprobs, event.finish_reason)


def _max_tokens(request: ChatRequest) -> int | None:
    given = [value for value in (request.max_tokens, request.max_completion_tokens) if value is not None]
    return min(given, default=None)


def _num_logprobs(request: ChatRequest) -> int | None:
    return (request.top_logprobs or 0) if request.logprobs else None


def _check_logprobs(request: ChatRequest) -> None:
    if request.top_logprobs and not request.logprobs:
        raise RequestError(
            f"top_logprobs is {request.top_logprobs} but logprobs is not true; set logprobs to true or leave it out",
            param="top_logprobs",
        )


def _in_chat_words(error: RequestError, request: ChatRequest) -> RequestError:
    """SamplingParams' names, said in the names of this endpoint."""
    names = {"logprobs": "top_logprobs"}
    if request.max_tokens is None:
        names["max_tokens"] = "max_completion_tokens"
    name = names.get(error.param or "")
    if name is None:
        return error
    return RequestError(error.message.replace(error.param or "", name, 1), name, error.code)
