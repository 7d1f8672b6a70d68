"""What an ingress counts of the requests it serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field

import pytest

from deepseek_ray.errors import GenerationError, OverloadedError
from deepseek_ray.messages import GenerateRequest, RequestTiming, SamplingParams, TokenEvent
from deepseek_ray.metrics import METRICS
from deepseek_ray.serving.request_metrics import MeasuredBackend

REQUEST = GenerateRequest(request_id="r", prompt_token_ids=[1, 2, 3], params=SamplingParams())
TIMING = RequestTiming(queue_seconds=1.0, prefill_seconds=2.0, decode_seconds=3.0)


@dataclass
class Scripted:
    """Yields token events at the given times, then raises or ends. `now` is the clock."""

    times: Iterable[float]
    finish_reason: str | None = "stop"
    error: Exception | None = None
    now: float = 10.0
    sent: list[int] = field(default_factory=list)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        times = list(self.times)
        for index, time in enumerate(times):
            self.now = time
            last = index == len(times) - 1 and self.error is None
            reason = self.finish_reason if last else None
            timing = TIMING if reason else None
            yield TokenEvent(request_id="r", attempt=0, index=index, token_ids=[7], finish_reason=reason, timing=timing)
        if self.error is not None:
            raise self.error

    async def ready(self) -> bool:
        return True


def serve(script: Scripted, leave_after: int | None = None) -> MeasuredBackend:
    backend = MeasuredBackend(script, clock=lambda: script.now)

    async def read() -> None:
        events = backend.generate(REQUEST)
        async for event in events:
            if event.index + 1 == leave_after:
                break
        await events.aclose()

    if script.error is None:
        asyncio.run(read())
    else:
        with pytest.raises(type(script.error)):
            asyncio.run(read())
    return backend


def test_a_finished_output() -> None:
    backend = serve(Scripted([12.0, 13.0, 16.0]))
    tally = backend.take()
    assert tally.amounts == {"vllm_prompt_tokens_total": 3, "vllm_generation_tokens_total": 3}
    assert tally.finished == {"stop": 1}
    assert tally.observed == {
        "vllm_time_to_first_token_seconds": [2.0],
        "vllm_inter_token_latency_seconds": [1.0, 3.0],
        "vllm_request_time_per_output_token_seconds": [2.0],
        "vllm_e2e_request_latency_seconds": [6.0],
        "vllm_request_prompt_tokens": [3],
        "vllm_request_generation_tokens": [3],
        "vllm_request_queue_time_seconds": [1.0],
        "vllm_request_prefill_time_seconds": [2.0],
        "vllm_request_decode_time_seconds": [3.0],
        "vllm_request_inference_time_seconds": [5.0],
    }
    assert set(tally.observed) | set(tally.amounts) <= set(METRICS)
    assert not backend.take().amounts, "what was taken is not taken again"


def test_outputs_that_end_otherwise() -> None:
    left = serve(Scripted([12.0, 13.0, 14.0]), leave_after=2).take()
    assert (left.finished, left.amounts["vllm_generation_tokens_total"]) == ({"abort": 1}, 2)
    assert "vllm_e2e_request_latency_seconds" not in left.observed
    assert serve(Scripted([12.0], error=GenerationError("x"))).take().finished == {"error": 1}
    refused = serve(Scripted([], error=OverloadedError("full"))).take()
    assert (refused.finished, refused.amounts) == ({}, {})
