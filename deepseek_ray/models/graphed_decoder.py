"""Small steps on one GPU as CUDA graphs: a step is a thousand launches, which the GPU ends sooner than a host makes.

There is one graph for each size of step, rounded up; it is captured when the first step of its size comes. What a step
lacks to the size is filled with its first token once more, which computes and writes what the first one does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_ray.models.paged_decoder import PagedDecoder
from deepseek_ray.nn.paged import LatentCache, PagedBatch
from deepseek_ray.nn.transfer import moved

_MOST_TOKENS = 64
"""Of a step that is captured; more keep a GPU busy for longer than their launches take."""
_LEAST_BLOCKS = 64


class StepSize(NamedTuple):
    """What a graph is made for: so many tokens, and room for as many sequences."""

    tokens: int
    blocks: int
    """Columns of the block tables."""


def step_size(batch: PagedBatch) -> StepSize | None:
    """Rounded up, so that few graphs serve all steps; None for a step that is better not captured."""
    if batch.num_tokens > _MOST_TOKENS:
        return None
    return StepSize(_rounded(batch.num_tokens), max(_LEAST_BLOCKS, _power_of_two(batch.block_tables.shape[1])))


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
        key = size, cache.data.data_ptr()
        if key not in self._graphs:
            whole = super().forward_with_hidden
            inputs = StepInputs(size, self.device)
            inputs.fill(batch)
            self._graphs[key] = _Graph(lambda: whole(inputs.batch, cache), inputs, self._pool)
        logits, hidden = self._graphs[key].run(batch)
        return logits[moved(batch.logit_rows, self.device)], hidden[: batch.num_tokens].clone()


class StepInputs:
    """A batch of one size at fixed addresses, filled by one copy from memory that a GPU reads by itself.

    All tokens' logits are wanted.
    """

    def __init__(self, size: StepSize, device: torch.device) -> None:
        words = 3 * size.tokens + (size.tokens * (1 + size.blocks) + 1) // 2
        self._host = torch.zeros(words, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(words, dtype=torch.int64, device=device)
        self._on_host = _parts(self._host, size)
        self.batch = _parts(self._device, size)

    def fill(self, batch: PagedBatch) -> None:
        """Once the step before is known to have ended: its inputs are overwritten."""
        for name in ("token_ids", "positions", "slots", "sequence_rows"):
            there, part = getattr(self._on_host, name), getattr(batch, name)
            there[: len(part)] = part
            if len(part) < len(there):
                there[len(part) :] = part[0]
        sequences, blocks = batch.block_tables.shape
        self._on_host.block_tables[:sequences, :blocks] = batch.block_tables  # nobody reads beyond
        self._device.copy_(self._host, non_blocking=True)


class _Graph:
    """The steps of one size."""

    def __init__(self, step: Callable[[], tuple[Tensor, Tensor]], inputs: StepInputs, pool: Any) -> None:
        """Captures `step`, after running it for what `inputs` has: what is compiled or allocated once is no part of a
        graph."""
        self._inputs = inputs
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._outputs = step()

    def run(self, batch: PagedBatch) -> tuple[Tensor, Tensor]:
        """Logits and hidden states of all tokens, valid until the next step."""
        self._inputs.fill(batch)
        self._graph.replay()
        return self._outputs


def _parts(room: Tensor, size: StepSize) -> PagedBatch:
    """A batch that lies in `room`, int64 words."""
    tokens, blocks = size
    ids, positions, slots = room[: 3 * tokens].view(3, tokens)
    narrow = room[3 * tokens :].view(torch.int32)
    tables = narrow[tokens : tokens * (1 + blocks)].view(tokens, blocks)
    return PagedBatch(ids, positions, slots, narrow[:tokens], tables, torch.arange(tokens, device=room.device))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _rounded(number: int) -> int:
    """To a power of two, above 8 to a multiple of 8."""
    return _power_of_two(number) if number <= 8 else (number + 7) // 8 * 8
