"""What an engine says about itself. Apart from the engine, so that who only reads it needs no torch."""

from __future__ import annotations

import msgspec


class EngineStats(msgspec.Struct, kw_only=True, frozen=True):
    """A moment's numbers; the last three count since the engine was made."""

    num_running: int
    num_waiting: int
    num_kv_blocks_used: int
    num_kv_blocks_total: int
    num_preemptions: int
    num_prompt_tokens: int
    """Prompt tokens of accepted requests."""
    num_generated_tokens: int
