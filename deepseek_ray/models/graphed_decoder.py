"""Small steps on one GPU as CUDA graphs: a step is a thousand launches, which the GPU ends sooner than a host makes.

There is one graph for each size of step, rounded up; it is captured when the first step of its size comes. What a step
lacks to the size is filled with its first token once more, which computes and writes what the first one does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_ray.models.paged_decoder import PagedDecoder
from deepseek_ray.nn.paged import LatentCache, PagedBatch

_MOST_TOKENS = 64
"""Of a step that is captured; more keep a GPU busy for longer than their launches take."""
_LEAST_BLOCKS = 64


class StepSize(NamedTuple):
    """What a graph is made for."""

    tokens: int
    sequences: int
    blocks: int
    """Columns of the block tables."""


def step_size(batch: PagedBatch) -> StepSize | None:
    """Rounded up, so that few graphs serve all steps; None for a step that is better not captured."""
    if batch.num_tokens > _MOST_TOKENS:
        return None
    sequences, blocks = batch.block_tables.shape
    return StepSize(_rounded(batch.num_tokens), _rounded(sequences), max(_LEAST_BLOCKS, _power_of_two(blocks)))


def padded(batch: PagedBatch, size: StepSize) -> PagedBatch:
    """The batch with its first token repeated and block tables widened to `size`; all tokens' logits are wanted."""
    rows = torch.arange(size.tokens)
    rows[batch.num_tokens :] = 0
    tables = batch.block_tables.new_zeros(size.sequences, size.blocks)
    tables[: batch.block_tables.shape[0], : batch.block_tables.shape[1]] = batch.block_tables
    return PagedBatch(
        token_ids=batch.token_ids[rows],
        positions=batch.positions[rows],
        slots=batch.slots[rows],
        sequence_rows=batch.sequence_rows[rows],
        block_tables=tables,
        logit_rows=torch.arange(size.tokens),
    )


class GraphedDecoder(PagedDecoder):
    """A `PagedDecoder` on a CUDA device whose experts are there, too. Its kernels must be capturable, and its experts
    stay where they are in memory: a graph holds their addresses."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        assert self._kernels.is_capturable
        self._graphs: dict[tuple[StepSize, int], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def forward_with_hidden(self, batch: PagedBatch, cache: LatentCache) -> tuple[Tensor, Tensor]:
        size = step_size(batch)
        if size is None:
            return super().forward_with_hidden(batch, cache)
        key, filled = (size, cache.data.data_ptr()), padded(batch, size)
        if key not in self._graphs:
            whole = super().forward_with_hidden
            self._graphs[key] = _Graph(lambda inputs: whole(inputs, cache), filled, self.device, self._pool)
        logits, hidden = self._graphs[key].run(filled)
        return logits[batch.logit_rows.to(self.device)], hidden[: batch.num_tokens].clone()


class _Inputs:
    """A batch at fixed addresses on a device, filled by one copy from memory that the device reads by itself."""

    def __init__(self, like: PagedBatch, device: torch.device) -> None:
        self._names = [field.name for field in fields(PagedBatch)]
        parts = [getattr(like, name) for name in self._names]
        room = sum(_aligned(part.nbytes) for part in parts)
        self._host = torch.empty(room, dtype=torch.uint8, pin_memory=True)
        self._device = torch.empty(room, dtype=torch.uint8, device=device)
        self._on_host, self.batch = _views(self._host, parts), _views(self._device, parts)

    def fill(self, batch: PagedBatch) -> None:
        """Once the step before is known to have ended: its inputs are overwritten."""
        for name in self._names:
            getattr(self._on_host, name).copy_(getattr(batch, name))
        self._device.copy_(self._host, non_blocking=True)


class _Graph:
    """The steps of one size."""

    def __init__(
        self, step: Callable[[PagedBatch], tuple[Tensor, Tensor]], batch: PagedBatch, device: Any, pool: Any
    ) -> None:
        """Captures `step`, after running it for `batch`: what is compiled or allocated once is no part of a graph."""
        self._inputs = _Inputs(batch, device)
        self._inputs.fill(batch)
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(2):
                step(self._inputs.batch)
        torch.cuda.current_stream(device).wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._outputs = step(self._inputs.batch)

    def run(self, batch: PagedBatch) -> tuple[Tensor, Tensor]:
        """Logits and hidden states of all tokens, valid until the next step."""
        self._inputs.fill(batch)
        self._graph.replay()
        return self._outputs


def _views(room: Tensor, parts: list[Tensor]) -> PagedBatch:
    views, start = [], 0
    for part in parts:
        views.append(room[start : start + part.nbytes].view(part.dtype).view(part.shape))
        start += _aligned(part.nbytes)
    return PagedBatch(*views)


def _aligned(num_bytes: int) -> int:
    return (num_bytes + 15) // 16 * 16


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _rounded(number: int) -> int:
    """To a power of two, above 8 to a multiple of 8."""
    return _power_of_two(number) if number <= 8 else (number + 7) // 8 * 8
