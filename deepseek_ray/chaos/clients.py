"""Clients that send requests at times fixed beforehand, whatever they see, and write down what comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec

from deepseek_ray.actors.request_session import DeploymentClient
from deepseek_ray.chaos.history import Arrival, Call
from deepseek_ray.errors import DeepSeekRayError
from deepseek_ray.messages import GenerateRequest, SamplingParams, TokenEvent

LAST_WAIT_SECONDS = 10.0
"""How long after its deadline a call may still end before it counts as never ended."""


class Case(msgspec.Struct, frozen=True):
    """A request to send, again and again."""

    prompt_token_ids: list[int]
    params: SamplingParams
    """With `logprobs` 0: the log-probabilities are compared too."""


class Clients:
    """All calls of one run. Belongs to one event loop."""

    def __init__(
        self,
        client: DeploymentClient,
        cases: Sequence[Case],
        tag: str,
        deadline_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._cases = cases
        self._tag = tag
        self._deadline_seconds = deadline_seconds
        self._clock = clock
        self._tasks: list[asyncio.Task[None]] = []
        self.calls: list[Call] = []

    def send(self, delays: Sequence[float]) -> None:
        """One call per delay, sent that many seconds from now, cases in turn."""
        for delay in delays:
            case = len(self._tasks) % len(self._cases)
            name = f"{self._tag}-{len(self._tasks)}"
            self._tasks.append(asyncio.create_task(self._call(name, case, delay)))

    async def all_have(self, num_tokens: int) -> None:
        """Wait until every call sent so far has that many tokens, or is over."""
        while not all(call.ended or _num_tokens(call) >= num_tokens for call in self.calls) or not self.calls:
            self._raise_own_failures()
            await asyncio.sleep(0.005)

    async def finish(self) -> None:
        """Wait for the end of every call; one that does not end is given up after its deadline."""
        _, pending = await asyncio.wait(self._tasks, timeout=self._deadline_seconds + LAST_WAIT_SECONDS)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        self._raise_own_failures()

    def _raise_own_failures(self) -> None:
        """What is not an error of the deployment is a mistake of ours, and no result."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error

    async def _call(self, name: str, case: int, delay: float) -> None:
        await asyncio.sleep(delay)
        call = Call(name, case, sent=self._clock(), deadline=self._clock() + self._deadline_seconds)
        self.calls.append(call)
        request = GenerateRequest(
            request_id=name,
            prompt_token_ids=self._cases[case].prompt_token_ids,
            params=self._cases[case].params,
            deadline_seconds=self._deadline_seconds,
        )
        try:
            async for event in self._client.generate(request):
                self._write_down(call, event)
        except DeepSeekRayError as error:
            call.error = f"{type(error).__name__}: {error}"
        call.ended = self._clock()

    def _write_down(self, call: Call, event: TokenEvent) -> None:
        if event.token_ids:
            logprobs = [entry.logprob for entry in event.logprobs or ()]
            call.arrivals.append(Arrival(self._clock(), event.index, list(event.token_ids), logprobs))
        call.finish_reason = event.finish_reason
        call.error = event.error


def _num_tokens(call: Call) -> int:
    return sum(len(arrival.token_ids) for arrival in call.arrivals)
