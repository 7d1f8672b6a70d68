"""What an engine says about itself. Apart from the engine, so that who only reads it needs no torch."""

from __future__ import annotations

import msgspec


class EngineStats(msgspec.Struct, kw_only=True, frozen=True):
    """A moment's numbers; those from `num_preemptions` on count since the engine was made."""

    num_running: int
    num_waiting: int
    num_kv_blocks_used: int
    num_kv_blocks_total: int
    num_preemptions: int
    num_prompt_tokens: int
    """Prompt tokens of accepted requests."""
    num_generated_tokens: int
    num_prefix_cache_queries: int
    """Tokens of sequences that were looked up in the prefix cache: prompts, and output that a retry brings."""
    num_prefix_cache_hits: int
    """Of these, the ones that were found and not computed."""
    num_draft_tokens: int
    """Drafts that were computed with a sequence's last token."""
    num_accepted_tokens: int
    """Of these, the ones that were right."""
