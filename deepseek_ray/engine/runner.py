"""A scheduled step as tensors, through the decoder, back as rows of logits."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseek_ray.engine.scheduler import ScheduledStep
from deepseek_ray.nn.paged import LatentCache, PagedBatch


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

    def sample(self, logits: NDArray[np.float32], temperature: float, number: float) -> int | None:
        """See `Kernels.sample`."""
        ...


class Runner:
    """Owns the latent cache and runs steps over it."""

    def __init__(self, decoder: Decoder, num_blocks: int, block_size: int) -> None:
        self._decoder = decoder
        self.cache = decoder.new_cache(num_blocks, block_size)

    @torch.inference_mode()
    def run(self, step: ScheduledStep) -> NDArray[np.float32]:
        """Logits [n, vocab_size]: for each item of the step its `scored` places, then its last token if it samples."""
        batch = make_batch(step, self.cache.block_size)
        return self._decoder.forward(batch, self.cache).cpu().numpy()


def make_batch(step: ScheduledStep, block_size: int) -> PagedBatch:
    """Lay the step's tokens out flat, sequence after sequence, see `PagedBatch`."""
    token_ids: list[int] = []
    positions, slots, rows, logit_rows = [], [], [], []
    tables = np.zeros((len(step.items), max(len(item.sequence.block_table) for item in step.items)), dtype=np.int32)
    for row, item in enumerate(step.items):
        end = item.start + item.num_tokens
        place = np.arange(item.start, end, dtype=np.int64)
        table = tables[row]
        table[: len(item.sequence.block_table)] = item.sequence.block_table
        token_ids += item.sequence.token_ids[item.start : end]
        positions.append(place)
        slots.append(table[place // block_size].astype(np.int64) * block_size + place % block_size)
        rows.append(np.full(item.num_tokens, row, dtype=np.int32))
        first = len(token_ids) - item.num_tokens - item.start
        logit_rows += [first + scored for scored in item.scored]
        if item.samples:
            logit_rows.append(len(token_ids) - 1)

    return PagedBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.from_numpy(np.concatenate(positions)),
        slots=torch.from_numpy(np.concatenate(slots)),
        sequence_rows=torch.from_numpy(np.concatenate(rows)),
        block_tables=torch.from_numpy(tables),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
    )
