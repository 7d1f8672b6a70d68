"""The two operators in which a GPU spends a decode step, in Triton: all experts of a layer in one launch, and attention
over paged latents without gathering them. The rest is torch's.

`TRITON_INTERPRET=1`, set before this is imported, runs them on the CPU: slow, and how they are tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_ray.kernels.base import PackedWeight
from deepseek_ray.kernels.fast import FastKernels

_FEW_ROWS, _MANY_ROWS = 16, 64
"""Rows of a tile: 16 is the least that tensor cores take, 64 reads weights less often where an expert has many."""
_COLUMNS, _INPUTS = 64, 64
_HEADS = 16
_POSITIONS = 32
"""Latents that are taken together."""
_SPLIT = 1024
"""Positions of one program; several share a longer context, or few sequences would leave most of a GPU idle."""
_MAX_TOKENS_PER_SEQUENCE = 8
"""Above, as in prefill, many rows meet the same latents: torch gathers these once and multiplies matrices."""


class GpuKernels(FastKernels):
    """`FastKernels` on a CUDA device."""

    name = "Triton and torch, whole batches"

    def grouped_linear(self, x: Tensor, weights: Sequence[PackedWeight], rows: Sequence[int]) -> Tensor:
        if any(weight.scales is not None for weight in weights):
            return super().grouped_linear(x, weights, rows)
        dtype = weights[0].data.dtype
        tile_rows = _FEW_ROWS if len(x) <= _MANY_ROWS * len(weights) else _MANY_ROWS
        groups, firsts, ends = _tiles(rows, tile_rows)
        pointers = torch.tensor([weight.data.data_ptr() for weight in weights], dtype=torch.int64)
        num_out, num_in = weights[0].num_out, weights[0].num_in
        typed = x.to(dtype).contiguous()
        out = torch.empty(len(x), num_out, dtype=dtype, device=x.device)
        where = torch.tensor([groups, firsts, ends], dtype=torch.int32).to(x.device, non_blocking=True)
        _grouped_linear[(len(groups), triton.cdiv(num_out, _COLUMNS))](
            typed,
            out,
            pointers.to(x.device, non_blocking=True),
            *where,
            num_out,
            num_in,
            ROWS=tile_rows,
            COLUMNS=_COLUMNS,
            INPUTS=_INPUTS,
        )
        return out.to(x.dtype)

    def latent_attention(
        self,
        query: Tensor,
        cache: Tensor,
        block_tables: Tensor,
        sequence_rows: Tensor,
        positions: Tensor,
        block_size: int,
        value_width: int,
        scale: float,
    ) -> Tensor:
        """Prefill as in `FastKernels`. In decode the query is rounded to the cache's dtype, as the products want it."""
        tokens, heads, width = query.shape
        if tokens > _MAX_TOKENS_PER_SEQUENCE * len(block_tables):
            return super().latent_attention(
                query, cache, block_tables, sequence_rows, positions, block_size, value_width, scale
            )
        splits = triton.cdiv(block_tables.shape[1] * block_size, _SPLIT)  # the longest there can be: nobody waits for
        partial = query.new_empty(splits, tokens, heads, value_width)  # the GPU to hear what the longest one is
        sums = query.new_empty(2, splits, tokens, heads)
        _latent_attention[(tokens, triton.cdiv(heads, _HEADS), splits)](
            query.to(cache.dtype).contiguous(),
            cache,
            block_tables,
            sequence_rows,
            positions,
            partial,
            sums,
            scale,
            heads,
            block_tables.shape[1],
            splits * tokens * heads,
            BLOCK_SIZE=block_size,
            VALUES=value_width,
            REST=width - value_width,
            VALUES_ROOM=max(16, triton.next_power_of_2(value_width)),
            REST_ROOM=max(16, triton.next_power_of_2(width - value_width)),
            HEADS=_HEADS,
            POSITIONS=_POSITIONS,
            SPLIT=_SPLIT,
        )
        return _joined(partial, *sums)


def _tiles(rows: Sequence[int], tile_rows: int) -> tuple[list[int], list[int], list[int]]:
    """Of each tile: its group, its first row, and the end of its group's rows."""
    groups, firsts, ends, start = [], [], [], 0
    for group, count in enumerate(rows):
        for first in range(start, start + count, tile_rows):
            groups.append(group)
            firsts.append(first)
            ends.append(start + count)
        start += count
    return groups, firsts, ends


def _joined(partial: Tensor, maxima: Tensor, sums: Tensor) -> Tensor:
    """Splits of one softmax, each relative to its own maximum, as one. A split without positions has maximum -inf."""
    weights = sums * torch.exp(maxima - maxima.amax(dim=0))
    weighted = torch.where(weights.unsqueeze(-1) > 0, partial * weights.unsqueeze(-1), 0)
    return weighted.sum(dim=0) / weights.sum(dim=0).unsqueeze(-1)


@triton.jit
def _grouped_linear(
    x,
    out,
    weights,
    tile_groups,
    tile_firsts,
    tile_ends,
    num_out,
    num_in,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """One tile of `ROWS` rows of one group by `COLUMNS` outputs. weights: addresses of `[N, K]`, one per group."""
    tile = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.load(tile_firsts + tile) + tl.arange(0, ROWS)
    is_row = rows[:, None] < tl.load(tile_ends + tile)
    is_column = columns[:, None] < num_out
    weight = tl.load(weights + tl.load(tile_groups + tile)).to(tl.pointer_type(x.dtype.element_ty))
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, num_in, INPUTS):
        inputs = start + tl.arange(0, INPUTS)[None, :]
        is_input = inputs < num_in
        left = tl.load(x + rows[:, None].to(tl.int64) * num_in + inputs, mask=is_row & is_input, other=0.0)
        right = tl.load(weight + columns[:, None].to(tl.int64) * num_in + inputs, mask=is_column & is_input, other=0.0)
        sums = tl.dot(left, tl.trans(right), sums, input_precision="ieee")
    place = rows[:, None].to(tl.int64) * num_out + columns[None, :]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=is_row & (columns[None, :] < num_out))


@triton.jit
def _latent_attention(
    query,
    cache,
    block_tables,
    sequence_rows,
    positions,
    partial,
    sums,
    scale,
    num_heads,
    max_blocks,
    num_sums,
    BLOCK_SIZE: tl.constexpr,
    VALUES: tl.constexpr,
    REST: tl.constexpr,
    VALUES_ROOM: tl.constexpr,
    REST_ROOM: tl.constexpr,
    HEADS: tl.constexpr,
    POSITIONS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """`HEADS` heads of one token over `SPLIT` positions, with a running maximum (FlashAttention, arXiv:2205.14135).

    Writes the normalised values, and beside them the maximum and the sum of the exponentials relative to it.
    """
    token, split = tl.program_id(0), tl.program_id(2)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = heads[:, None] < num_heads
    values, rest = tl.arange(0, VALUES_ROOM), tl.arange(0, REST_ROOM)
    width = VALUES + REST
    row = query + (token * num_heads + heads[:, None]).to(tl.int64) * width
    query_values = tl.load(row + values[None, :], mask=is_head & (values[None, :] < VALUES), other=0.0)
    query_rest = tl.load(row + VALUES + rest[None, :], mask=is_head & (rest[None, :] < REST), other=0.0)
    end = tl.minimum(tl.load(positions + token) + 1, (split + 1) * SPLIT).to(tl.int32)
    table = block_tables + tl.load(sequence_rows + token) * max_blocks

    maximum = tl.full((HEADS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((HEADS,), dtype=tl.float32)
    result = tl.zeros((HEADS, VALUES_ROOM), dtype=tl.float32)
    for start in range(split * SPLIT, end, POSITIONS):
        places = start + tl.arange(0, POSITIONS)
        is_place = places < end
        blocks = tl.load(table + places // BLOCK_SIZE, mask=is_place, other=0).to(tl.int64)
        latent = cache + (blocks * BLOCK_SIZE + places % BLOCK_SIZE)[:, None] * width
        keys = tl.load(latent + values[None, :], mask=is_place[:, None] & (values[None, :] < VALUES), other=0.0)
        keys_rest = tl.load(latent + VALUES + rest[None, :], mask=is_place[:, None] & (rest[None, :] < REST), other=0.0)
        scores = tl.dot(query_values, tl.trans(keys), input_precision="ieee")
        scores = tl.dot(query_rest, tl.trans(keys_rest), scores, input_precision="ieee") * scale
        scores = tl.where(is_place[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(maximum - higher)
        total = total * fade + tl.sum(weights, 1)
        result = tl.dot(weights.to(keys.dtype), keys, result * fade[:, None], input_precision="ieee")
        maximum = higher

    tokens = tl.num_programs(0)
    place = (split * tokens + token).to(tl.int64) * num_heads + heads
    tl.store(sums + place, maximum, mask=heads < num_heads)
    tl.store(sums + num_sums + place, total, mask=heads < num_heads)
    normal = result / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(partial + place[:, None] * VALUES + values[None, :], normal, mask=is_head & (values[None, :] < VALUES))
