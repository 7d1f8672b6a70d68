"""Server-sent events: how chunks are written, and which of them carry usage."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from deepseek_ray.messages import TokenEvent
from deepseek_ray.serving.job import Job
from deepseek_ray.serving.replies import Usage
from deepseek_ray.serving.schema import StreamOptions

DONE = b"data: [DONE]\n\n"
_LINE_BREAKS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))
"""Line ends to some readers of event streams (Python's `str.splitlines`), though not to the standard. They can only
stand inside JSON strings, where they may be escaped."""


def encode_event(chunk: msgspec.Struct) -> bytes:
    body = msgspec.json.encode(chunk)
    for raw, escaped in _LINE_BREAKS:
        body = body.replace(raw, escaped)
    return b"data: " + body + b"\n\n"


class StreamUsage:
    """Counts a stream's tokens and says what each chunk's `usage` is."""

    def __init__(self, job: Job, options: StreamOptions | None) -> None:
        self._job = job
        self._completion_tokens = self._cached_tokens = 0
        self.wanted = bool(options and options.include_usage)
        self._continuous = self.wanted and bool(options and options.continuous_usage_stats)

    def add(self, index: int, event: TokenEvent) -> None:
        """Choice `index` goes on."""
        self._completion_tokens += len(event.token_ids)
        if self._job.counts_prompt(index):
            self._cached_tokens += event.num_cached_tokens or 0

    @property
    def total(self) -> Usage:
        return self._job.usage(self._completion_tokens, self._cached_tokens)

    @property
    def of_chunk(self) -> Usage | UnsetType | None:
        """Null in every chunk but the last when usage was asked for, absent when not (OpenAI); so far (vLLM)."""
        if self._continuous:
            return self.total
        return None if self.wanted else UNSET
