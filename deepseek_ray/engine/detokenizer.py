"""Token ids to text while they arrive: whole characters only, at a cost per token that never grows."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepseek_ray.engine.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_HELD_TOKENS = 16
"""A character has at most 4 bytes, so a longer run of undecodable tokens is not the start of one: let it go."""


class Detokenizer:
    """Streams one output. The pushes and the flush, concatenated, are `decode(all ids)`.

    Byte-level tokenizers (all DeepSeek models): the tokens' bytes run through an incremental UTF-8 decoder, which is
    exact whatever the ids. Others: a short window of ids is decoded with and without the new ones, which holds for
    decoders that look back at most `_MAX_HELD_TOKENS` tokens; there `prompt_ids_tail` (the last few prompt ids) tells
    whether the first token starts a word or goes on with one, and the text is what the output adds to the prompt.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids_tail: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._stream: _ByteStream | _WindowStream
        if tokenizer.is_byte_level:
            self._stream = _ByteStream(tokenizer, skip_special_tokens)
        else:
            self._stream = _WindowStream(tokenizer, prompt_ids_tail, skip_special_tokens)

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that became final with these tokens; empty while a character is incomplete."""
        return self._stream.push(token_ids)

    def flush(self) -> str:
        """The rest at the end of the output: U+FFFD for a character that never became whole, else empty."""
        return self._stream.flush()


class _ByteStream:
    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        token_bytes = self._tokenizer.token_bytes
        return self._decoder.decode(b"".join(token_bytes(t) for t in token_ids if t not in self._skipped))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    def __init__(self, tokenizer: Tokenizer, prompt_ids_tail: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context = list(prompt_ids_tail)[-_MAX_HELD_TOKENS:]
        self._held: list[int] = []

    def push(self, token_ids: Iterable[int]) -> str:
        return "".join(self._push_one(token_id) for token_id in token_ids)

    def _push_one(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._new_text()
        if text.endswith(_REPLACEMENT) and len(self._held) < _MAX_HELD_TOKENS:
            return ""
        # The context keeps ids that gave text, so that skipped and empty ones do not push it out of the window.
        self._context = (self._context + self._held)[-_MAX_HELD_TOKENS:] if text else self._context
        self._held = []
        return text

    def flush(self) -> str:
        text = self._new_text()
        self._context, self._held = [], []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context, self._skip)
        return self._tokenizer.decode(self._context + self._held, self._skip)[len(before) :]
