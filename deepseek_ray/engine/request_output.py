"""What offline generation returns, gathered from token events. Names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field

from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.messages import TokenEvent, TokenLogprob


@dataclass(frozen=True)
class Logprob:
    logprob: float
    rank: int
    """1 for the most likely token of its place."""
    decoded_token: str | None
    """The token's own text; None when the model has no tokenizer."""


@dataclass
class CompletionOutput:
    """One generated sequence."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    """For each token of the output: the most likely ones and the chosen one. None when not asked for."""
    finish_reason: str | None = None
    """"stop", "length" or "error"."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for end-of-sequence."""
    error: str | None = None
    """Why, with finish_reason "error"."""

    def add(self, event: TokenEvent, tokenizer: Tokenizer | None) -> None:
        """Append an event. Events come in order and without repetition."""
        assert event.index == len(self.token_ids), f"event {event.index} after {len(self.token_ids)} tokens"
        self.token_ids += event.token_ids
        self.text += event.text
        if event.logprobs is not None:
            self.logprobs = (self.logprobs or []) + [_describe(entry, tokenizer) for entry in event.logprobs]
        self.finish_reason, self.stop_reason, self.error = event.finish_reason, event.stop_reason, event.error


@dataclass
class RequestOutput:
    """A prompt and its `SamplingParams.n` outputs."""

    request_id: str
    prompt: str | None
    """None when the prompt was given as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)


def _describe(entry: TokenLogprob, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    def logprob(token_id: int, value: float, rank: int) -> Logprob:
        return Logprob(value, rank, tokenizer.token_text(token_id) if tokenizer else None)

    described = {token_id: logprob(token_id, value, rank) for rank, (token_id, value) in enumerate(entry.top, start=1)}
    described.setdefault(entry.token_id, logprob(entry.token_id, entry.logprob, entry.rank))
    return described
