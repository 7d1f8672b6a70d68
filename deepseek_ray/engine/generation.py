"""One request on its way through an engine: a sequence, how its tokens are chosen, and the events it gives."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deepseek_ray.engine.grammar import GrammarState
from deepseek_ray.engine.sampler import check_finite, choose_token, describe_choice, is_plain
from deepseek_ray.engine.sequence import Sequence
from deepseek_ray.engine.stop import Finish, OutputState
from deepseek_ray.kernels.base import Place
from deepseek_ray.messages import GenerateRequest, RequestTiming, TokenEvent, TokenLogprob


class Timeline:
    """When a request arrived, was first computed, and got its first token, on the engine's clock."""

    def __init__(self, arrived: float) -> None:
        self.arrived = arrived
        self.scheduled: float | None = None
        self.first_token: float | None = None

    def schedule(self, now: float) -> None:
        """It is in the step that begins now."""
        if self.scheduled is None:
            self.scheduled = now

    def token(self, now: float) -> None:
        """It has a token now."""
        if self.first_token is None:
            self.first_token = now

    def finished(self, now: float) -> RequestTiming:
        """The whole of it, when it has its last token now."""
        assert self.first_token is not None
        scheduled = self.arrived if self.scheduled is None else self.scheduled
        return RequestTiming(
            queue_seconds=scheduled - self.arrived,
            prefill_seconds=self.first_token - scheduled,
            decode_seconds=now - self.first_token,
        )


class Generation:
    """Turns rows of logits into token events.

    `arrived` and `deadline` are times of the engine's clock, the latter None for no deadline; `grammar` is None for an
    output of any shape. After `replay` a resumed request stands where the interrupted one stood: text, stop strings,
    grammar and sampling position included.
    """

    def __init__(
        self,
        request: GenerateRequest,
        seed: int,
        output: OutputState,
        deadline: float | None,
        grammar: GrammarState | None = None,
        arrived: float = 0.0,
    ) -> None:
        self.request = request
        self.deadline = deadline
        self.sequence = Sequence(request)
        self._seed = seed
        self._output = output
        self._grammar = grammar
        self._prompt_logprobs: list[TokenLogprob] = []
        self.timeline = Timeline(arrived)

    def replay(self) -> Finish | None:
        """Feed the tokens that the client already has; how the output ended if it had ended with them."""
        for token_id in self.request.output_token_ids:
            _, finish = self._push(token_id)
            if finish:
                return finish
        return None

    def _push(self, token_id: int) -> tuple[str, Finish | None]:
        """`OutputState.push`, with the grammar taking the token too. RequestError if it cannot."""
        complete = self._grammar is not None and self._grammar.accept(token_id)
        return self._output.push(token_id, complete)

    def score(self, logits: NDArray[np.float32]) -> None:
        """Note how likely the prompt's next tokens were. `logits` [places, vocab_size]. Raises as `take` does."""
        prompt = self.request.prompt_token_ids
        for row in logits:
            place = 1 + len(self._prompt_logprobs)
            check_finite(row, place)
            self._prompt_logprobs.append(describe_choice(row, prompt[place], self.request.prompt_logprobs or 0))

    def place(self, ahead: int) -> Place | None:
        """What decides the token `ahead` places after the next one; None if more than the temperature does."""
        params = self.request.params
        if self._grammar is not None or self._output.forbidden_token_ids or not is_plain(params):
            return None
        return Place(params.temperature, self._seed, self.sequence.num_output_tokens + ahead)

    def take(self, logits: NDArray[np.float32], now: float = 0.0, drawn: int = -1) -> TokenEvent:
        """Choose the next token from `logits` [vocab_size], unless it was `drawn`; `now` is a time of the engine's
        clock.

        GenerationError when there is none to choose.
        """
        token_id = drawn if drawn >= 0 else self._choose(logits)
        params, sequence = self.request.params, self.sequence
        logprobs = None if params.logprobs is None else [describe_choice(logits, token_id, params.logprobs)]
        index = sequence.num_output_tokens
        text, finish = self._push(token_id)
        sequence.append(token_id)  # last: what failed above has added nothing
        self.timeline.token(now)
        return TokenEvent(
            request_id=self.request.request_id,
            attempt=self.request.attempt,
            index=index,
            token_ids=[token_id],
            text=text,
            logprobs=logprobs,
            prompt_logprobs=self._prompt_logprobs if index == 0 and self.request.prompt_logprobs is not None else None,
            num_cached_tokens=sequence.num_cached_tokens if index == 0 else None,
            finish_reason=finish.reason if finish else None,
            stop_reason=finish.stop_reason if finish else None,
            timing=self.timeline.finished(now) if finish else None,
        )

    def _choose(self, logits: NDArray[np.float32]) -> int:
        sequence, output = self.sequence, self._output
        forbidden = output.forbidden_token_ids
        allowed = None
        if self._grammar is not None:
            allowed = self._grammar.allowed(output.ending_token_ids, forbidden)
            forbidden = frozenset()  # the mask has left them out, where anything else remained
        tokens, num_prompt_tokens = sequence.token_ids, sequence.num_prompt_tokens
        return choose_token(logits, self.request.params, self._seed, tokens, num_prompt_tokens, forbidden, allowed)

    def end(self, finish: Finish, error: Exception | None = None) -> TokenEvent:
        """The last event of an output that ends without a new token."""
        return TokenEvent(
            request_id=self.request.request_id,
            attempt=self.request.attempt,
            index=self.sequence.num_output_tokens,
            finish_reason=finish.reason,
            stop_reason=finish.stop_reason,
            error=None if error is None else str(error),
            error_kind=None if error is None else type(error).__name__,
        )
