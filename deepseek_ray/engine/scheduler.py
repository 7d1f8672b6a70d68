"""Which sequences run in the next step, and how many tokens of each. Pure decisions: no torch, no clock, no I/O.

The policy of vLLM's V1 scheduler (vllm/v1/core/sched/scheduler.py): running sequences first, in the order they came,
then waiting ones, until the step's token budget is spent. When blocks run out, the sequence that came last is
preempted: its blocks are freed and it is computed again later, from its tokens. Who is admitted takes over what full
blocks of its beginning the prefix cache has.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from deepseek_ray.engine.kv_blocks import KVBlocks, blocks_for
from deepseek_ray.engine.prefix_cache import NamedBlock
from deepseek_ray.engine.sequence import Sequence, SequenceStatus
from deepseek_ray.errors import RequestError


@dataclass(frozen=True)
class ScheduledSequence:
    """Compute tokens `start` to `start + num_tokens` of `sequence` and drafts after them; its block table has room."""

    sequence: Sequence
    start: int
    num_tokens: int
    scored: range = range(0)
    """Places in the sequence whose logits say how likely the prompt's next token was; empty unless asked for."""
    num_found: int = 0
    """Tokens before `start` that the prefix cache had, when the sequence is admitted with this step."""
    draft_token_ids: tuple[int, ...] = ()
    """Drafts of what comes after the sequence's last token; empty unless the step computes that one."""

    @property
    def num_rows(self) -> int:
        """Tokens to compute, drafts too."""
        return self.num_tokens + len(self.draft_token_ids)

    @property
    def samples(self) -> bool:
        """True when the step computes the last token, so that the next one can be chosen."""
        return self.start + self.num_tokens == self.sequence.num_tokens

    @property
    def num_logits(self) -> int:
        """Rows of the step's logits: of `scored`, then, if it samples, of its last token and its drafts."""
        return len(self.scored) + (1 + len(self.draft_token_ids) if self.samples else 0)


@dataclass
class ScheduledStep:
    items: list[ScheduledSequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(item.num_rows for item in self.items)

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a new token from this step, in row order of the step's logits."""
        return [item.sequence for item in self.items if item.samples]


class Scheduler:
    """First come, first served, within `max_num_seqs` running sequences and `max_num_batched_tokens` per step."""

    def __init__(
        self, blocks: KVBlocks, max_num_seqs: int, max_num_batched_tokens: int, prefix_caching: bool = True
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.prefix_caching = prefix_caching
        self.num_preemptions = 0
        self.num_prefix_cache_queries = 0
        """Tokens of sequences that were looked up, without preempted ones that come again."""
        self.num_prefix_cache_hits = 0
        """Of these, the ones that were found."""

    @property
    def has_sequences(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence, max_num_tokens: int) -> None:
        """Queue a sequence that will grow to at most `max_num_tokens`; RequestError when that can never fit.

        One that ran elsewhere goes before those that never ran: somebody is in the middle of reading it.
        This is what makes every sequence finish: the oldest one can always take the blocks of all others.
        """
        needed = blocks_for(max_num_tokens - 1, self.blocks.block_size)  # the last token is never fed back
        if needed > self.blocks.num_blocks:
            raise RequestError(
                f"the request may grow to {max_num_tokens} tokens, which takes {needed} cache blocks; there are "
                f"{self.blocks.num_blocks}; lower max_tokens, shorten the prompt or raise kv_cache_bytes",
                param="max_tokens",
            )
        sequence.max_num_tokens = max_num_tokens
        new = (place for place, other in enumerate(self.waiting) if not other.has_begun)
        self.waiting.insert(next(new, len(self.waiting)) if sequence.has_begun else len(self.waiting), sequence)

    def schedule(self) -> ScheduledStep:
        """Decide the next step. Nothing counts as computed until `advance(step)`: a failed step can be tried again."""
        step = ScheduledStep()
        budget = self._schedule_running(step)
        if not step.preempted:  # what was freed is for those that run; admitting now would preempt again
            budget = self._schedule_waiting(step, budget)
        self._add_drafts(step, budget)
        return step

    def advance(self, step: ScheduledStep) -> list[NamedBlock]:
        """Record that the step's tokens are computed, from where on others may find the blocks they fill.

        Returns the full blocks that sequences have got with this step, computed or found.
        """
        full_blocks = []
        for item in step.items:
            item.sequence.num_computed_tokens = item.start + item.num_tokens
            item.sequence.draft_token_ids = []
            item.sequence.num_scored_tokens = max(item.sequence.num_scored_tokens, item.scored.stop)
            if self.prefix_caching:
                full_blocks += self._name_blocks(item)
        return full_blocks

    def accept(self, sequence: Sequence) -> list[NamedBlock]:
        """A draft was right: its token has been appended, and what the step computed for it counts.

        Returns the block that it fills, if it does.
        """
        sequence.num_computed_tokens += 1
        index, rest = divmod(sequence.num_computed_tokens, self.blocks.block_size)
        if rest or not self.prefix_caching:
            return []
        name = sequence.block_keys.name(index - 1, sequence.block_table[index - 1], self.blocks.block_size)
        self.blocks.prefixes.add(name)
        return [name]

    def full_blocks(self) -> list[NamedBlock]:
        """Every full block of the running sequences, each once."""
        size = self.blocks.block_size
        names = (
            sequence.block_keys.name(index, sequence.block_table[index], size)
            for sequence in self.running
            for index in range(sequence.num_computed_tokens // size)
        )
        return list({name.key: name for name in names}.values())

    def finish(self, sequence: Sequence) -> None:
        """Take a running or waiting sequence out and free its blocks."""
        (self.running if sequence.status is SequenceStatus.RUNNING else self.waiting).remove(sequence)
        self.blocks.release(sequence.block_table)
        sequence.status = SequenceStatus.FINISHED

    def forget(self, sequence: Sequence) -> None:
        """Nobody else shall use what was computed for this running sequence: its values are wrong."""
        self.blocks.forget(sequence.block_table)

    def _name_blocks(self, item: ScheduledSequence) -> list[NamedBlock]:
        """The full blocks that a computed item has brought its sequence; the computed ones are found from now on."""
        sequence, size = item.sequence, self.blocks.block_size
        names = [
            sequence.block_keys.name(index, sequence.block_table[index], size)
            for index in range((item.start - item.num_found) // size, sequence.num_computed_tokens // size)
        ]
        for name in names[item.num_found // size :]:
            self.blocks.prefixes.add(name)
        return names

    def _schedule_running(self, step: ScheduledStep) -> int:
        """Schedule running sequences, preempting from the end where blocks are short; return the budget left."""
        budget = self.max_num_batched_tokens
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            if not self._grow_or_preempt(sequence, sequence.num_computed_tokens + num_tokens, step):
                break  # it was the last one and preempted itself
            step.items.append(self._scheduled(sequence, num_tokens))
            budget -= num_tokens
            index += 1
        return budget

    def _add_drafts(self, step: ScheduledStep, budget: int) -> None:
        """Give what is left of the budget to drafts: they take no sequence's turn."""
        for place, item in enumerate(step.items):
            if budget > 0 and item.samples:
                step.items[place] = self._with_drafts(item, budget)
                budget -= len(step.items[place].draft_token_ids)

    def _with_drafts(self, item: ScheduledSequence, budget: int) -> ScheduledSequence:
        """With as many of the sequence's drafts as budget, context and free blocks allow; nobody is preempted."""
        sequence = item.sequence
        room = min(budget, sequence.max_num_tokens - sequence.num_tokens - 1)
        drafts = tuple(sequence.draft_token_ids[: max(0, room)])
        if not drafts:
            return item
        num_tokens = sequence.num_tokens + len(drafts)
        missing = blocks_for(num_tokens, self.blocks.block_size) - len(sequence.block_table)
        if self.blocks.num_free < missing + len(self.running):
            return item
        self.blocks.try_grow(sequence.block_table, num_tokens)
        return self._scheduled(sequence, item.num_tokens, item.num_found, drafts)

    def _grow_or_preempt(self, sequence: Sequence, num_tokens: int, step: ScheduledStep) -> bool:
        while not self.blocks.try_grow(sequence.block_table, num_tokens):
            victim = self.running.pop()
            self._preempt(victim)
            step.preempted.append(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.num_computed_tokens = 0
        sequence.status = SequenceStatus.WAITING
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _schedule_waiting(self, step: ScheduledStep, budget: int) -> int:
        """Admit in order of arrival, each with blocks for all its tokens, so that no prompt is preempted half-way.

        Returns the budget left.
        """
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            found = self._find(sequence)
            if not self.blocks.try_grow(sequence.block_table, sequence.num_tokens, found):
                break
            self.waiting.popleft()
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            num_found = self._take_found(sequence, found)
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            step.items.append(self._scheduled(sequence, num_tokens, num_found))
            budget -= num_tokens
        return budget

    def _find(self, sequence: Sequence) -> list[int]:
        """Blocks of its beginning that the prefix cache has. The last token is computed: its logits are wanted."""
        if not self.prefix_caching or sequence.wants_prompt_logits:
            return []
        size = self.blocks.block_size
        return self.blocks.prefixes.find(sequence.block_keys.first((sequence.num_tokens - 1) // size, size))

    def _take_found(self, sequence: Sequence, found: list[int]) -> int:
        """Count what was found as computed; how many tokens it is."""
        num_found = len(found) * self.blocks.block_size
        sequence.num_computed_tokens = num_found
        if sequence.num_cached_tokens is None:  # else it was preempted
            sequence.num_cached_tokens = num_found
            if self.prefix_caching and not sequence.wants_prompt_logits:
                self.num_prefix_cache_queries += sequence.num_tokens
                self.num_prefix_cache_hits += num_found
        return num_found

    def _scheduled(
        self, sequence: Sequence, num_tokens: int, num_found: int = 0, drafts: tuple[int, ...] = ()
    ) -> ScheduledSequence:
        start = sequence.num_computed_tokens
        size = self.blocks.block_size
        for block in sequence.block_table[start // size : blocks_for(start + num_tokens + len(drafts), size)]:
            self.blocks.check_writable(block)
        # The logits of the prompt's last token are the first output's.
        last = min(start + num_tokens, sequence.num_prompt_tokens - 1)
        scored = range(max(start, sequence.num_scored_tokens), last)
        return ScheduledSequence(sequence, start, num_tokens, scored, num_found, drafts)
