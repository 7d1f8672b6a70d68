"""Drafts of the next tokens, which the next step computes beside each sequence's last token.

A draft that turns out to be the token that is chosen anyway - by the request's own parameters, seed and grammar, from
logits that have the bits they always have - saves a step; one that does not is forgotten. So the output is that of an
engine that drafts nothing, sampled or greedy, and nothing is accepted "in distribution" only (Leviathan et al. 2023,
arXiv:2211.17192, needs that because its draft model samples).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from weakref import WeakKeyDictionary

from deepseek_ray.config.engine import EngineConfig
from deepseek_ray.engine.runner import DraftingRunner
from deepseek_ray.engine.scheduler import ScheduledStep
from deepseek_ray.engine.sequence import Sequence, SequenceStatus
from deepseek_ray.errors import ConfigError, ExpertsCrashedError
from deepseek_ray.models.checkpoint import CheckpointReader

logger = logging.getLogger(__name__)

_LONGEST_MATCH, _SHORTEST_MATCH = 4, 2
"""Last tokens that must have come before in the same order for what followed them to be a draft."""


def served_moe_layers(config: EngineConfig, reader: CheckpointReader) -> tuple[int, ...]:
    """Layers whose routed experts an engine asks for: the decoder's, and that of the multi-token-prediction layer if
    it drafts. ConfigError when the checkpoint has none."""
    layers = reader.config.moe_layers
    if not config.uses_mtp:
        return layers
    if not reader.has_mtp:
        raise ConfigError(
            f"engine.speculative.method is mtp and {reader.directory} holds no multi-token-prediction layer "
            f"(num_nextn_predict_layers is {reader.config.num_nextn_predict_layers}); take method ngram, or a "
            "checkpoint that was trained with one"
        )
    return (*layers, reader.config.num_hidden_layers)


class Speculator(ABC):
    """Sets `draft_token_ids` of the sequences of a step that is over."""

    @abstractmethod
    def draft(self, step: ScheduledStep) -> None:
        """Before the next step is scheduled. Whatever the decoder raises travels to the caller, who may call again."""


def can_draft(sequence: Sequence) -> bool:
    """Whether the next step computes the last token of a sequence, so that drafts of what follows are of use."""
    return sequence.status is SequenceStatus.RUNNING and sequence.num_uncomputed_tokens == 1 and sequence.may_draft


class NgramSpeculator(Speculator):
    """What followed the last tokens when they stood in prompt or output before ("prompt lookup")."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._seen: WeakKeyDictionary[Sequence, NgramIndex] = WeakKeyDictionary()

    def draft(self, step: ScheduledStep) -> None:
        for item in step.items:
            if can_draft(item.sequence):
                index = self._seen.setdefault(item.sequence, NgramIndex(item.sequence.token_ids))
                item.sequence.draft_token_ids = index.after_the_last(self._num_tokens)


class NgramIndex:
    """Where each run of a few tokens last ended in a list that only grows."""

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def after_the_last(self, count: int) -> list[int]:
        """At most `count` tokens that followed the last tokens before, the longest match and of those the latest."""
        tokens = self._token_ids
        while self._num_indexed < len(tokens) - 1:  # the last tokens themselves come in when something follows them
            self._num_indexed += 1
            for length in range(_SHORTEST_MATCH, min(_LONGEST_MATCH, self._num_indexed) + 1):
                self._ends[tuple(tokens[self._num_indexed - length : self._num_indexed])] = self._num_indexed
        for length in range(min(_LONGEST_MATCH, len(tokens)), _SHORTEST_MATCH - 1, -1):
            end = self._ends.get(tuple(tokens[-length:]))
            if end is not None:
                return tokens[end : end + count]
        return []


class MtpSpeculator(Speculator):
    """The checkpoint's multi-token-prediction layer (DeepSeek-V3, arXiv 2412.19437, section 2.2), over what the last
    layer gave in the step.

    It has latents of its own for every token, in the same cache blocks. Those of a token depend on the next one, so the
    last of a block that the prefix cache shares may be another sequence's: a draft may be worse for it, the output not.
    """

    def __init__(self, runner: DraftingRunner) -> None:
        self._runner = runner

    def draft(self, step: ScheduledStep) -> None:
        rows: list[int] = []
        next_ids: list[int] = []
        logit_rows: list[int] = []
        owners: list[Sequence] = []
        first = 0
        for item in step.items:
            sequence = item.sequence
            if sequence.status is SequenceStatus.RUNNING:
                end = sequence.num_computed_tokens
                rows += range(first, first + end - item.start)
                next_ids += sequence.token_ids[item.start + 1 : end + 1]
                if can_draft(sequence):
                    logit_rows.append(len(rows) - 1)
                    owners.append(sequence)
            first += item.num_rows
        if not rows:
            return
        try:
            drafts = self._runner.draft(rows, next_ids, logit_rows)
        except ExpertsCrashedError as error:
            logger.error("no drafts for the sequences of this step any more: %s", error)
            for sequence in owners:
                sequence.may_draft = False
            return
        for sequence, draft in zip(owners, drafts, strict=True):
            sequence.draft_token_ids = [draft]
