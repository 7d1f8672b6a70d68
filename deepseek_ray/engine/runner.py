"""A scheduled step as tensors, through the decoder, back as rows of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseek_ray.engine.scheduler import ScheduledStep
from deepseek_ray.kernels.base import Place
from deepseek_ray.nn.paged import LatentCache, PagedBatch
from deepseek_ray.nn.transfer import moved


class DecoderShape(Protocol):
    """What an engine reads of a model's config."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def latent_width(self) -> int: ...
    @property
    def eos_token_id(self) -> int | list[int] | None: ...


class Decoder(Protocol):
    """The model as an engine sees it: `models/paged_decoder.py`, or a small stand-in in tests."""

    @property
    def config(self) -> DecoderShape: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def new_cache(self, num_blocks: int, block_size: int) -> LatentCache: ...
    def forward(self, batch: PagedBatch, cache: LatentCache) -> Tensor:
        """Store the batch's latents in `cache` and return logits [n, vocab_size] float32 of `batch.logit_rows`."""
        ...

    def draw(self, logits: NDArray[np.float32], rows: Sequence[int], places: Sequence[Place]) -> list[int] | None:
        """See `Kernels.draw`."""
        ...


@runtime_checkable
class DraftingDecoder(Decoder, Protocol):
    """A decoder with a multi-token-prediction layer."""

    def forward_with_hidden(self, batch: PagedBatch, cache: LatentCache) -> tuple[Tensor, Tensor]:
        """What `forward` returns, and the last layer's output [T, hidden]."""
        ...

    def draft(self, batch: PagedBatch, hidden: Tensor, cache: LatentCache) -> Tensor:
        """The likeliest token [n] int64 after each of `batch.logit_rows`; stores the layer's latents in `cache`.

        `batch` has the places of some tokens that were computed, and as its `token_ids` those that came after them;
        hidden [T, hidden] is the last layer's output there.
        """
        ...


class Runner:
    """Owns the latent cache and runs steps over it."""

    def __init__(self, decoder: Decoder, num_blocks: int, block_size: int) -> None:
        self._decoder = decoder
        self.cache = decoder.new_cache(num_blocks, block_size)

    @torch.inference_mode()
    def run(self, step: ScheduledStep) -> NDArray[np.float32]:
        """Logits [n, vocab_size]: for each item of the step its `scored` places, then, if it samples, its last token
        and its drafts."""
        batch = make_batch(step, self.cache.block_size)
        return moved(self._forward(batch), torch.device("cpu")).numpy()

    def _forward(self, batch: PagedBatch) -> Tensor:
        return self._decoder.forward(batch, self.cache)


class DraftingRunner(Runner):
    """Keeps what a multi-token-prediction layer needs of the last step."""

    def __init__(self, decoder: DraftingDecoder, num_blocks: int, block_size: int) -> None:
        super().__init__(decoder, num_blocks, block_size)
        self._drafting = decoder
        self._last: tuple[PagedBatch, Tensor] | None = None

    def _forward(self, batch: PagedBatch) -> Tensor:
        logits, hidden = self._drafting.forward_with_hidden(batch, self.cache)
        self._last = batch, hidden
        return logits

    @torch.inference_mode()
    def draft(self, rows: list[int], next_ids: list[int], logit_rows: list[int]) -> list[int]:
        """The likeliest tokens after those of `logit_rows`, which count within `rows`.

        rows: tokens of the last step, those that stayed; next_ids: of each the token that came after it.
        """
        assert self._last is not None, "nothing was computed yet"
        batch, hidden = self._last
        here = torch.tensor(rows)
        after = PagedBatch(
            token_ids=torch.tensor(next_ids),
            positions=batch.positions[here],
            slots=batch.slots[here],
            sequence_rows=batch.sequence_rows[here],
            block_tables=batch.block_tables,
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        )
        return self._drafting.draft(after, hidden[here.to(hidden.device)], self.cache).tolist()


def make_batch(step: ScheduledStep, block_size: int) -> PagedBatch:
    """Lay the step's tokens out flat, sequence after sequence, see `PagedBatch`."""
    token_ids: list[int] = []
    logit_rows: list[int] = []
    tables = np.zeros((len(step.items), max(len(item.sequence.block_table) for item in step.items)), dtype=np.int32)
    for row, item in enumerate(step.items):
        tables[row, : len(item.sequence.block_table)] = item.sequence.block_table
        first = len(token_ids) - item.start
        token_ids += item.sequence.token_ids[item.start : item.start + item.num_tokens]
        token_ids += item.draft_token_ids
        logit_rows += [first + scored for scored in item.scored]
        if item.samples:
            logit_rows += range(len(token_ids) - 1 - len(item.draft_token_ids), len(token_ids))
    counts = [item.num_rows for item in step.items]
    rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    ends = np.cumsum(counts)
    positions = np.arange(len(token_ids)) + (np.array([item.start for item in step.items]) + counts - ends)[rows]
    blocks, offsets = np.divmod(positions, block_size)

    return PagedBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(tables[rows, blocks].astype(np.int64) * block_size + offsets),
        sequence_rows=torch.from_numpy(rows),
        block_tables=torch.from_numpy(tables),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
    )
