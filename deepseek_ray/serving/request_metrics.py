"""What clients get to feel, counted where they are served: tokens, outputs that ended, and how long each part took.

Intervals lie between two moments of this process. The engine's own part of a request comes as durations, measured
there. Plain numbers: `actors/metrics_export.py` hands them over once a second.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from deepseek_ray.errors import OverloadedError, RequestError
from deepseek_ray.messages import GenerateRequest, RequestTiming, TokenEvent
from deepseek_ray.serving.backend import Backend


class RequestTally:
    """Of one model, since it was last taken."""

    def __init__(self) -> None:
        self.amounts: Counter[str] = Counter()
        """Counter -> how much it rose."""
        self.finished: Counter[str] = Counter()
        """Reason -> outputs that ended for it."""
        self.observed: defaultdict[str, list[float]] = defaultdict(list)
        """Histogram -> values."""


class MeasuredBackend:
    """A backend whose requests are counted. Belongs to one event loop."""

    def __init__(self, backend: Backend, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend = backend
        self._clock = clock
        self._tally = RequestTally()

    def take(self) -> RequestTally:
        """What happened since the last call."""
        tally, self._tally = self._tally, RequestTally()
        return tally

    async def ready(self) -> bool:
        return await self._backend.ready()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        watch = _Stopwatch(self._clock())
        reason: str | None = "abort"  # unless something else is seen: the reader is gone
        try:
            async with aclosing(self._backend.generate(request)) as events:
                async for event in events:
                    if event.token_ids:
                        self._count(request, event, watch)
                    if event.finish_reason is not None:
                        reason, watch.timing = event.finish_reason, event.timing
                    yield event
        except (RequestError, OverloadedError):
            reason = "error" if watch.num_tokens else None  # refused: it never ran
            raise
        except Exception:
            reason = "error"
            raise
        finally:
            if reason is not None:
                self._finish(request, watch, reason)

    def _count(self, request: GenerateRequest, event: TokenEvent, watch: _Stopwatch) -> None:
        now, tally = self._clock(), self._tally
        if watch.num_tokens:
            tally.observed["vllm_inter_token_latency_seconds"].append(now - watch.last)
        else:
            watch.first = now
            tally.observed["vllm_time_to_first_token_seconds"].append(now - watch.started)
            tally.amounts["vllm_prompt_tokens_total"] += len(request.prompt_token_ids)
        watch.last = now
        watch.num_tokens += len(event.token_ids)
        tally.amounts["vllm_generation_tokens_total"] += len(event.token_ids)

    def _finish(self, request: GenerateRequest, watch: _Stopwatch, reason: str) -> None:
        self._tally.finished[reason] += 1
        if reason not in ("stop", "length"):
            return
        observed = self._tally.observed
        observed["vllm_request_prompt_tokens"].append(len(request.prompt_token_ids))
        observed["vllm_request_generation_tokens"].append(watch.num_tokens)
        if watch.num_tokens:
            observed["vllm_e2e_request_latency_seconds"].append(watch.last - watch.started)
        if watch.num_tokens > 1:
            per_token = (watch.last - watch.first) / (watch.num_tokens - 1)
            observed["vllm_request_time_per_output_token_seconds"].append(per_token)
        if (timing := watch.timing) is not None:
            observed["vllm_request_queue_time_seconds"].append(timing.queue_seconds)
            observed["vllm_request_prefill_time_seconds"].append(timing.prefill_seconds)
            observed["vllm_request_decode_time_seconds"].append(timing.decode_seconds)
            observed["vllm_request_inference_time_seconds"].append(timing.prefill_seconds + timing.decode_seconds)


class _Stopwatch:
    """One request's moments. `first` and `last` are those of its tokens."""

    def __init__(self, started: float) -> None:
        self.started = self.first = self.last = started
        self.num_tokens = 0
        self.timing: RequestTiming | None = None
