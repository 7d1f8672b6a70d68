"""Token blocks to torch batches: what one rank of a training run reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NotRequired, TypedDict

import numpy as np
import torch

from deepseek_ray.data.blocks import TokenBlocks
from deepseek_ray.data.cursor import DataCursor


class Batch(TypedDict):
    """Samples of one micro-batch on the CPU. Inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`."""

    tokens: torch.Tensor
    """[batch, sequence_length + 1] int64."""
    document_ids: torch.Tensor
    """[batch, sequence_length + 1] int32: number of the token's document within its sample. A target counts only where
    it has the same number as its input."""
    loss_mask: NotRequired[torch.Tensor]
    """[batch, sequence_length + 1] bool: the token is to be predicted. Absent when all are."""


class TrainLoader:
    """An endless iterator over the micro-batches of one rank: `accumulation` of them make a step."""

    def __init__(
        self,
        blocks: TokenBlocks,
        sequence_length: int,
        cursor: DataCursor,
        rank: int = 0,
        world_size: int = 1,
        per_rank_batch: int = 1,
        accumulation: int = 1,
    ) -> None:
        self._blocks = blocks
        self._sequence_length = sequence_length
        self._cursor = cursor
        self._rank, self._world_size = rank, world_size
        self._per_rank_batch, self._accumulation = per_rank_batch, accumulation
        self._pending: list[np.ndarray] = []

    @property
    def cursor(self) -> DataCursor:
        """Where a checkpoint should resume: after the last step whose micro-batches were all taken."""
        return self._cursor

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._pending:
            rows = self._cursor.indices(self._rank, self._world_size, self._per_rank_batch, self._accumulation)
            self._pending = list(rows)
        batch = read_batch(self._blocks, self._pending.pop(0), self._sequence_length)
        if not self._pending:
            self._cursor = self._cursor.advance(self._world_size * self._per_rank_batch * self._accumulation)
        return batch


def validation_batches(
    blocks: TokenBlocks,
    sequence_length: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_samples: int | None = None,
) -> Iterator[Batch]:
    """One rank's share of the first `max_samples` samples (None: all), in file order; ranks share none of them.

    The last batch may be smaller, and a rank may get one sample less than another.
    """
    num_samples = blocks.num_samples(sequence_length)
    mine = np.arange(rank, num_samples if max_samples is None else min(max_samples, num_samples), world_size)
    for start in range(0, len(mine), batch_size):
        yield read_batch(blocks, mine[start : start + batch_size], sequence_length)


def read_batch(blocks: TokenBlocks, indices: np.ndarray, sequence_length: int) -> Batch:
    """The samples `indices` ([batch] integers) as one batch."""
    tokens, document_ids = blocks.samples(indices, sequence_length)
    batch: Batch = {"tokens": torch.from_numpy(tokens), "document_ids": torch.from_numpy(document_ids)}
    mask = blocks.loss_masks(indices, sequence_length)
    if mask is not None:
        batch["loss_mask"] = torch.from_numpy(mask)
    return batch
