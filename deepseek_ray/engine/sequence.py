"""One request as the scheduler sees it: tokens, how many of them are computed, and where their latents are."""

from __future__ import annotations

from enum import Enum

from deepseek_ray.engine.prefix_cache import BlockKeys
from deepseek_ray.messages import GenerateRequest


class SequenceStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Prompt and output of one request.

    There is no prefill and no decode: each step computes some of the tokens that are not computed yet, and when none
    is left the logits of the last one give the next token. A retried request brings the output its client already has;
    those tokens are computed like a prompt, but count as output.
    """

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_computed_tokens = 0
        # A retry that brings output has told the client about its prompt already.
        wants_scores = request.prompt_logprobs is not None and not request.output_token_ids
        self.num_scored_tokens = 0 if wants_scores else self.num_prompt_tokens
        """Prompt tokens before this place need no logits: those after them were reported, or never asked for."""
        self.block_table: list[int] = []
        self.block_keys = BlockKeys(self.token_ids, request.cache_salt)
        self.num_cached_tokens: int | None = None
        """Tokens that were found in the prefix cache when it first ran; None before."""
        self.status = SequenceStatus.WAITING
        self.max_num_tokens = 0
        """Of prompt and output together, the most it can come to; known once it is queued."""
        self.draft_token_ids: list[int] = []
        """Drafts of what comes after its tokens, for the next step."""
        self.may_draft = True
        """False once a draft has crashed the experts that computed it."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def has_begun(self) -> bool:
        """Whether it ran, here or where it comes from."""
        return self.num_cached_tokens is not None or self.num_output_tokens > 0

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def wants_prompt_logits(self) -> bool:
        """True while the prompt has tokens whose logits are asked for: they have to be computed."""
        return self.num_scored_tokens < self.num_prompt_tokens - 1

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def append(self, token_id: int) -> None:
        """Add a generated token. Everything before it must be computed."""
        assert self.num_uncomputed_tokens == 0, f"{self.num_uncomputed_tokens} tokens before it are not computed"
        self.token_ids.append(token_id)
