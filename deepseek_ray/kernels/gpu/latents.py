"""Operators on the paged latent cache: writing a step's latents, turning queries, attention in splits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_ray.kernels.base import Rotation
from deepseek_ray.kernels.gpu.rows import normalised

_PROGRAMS = 512
"""Enough to fill a GPU with a few on every multiprocessor."""
_LEAST_SPLIT = 128
"""Positions of one program, at least."""


class Pages(NamedTuple):
    """Latents of sequences, wherever they lie."""

    cache: Tensor
    """[slots, width]."""
    tables: Tensor
    """[S, max_blocks] int32."""
    block_size: int


class Cut(NamedTuple):
    """Heads of a program, positions it takes together, and Triton's options."""

    heads: int = 16
    positions: int = 32
    warps: int = 4
    stages: int = 2


def write_latents(kv: Tensor, norm: Tensor, eps: float, rotation: Rotation, slots: Tensor, cache: Tensor) -> None:
    """See `Kernels.write_latents`."""
    cos, sin, is_interleaved = rotation
    tokens, rank, half = len(kv), len(norm), cos.shape[1]
    assert kv.stride(1) == 1 and kv.shape[1] == cache.shape[1] == rank + 2 * half
    if tokens:
        _write_latents[(tokens,)](
            kv,
            kv.stride(0),
            norm,
            cos.contiguous(),
            sin.contiguous(),
            slots,
            cache,
            rank,
            half,
            eps,
            IS_INTERLEAVED=is_interleaved,
            RANK_ROOM=triton.next_power_of_2(rank),
            HALF_ROOM=triton.next_power_of_2(half),
        )


def turn_query(absorbed: Tensor, query: Tensor, rotation: Rotation) -> Tensor:
    """See `Kernels.turn_query`."""
    cos, sin, is_interleaved = rotation
    tokens, heads, rank = absorbed.shape
    half = cos.shape[1]
    out = torch.empty(tokens, heads, rank + 2 * half, dtype=torch.float32, device=query.device)
    if tokens:
        assert query.is_contiguous() and absorbed.stride(2) == 1
        _turn_query[(tokens, heads)](
            absorbed,
            absorbed.stride(0),
            absorbed.stride(1),
            query,
            query.shape[2],
            cos.contiguous(),
            sin.contiguous(),
            out,
            rank,
            half,
            IS_INTERLEAVED=is_interleaved,
            RANK_ROOM=triton.next_power_of_2(rank),
            HALF_ROOM=triton.next_power_of_2(half),
        )
    return out


def attend(
    query: Tensor,
    pages: Pages,
    sequence_rows: Tensor,
    positions: Tensor,
    value_width: int,
    scale: float,
    cut: Cut | None = None,
) -> Tensor:
    """See `Kernels.latent_attention`. The splits are those of the longest context there can be: the host does not wait
    to hear what the longest one is."""
    cut = cut or Cut()
    tokens, heads, width = query.shape
    cache, tables, block_size = pages
    head_blocks = triton.cdiv(heads, cut.heads)
    room = tables.shape[1] * block_size
    split = max(_LEAST_SPLIT, triton.next_power_of_2(triton.cdiv(room * tokens * head_blocks, _PROGRAMS)))
    splits = triton.cdiv(room, split)
    partial = query.new_empty(splits, tokens, heads, value_width)
    sums = query.new_empty(2, splits, tokens, heads)
    value_room = max(16, triton.next_power_of_2(value_width))
    _attend[(tokens, head_blocks, splits)](
        query.contiguous(),
        cache,
        tables,
        sequence_rows,
        positions,
        partial,
        sums,
        scale,
        heads,
        tables.shape[1],
        splits * tokens * heads,
        BLOCK_SIZE=block_size,
        VALUES=value_width,
        REST=width - value_width,
        VALUES_ROOM=value_room,
        REST_ROOM=max(16, triton.next_power_of_2(width - value_width)),
        HEADS=cut.heads,
        POSITIONS=cut.positions,
        SPLIT=split,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    if splits == 1:
        return partial[0]
    out = torch.empty_like(partial[0])
    _join[(tokens, heads)](partial, sums, out, splits, splits * tokens * heads, value_width, VALUES_ROOM=value_room)
    return out


@triton.jit
def _turned(row, cos, sin, half, pairs, IS_INTERLEAVED: tl.constexpr):
    """Both halves of the rotated vector at `row`, see `nn/rope.apply_rope`."""
    is_pair = pairs < half
    first_place, second_place = pairs, half + pairs
    if IS_INTERLEAVED:
        first_place, second_place = 2 * pairs, 2 * pairs + 1
    first = tl.load(row + first_place, mask=is_pair, other=0.0).to(tl.float32)
    second = tl.load(row + second_place, mask=is_pair, other=0.0).to(tl.float32)
    c, s = tl.load(cos + pairs, mask=is_pair, other=0.0), tl.load(sin + pairs, mask=is_pair, other=0.0)
    return first * c - second * s, second * c + first * s


@triton.jit
def _write_latents(
    kv,
    stride,
    norm,
    cos,
    sin,
    slots,
    cache,
    rank,
    half,
    eps,
    IS_INTERLEAVED: tl.constexpr,
    RANK_ROOM: tl.constexpr,
    HALF_ROOM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    values, pairs = tl.arange(0, RANK_ROOM), tl.arange(0, HALF_ROOM)
    row, to = kv + token * stride, cache + tl.load(slots + token) * (rank + 2 * half)
    own = tl.load(row + values, mask=values < rank, other=0.0).to(tl.float32)
    own = normalised(own, tl.load(norm + values, mask=values < rank, other=0.0), eps, rank)
    tl.store(to + values, own.to(cache.dtype.element_ty), mask=values < rank)
    first, second = _turned(row + rank, cos + token * half, sin + token * half, half, pairs, IS_INTERLEAVED)
    tl.store(to + rank + pairs, first.to(cache.dtype.element_ty), mask=pairs < half)
    tl.store(to + rank + half + pairs, second.to(cache.dtype.element_ty), mask=pairs < half)


@triton.jit
def _turn_query(
    absorbed,
    token_stride,
    head_stride,
    query,
    query_width,
    cos,
    sin,
    out,
    rank,
    half,
    IS_INTERLEAVED: tl.constexpr,
    RANK_ROOM: tl.constexpr,
    HALF_ROOM: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    values, pairs = tl.arange(0, RANK_ROOM), tl.arange(0, HALF_ROOM)
    number = token * tl.num_programs(1) + head
    to = out + number * (rank + 2 * half)
    own = tl.load(absorbed + token * token_stride + head * head_stride + values, mask=values < rank, other=0.0)
    tl.store(to + values, own.to(tl.float32), mask=values < rank)
    row = query + (number + 1) * query_width - 2 * half
    first, second = _turned(row, cos + token * half, sin + token * half, half, pairs, IS_INTERLEAVED)
    tl.store(to + rank + pairs, first, mask=pairs < half)
    tl.store(to + rank + half + pairs, second, mask=pairs < half)


@triton.jit
def _join(partial, sums, out, splits, num_sums, width, VALUES_ROOM: tl.constexpr):
    """Splits of one softmax, each relative to its own maximum, as one. A split without positions has maximum -inf."""
    number = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    rows = tl.num_programs(0) * tl.num_programs(1)
    values = tl.arange(0, VALUES_ROOM)
    is_value = values < width
    maximum, total = float("-inf"), 0.0
    result = tl.zeros((VALUES_ROOM,), dtype=tl.float32)
    for split in range(splits):
        place = split * rows + number
        own, weight = tl.load(sums + place), tl.load(sums + num_sums + place)
        if weight > 0:
            higher = tl.maximum(maximum, own)
            fade, weight = tl.exp(maximum - higher), weight * tl.exp(own - higher)
            result = result * fade + weight * tl.load(partial + place * width + values, mask=is_value, other=0.0)
            total = total * fade + weight
            maximum = higher
    tl.store(out + number * width + values, result / total, mask=is_value)


@triton.jit
def _attend(
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
    query_values = tl.load(row + values[None, :], mask=is_head & (values[None, :] < VALUES), other=0.0).to(
        cache.dtype.element_ty
    )
    query_rest = tl.load(row + VALUES + rest[None, :], mask=is_head & (rest[None, :] < REST), other=0.0)
    query_rest = query_rest.to(cache.dtype.element_ty)
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
