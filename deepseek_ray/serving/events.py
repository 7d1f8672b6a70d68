"""Token events of several sequences as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from deepseek_ray import errors
from deepseek_ray.errors import DeepSeekRayError, UnavailableError
from deepseek_ray.messages import GenerateRequest, TokenEvent, TokenLogprob
from deepseek_ray.serving.backend import Backend

_QUEUED_EVENTS_PER_SEQUENCE = 8


async def generate_all(
    backend: Backend, requests: Sequence[GenerateRequest]
) -> AsyncGenerator[tuple[int, TokenEvent], None]:
    """Events of all requests as they come, each with its request's place in `requests`.

    The first error ends all of them. Closing the generator stops the work.
    """
    if len(requests) == 1:
        async with aclosing(_checked(backend, requests[0])) as events:
            async for event in events:
                yield 0, event
        return
    queue: asyncio.Queue[tuple[int, TokenEvent | Exception | None]] = asyncio.Queue(
        _QUEUED_EVENTS_PER_SEQUENCE * len(requests)
    )
    pumps = [asyncio.create_task(_pump(backend, request, index, queue)) for index, request in enumerate(requests)]
    try:
        running = len(pumps)
        while running:
            index, item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    backend: Backend,
    request: GenerateRequest,
    index: int,
    queue: asyncio.Queue[tuple[int, TokenEvent | Exception | None]],
) -> None:
    try:
        async with aclosing(_checked(backend, request)) as events:
            async for event in events:
                await queue.put((index, event))
    except Exception as error:
        await queue.put((index, error))
    else:
        await queue.put((index, None))


async def _checked(backend: Backend, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
    """Events up to the finish reason; an output that ends in any other way is an error, never a short answer."""
    async with aclosing(backend.generate(request)) as events:
        async for event in events:
            if event.finish_reason in ("error", "abort"):
                raise _error_of(event)
            yield event
            if event.finish_reason is not None:
                return
    raise UnavailableError("the output broke off before it was finished; send the request again")


def _error_of(event: TokenEvent) -> Exception:
    if event.finish_reason == "abort":
        return UnavailableError("the server stopped this request before it was finished; send it again")
    kind = getattr(errors, event.error_kind or "", None)
    if isinstance(kind, type) and issubclass(kind, DeepSeekRayError):
        return kind(event.error or "the request failed")
    return RuntimeError(f"{event.error_kind}: {event.error}")


@dataclass
class Output:
    """Everything one sequence gave."""

    text: str = ""
    num_tokens: int = 0
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None
    finish_reason: str = ""


async def collect(backend: Backend, requests: Sequence[GenerateRequest]) -> list[Output]:
    """The finished outputs, in the order of `requests`."""
    outputs = [Output() for _ in requests]
    async with aclosing(generate_all(backend, requests)) as events:
        async for index, event in events:
            output = outputs[index]
            output.text += event.text
            output.num_tokens += len(event.token_ids)
            output.num_cached_tokens += event.num_cached_tokens or 0
            output.logprobs += event.logprobs or ()
            output.prompt_logprobs = output.prompt_logprobs or event.prompt_logprobs
            output.finish_reason = event.finish_reason or ""
    return outputs
