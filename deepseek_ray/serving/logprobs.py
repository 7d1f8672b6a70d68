"""Log-probabilities in the two shapes of the OpenAI API."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from deepseek_ray.engine.tokenizer import Detokenizer, Tokenizer
from deepseek_ray.messages import TokenLogprob
from deepseek_ray.serving.replies import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob

_LOWEST = -9999.0
"""OpenAI's value for "very unlikely"; JSON has no minus infinity."""


def chat_logprobs(entries: Sequence[TokenLogprob], tokenizer: Tokenizer) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                token_name(tokenizer, entry.token_id),
                _finite(entry.logprob),
                list(tokenizer.token_bytes(entry.token_id)),
                [
                    TopLogprob(token_name(tokenizer, token_id), _finite(value), list(tokenizer.token_bytes(token_id)))
                    for token_id, value in entry.top
                ],
            )
            for entry in entries
        ]
    )


class CompletionLogprobWriter:
    """Writes the entries of one choice, piece by piece, and keeps the place of each token in the choice's text."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), text_offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._offset = text_offset

    def write(self, entries: Iterable[TokenLogprob]) -> CompletionLogprobs:
        reply = CompletionLogprobs([], [], [], [])
        for entry in entries:
            reply.tokens.append(token_name(self._tokenizer, entry.token_id))
            reply.token_logprobs.append(_finite(entry.logprob))
            reply.top_logprobs.append(self._top(entry))
            reply.text_offset.append(self._offset)
            self._offset += len(self._detokenizer.push([entry.token_id]))
        return reply

    def write_prompt(self, first_token_id: int, entries: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """An echoed prompt: `entries` are those of its second token on; the first is given, not predicted.

        Its log-probability is written as 0 (certain): OpenAI's own type has no null among `token_logprobs`.
        """
        reply = self.write([TokenLogprob(first_token_id, 0.0), *entries])
        reply.top_logprobs[0] = {}
        return reply

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The most likely tokens and the chosen one, which need not be among them."""
        top = {token_name(self._tokenizer, token_id): _finite(value) for token_id, value in entry.top}
        top.setdefault(token_name(self._tokenizer, entry.token_id), _finite(entry.logprob))
        return top


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; `bytes:\\xe2\\x80` for part of a character, as OpenAI writes it, and its id when it has none."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode() or f"token_id:{token_id}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
