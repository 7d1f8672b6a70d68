"""When an output ends, and which of its text may be shown already.

Meanings are vLLM's: the token that ends an output is part of `token_ids`, its text is not part of the text; a stop
string and what follows it are cut from the text. No stop counts within the first `min_tokens` tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deepseek_ray.engine.detokenizer import Detokenizer
from deepseek_ray.messages import SamplingParams


@dataclass(frozen=True)
class Finish:
    reason: str
    """As in `TokenEvent`."""
    stop_reason: int | str | None = None
    """The stop token id or stop string; None for end-of-sequence and for "length"."""


class StopStrings:
    """Finds stop strings in text that arrives in pieces; the result does not depend on how it is cut into pieces.

    The string that is complete first wins, the longest of those that end together. Text that may still turn out to be
    the beginning of a stop string is held back.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = sorted(strings, key=len, reverse=True)
        self._held = ""

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """Text that became final, and the stop string that is complete now. Unarmed, complete ones are plain text."""
        buffer = self._held + text
        if armed and (found := self._first_match(buffer)):
            end, matched = found
            self._held = ""
            return buffer[: end - len(matched)], matched
        held = self._num_held(buffer)
        self._held = buffer[len(buffer) - held :]
        return buffer[: len(buffer) - held], None

    def flush(self) -> str:
        """What was held back, when the output has ended without it becoming a stop string."""
        text, self._held = self._held, ""
        return text

    def _first_match(self, buffer: str) -> tuple[int, str] | None:
        matches = []
        for string in self._strings:
            # A match has to end in new text: what is held was looked at before.
            start = buffer.find(string, max(0, len(self._held) - len(string) + 1))
            if start >= 0:
                matches.append((start + len(string), string))
        return min(matches, key=lambda match: match[0], default=None)  # of equal ends the first, which is the longest

    def _num_held(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that begins a stop string."""
        longest = len(self._strings[0]) - 1 if self._strings else 0
        for length in range(min(longest, len(buffer)), 0, -1):
            end = buffer[-length:]
            if any(len(string) > length and string.startswith(end) for string in self._strings):
                return length
        return 0


class OutputState:
    """Text and end of one output, fed token by token.

    `detokenizer` None (a model without a tokenizer) gives no text, and so no stop strings.
    """

    def __init__(
        self,
        params: SamplingParams,
        eos_token_ids: Iterable[int],
        max_output_tokens: int,
        detokenizer: Detokenizer | None,
    ) -> None:
        self._eos_token_ids = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._stop_token_ids = frozenset(params.stop_token_ids or ())
        self._min_tokens = params.min_tokens
        self._max_output_tokens = max_output_tokens
        self._detokenizer = detokenizer
        self._stop_strings = StopStrings(params.stop_strings)
        self._num_tokens = 0

    @property
    def ending_token_ids(self) -> frozenset[int]:
        """Ids that end the output."""
        return self._eos_token_ids | self._stop_token_ids

    @property
    def forbidden_token_ids(self) -> frozenset[int]:
        """Ids that must not be chosen next: those that end the output, while it is shorter than `min_tokens`."""
        return self.ending_token_ids if self._num_tokens < self._min_tokens else frozenset()

    def push(self, token_id: int, complete: bool = False) -> tuple[str, Finish | None]:
        """Take the next token: text that became final, and how the output ended if it did.

        `complete`: the output's structure lets nothing follow this token, which ends it whatever its length.
        """
        self._num_tokens += 1
        armed = self._num_tokens > self._min_tokens
        ending = self._finish_by_token(token_id, armed)
        finish = ending or self._finish_otherwise(complete)
        text = self._new_text(None if ending else token_id, finish is not None)
        shown, matched = self._stop_strings.push(text, armed)
        if matched is not None:
            return shown, Finish("stop", matched)
        return (shown + self._stop_strings.flush() if finish else shown), finish

    def _finish_by_token(self, token_id: int, armed: bool) -> Finish | None:
        if armed and token_id in self._eos_token_ids:
            return Finish("stop")
        if armed and token_id in self._stop_token_ids:
            return Finish("stop", token_id)
        return None

    def _finish_otherwise(self, complete: bool) -> Finish | None:
        if complete:
            return Finish("stop")
        return Finish("length") if self._num_tokens >= self._max_output_tokens else None

    def _new_text(self, token_id: int | None, last: bool) -> str:
        """Text of the next token; None is one that ends the output and is no part of its text."""
        if self._detokenizer is None:
            return ""
        text = "" if token_id is None else self._detokenizer.push([token_id])
        return text + self._detokenizer.flush() if last else text
