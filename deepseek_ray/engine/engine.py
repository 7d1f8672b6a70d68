"""Continuous batching over one decoder: requests in, token events out, one step at a time.

Single-threaded: whoever owns an engine calls it from one thread. It knows nothing of Ray, HTTP or processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from deepseek_ray.config.engine import EngineConfig
from deepseek_ray.engine.block_copies import BlockCopies
from deepseek_ray.engine.generation import Generation
from deepseek_ray.engine.grammar import Grammars
from deepseek_ray.engine.kv_blocks import CachePlan, KVBlocks, plan_cache
from deepseek_ray.engine.requests import check_needs_no_tokenizer, check_request, max_output_tokens, sampling_seed
from deepseek_ray.engine.runner import Decoder, DecoderShape, DraftingDecoder, DraftingRunner, Runner
from deepseek_ray.engine.scheduler import ScheduledSequence, ScheduledStep, Scheduler
from deepseek_ray.engine.speculation import MtpSpeculator, NgramSpeculator, Speculator
from deepseek_ray.engine.stats import EngineStats
from deepseek_ray.engine.stop import Finish, OutputState
from deepseek_ray.engine.tokenizer import Detokenizer, Tokenizer
from deepseek_ray.errors import (
    DeadlineExceededError,
    ExpertsCrashedError,
    GenerationError,
    OverloadedError,
    RequestError,
)
from deepseek_ray.messages import GenerateRequest, TokenEvent
from deepseek_ray.nn.paged import LatentCache

logger = logging.getLogger(__name__)


def plan_engine_cache(config: EngineConfig, shape: DecoderShape, dtype: torch.dtype) -> CachePlan:
    """The cache an engine of this model will have. Needs no weights: call it before reading them to fail early."""
    num_layers = shape.num_hidden_layers + config.uses_mtp
    bytes_per_block = LatentCache.bytes_per_block(num_layers, config.block_size, shape.latent_width, dtype)
    return plan_cache(config, shape.max_position_embeddings, bytes_per_block)


class Engine:
    """Runs many requests at once over a paged latent cache.

    `tokenizer` None serves a model without one: outputs have no text, there are no stop strings, and the ids that end
    an output are config.json's.
    `clock` gives seconds; deadlines are measured with it.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        plan = plan_engine_cache(config, decoder.config, decoder.dtype)
        self.config = config
        self.vocab_size = decoder.config.vocab_size
        self.max_model_len = plan.max_model_len
        """Longest prompt + output in tokens; below the model's own when the cache holds less."""
        self._tokenizer = tokenizer
        self._eos_token_ids = tokenizer.eos_token_ids if tokenizer else _ids(decoder.config.eos_token_id)
        self.grammars = Grammars(tokenizer, self.vocab_size, self._eos_token_ids) if tokenizer else None
        """Constraints of structured outputs; other threads may compile there what requests will need."""
        self._clock = clock
        self._scheduler = Scheduler(
            KVBlocks(plan.num_blocks, config.block_size),
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.prefix_caching,
        )
        self._draw_rows = decoder.draw
        self._runner, self._speculator = _make_runner(decoder, config, plan)
        self._undrafted: ScheduledStep | None = None  # computed, and nothing was drafted after it yet
        self.copies = BlockCopies(self._scheduler.blocks, self._runner.cache, self._scheduler.full_blocks)
        """The way of full blocks out of this engine and into it."""
        self._generations: dict[str, Generation] = {}
        self._ended: list[TokenEvent] = []  # ends that did not come from a step; the next step returns them
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_draft_tokens = 0
        self._num_accepted_tokens = 0

    @property
    def has_work(self) -> bool:
        """True when `step` has something to do or to return."""
        return bool(self._generations or self._ended)

    @property
    def has_room(self) -> bool:
        """True when another request is accepted: it finds a free seat, or fewer than `max_waiting` wait for one."""
        return len(self._generations) < self.config.max_num_seqs + self.config.max_waiting

    @property
    def next_deadline(self) -> float | None:
        """The clock's time at which the first of the present requests runs out; None when none has a deadline."""
        deadlines = [g.deadline for g in self._generations.values() if g.deadline is not None]
        return min(deadlines, default=None)

    def add_request(self, request: GenerateRequest) -> None:
        """Queue a request; its tokens come out of later steps.

        RequestError: it can never be served as it is, or its id is taken. OverloadedError: too many wait already.
        A higher attempt of a request that still runs here takes its place.
        """
        check_request(request, self.vocab_size, self.max_model_len)
        if self._tokenizer is None:
            check_needs_no_tokenizer(request.params)
        current = self._generations.get(request.request_id)
        if current is not None and current.request.attempt >= request.attempt:
            raise RequestError(
                f"request id {request.request_id!r} is running here already (attempt {current.request.attempt}); "
                "choose another id",
                param="request_id",
            )
        if current is not None:
            self._remove(current)
        elif not self.has_room:
            raise OverloadedError(
                f"{len(self._generations)} requests run or wait here; the limit is {self.config.max_num_seqs} running "
                f"and {self.config.max_waiting} waiting; try again later, or raise max_num_seqs or max_waiting"
            )
        self._start(request)

    def abort(self, request_id: str) -> bool:
        """Stop a request and free its blocks now; the next step returns its "abort" event. False for an unknown id."""
        generation = self._generations.get(request_id)
        if generation is None:
            return False
        self._remove(generation)
        self._ended.append(generation.end(Finish("abort")))
        return True

    def step(self) -> list[TokenEvent]:
        """Compute one batch and return what it added: an event for each token, those of a request in order.

        When requests have ended without computing anything (aborts, deadlines), their events are returned at once and
        nothing is computed: they must not wait for a step that may take long. What goes wrong with one request ends
        that request. An exception of the decoder itself travels to the caller; the failed step is not counted, so
        calling again repeats it.
        """
        self.copies.new_blocks = []
        self._end_expired()
        if self._ended:
            events, self._ended = self._ended, []
            return events
        if self._speculator and self._undrafted:
            self._speculator.draft(self._undrafted)
            self._undrafted = None
        step = self._scheduler.schedule()
        if not step.items:
            return []
        started = self._clock()
        for item in step.items:
            self._generation(item).timeline.schedule(started)
        try:
            logits = self._runner.run(step)
        except ExpertsCrashedError as error:
            return self._end_crashed(step, error)
        self.copies.new_blocks = self._scheduler.advance(step)
        self._undrafted = step
        drawn = self._draw(step, logits)
        events = []
        row = 0
        for item in step.items:
            end = row + item.num_logits
            events += self._take(self._generation(item), item, logits[row:end], drawn[row:end])
            row = end
        return events

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_kv_blocks_used=scheduler.blocks.num_used,
            num_kv_blocks_total=scheduler.blocks.num_blocks,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_prefix_cache_queries=scheduler.num_prefix_cache_queries,
            num_prefix_cache_hits=scheduler.num_prefix_cache_hits,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
        )

    def _start(self, request: GenerateRequest) -> None:
        longest_output = max_output_tokens(request, self.max_model_len)
        tokenizer = self._tokenizer
        output = OutputState(
            request.params,
            self._eos_token_ids,
            longest_output,
            Detokenizer(tokenizer, request.prompt_token_ids) if tokenizer else None,
        )
        now = self._clock()
        deadline = None if request.deadline_seconds is None else now + request.deadline_seconds
        structure = request.params.structured_outputs
        grammar = self.grammars.start(structure) if self.grammars and structure else None
        seed = sampling_seed(request, self.config.seed)
        generation = Generation(request, seed, output, deadline, grammar, now)
        finish = generation.replay()
        if finish:
            self._ended.append(generation.end(finish))
            return
        self._scheduler.add(generation.sequence, len(request.prompt_token_ids) + longest_output)
        self._generations[request.request_id] = generation
        self._num_prompt_tokens += len(request.prompt_token_ids)

    def _remove(self, generation: Generation) -> None:
        del self._generations[generation.request.request_id]
        self._scheduler.finish(generation.sequence)

    def _end_expired(self) -> None:
        now = self._clock()
        for generation in list(self._generations.values()):
            if generation.deadline is not None and now >= generation.deadline:
                self._remove(generation)
                error = DeadlineExceededError(
                    f"the request's deadline of {generation.request.deadline_seconds:g} s is over after "
                    f"{generation.sequence.num_output_tokens} tokens of output; allow more time or fewer tokens"
                )
                self._ended.append(generation.end(Finish("error"), error))

    def _end_crashed(self, step: ScheduledStep, error: ExpertsCrashedError) -> list[TokenEvent]:
        """End the request whose token crashes its experts; the others' step is repeated without it.

        A draft is not the request's doing: it goes on without drafts.
        """
        row = error.row
        for item in step.items:
            if row < item.num_rows:
                break
            row -= item.num_rows
        generation = self._generation(item)
        if row >= item.num_tokens:
            logger.error("no drafts for request %s any more: %s", generation.request.request_id, error)
            item.sequence.may_draft, item.sequence.draft_token_ids = False, []
            return []
        logger.error("request %s is quarantined: %s", generation.request.request_id, error)
        self._remove(generation)
        sentence = f"the request was stopped: {error.message}; do not send it again as it is"
        return [generation.end(Finish("error"), GenerationError(sentence))]

    def _generation(self, item: ScheduledSequence) -> Generation:
        return self._generations[item.sequence.request.request_id]

    def _draw(self, step: ScheduledStep, logits: NDArray[np.float32]) -> list[int]:
        """Of each row of logits the next token, if the temperature alone decides it; else -1, as where it cannot."""
        rows, places, row = [], [], 0
        for item in step.items:
            for ahead in range(item.num_logits - len(item.scored)):
                if (place := self._generation(item).place(ahead)) is not None:
                    rows.append(row + len(item.scored) + ahead)
                    places.append(place)
            row += item.num_logits
        drawn = [-1] * len(logits)
        for row, token in zip(rows, self._draw_rows(logits, rows, places) or (), strict=False):
            drawn[row] = token
        return drawn

    def _take(
        self, generation: Generation, item: ScheduledSequence, logits: NDArray[np.float32], drawn: list[int]
    ) -> list[TokenEvent]:
        """Hand a generation its rows of logits, and what was drawn from them; its events, none while its prompt is not
        computed.

        A draft's row counts while every draft before it was the token that was chosen.
        """
        try:
            generation.score(logits[: len(item.scored)])
        except Exception as error:
            return [self._end_failed(generation, error)]
        if not item.samples:
            return []
        events: list[TokenEvent] = []
        self._num_draft_tokens += len(item.draft_token_ids)
        first = len(item.scored)
        for place, (row, token) in enumerate(zip(logits[first:], drawn[first:], strict=True)):
            if place:
                self.copies.new_blocks += self._scheduler.accept(generation.sequence)
                self._num_accepted_tokens += 1
            try:
                events.append(generation.take(row, self._clock(), token))
            except Exception as error:
                events.append(self._end_failed(generation, error))
                break
            self._num_generated_tokens += 1
            if events[-1].finish_reason is not None:
                self._remove(generation)
                break
            if generation.sequence.token_ids[-1:] != list(item.draft_token_ids[place : place + 1]):
                break
        return events

    def _end_failed(self, generation: Generation, error: Exception) -> TokenEvent:
        """Whatever it is, it is about this request: the others go on."""
        logger.warning("request %s ends: %s", generation.request.request_id, error, exc_info=error)
        if isinstance(error, GenerationError):  # its latents may be as wrong as its logits
            self._scheduler.forget(generation.sequence)
        self._remove(generation)
        return generation.end(Finish("error"), error)


def _make_runner(decoder: Decoder, config: EngineConfig, plan: CachePlan) -> tuple[Runner, Speculator | None]:
    if config.speculative is None:
        return Runner(decoder, plan.num_blocks, config.block_size), None
    if config.uses_mtp:
        assert isinstance(decoder, DraftingDecoder), "the multi-token-prediction layer was not loaded"
        runner = DraftingRunner(decoder, plan.num_blocks, config.block_size)
        return runner, MtpSpeculator(runner)
    return Runner(decoder, plan.num_blocks, config.block_size), NgramSpeculator(config.speculative.num_tokens)


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else value
