"""Operators on the paged latent cache: writing a step's latents, turning queries, attention in splits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_ray.kernels.base import Rotation
from deepseek_ray.kernels.gpu.rows import normalised

_MAX_DECODE_TOKENS = 8
"""Of a sequence in a step, on average: with more, as in prefill, programs take several tokens each."""
_JOINED = 8
"""Splits that are joined at a time."""


class Pages(NamedTuple):
    """Latents of sequences, wherever they lie."""

    cache: Tensor
    """[slots, width]."""
    tables: Tensor
    """[S, max_blocks] int32."""
    block_size: int


class Cut(NamedTuple):
    """How attention is divided among programs, and Triton's options."""

    tokens: int = 1
    """Of a program: neighbours, which mostly have the same latents before them."""
    heads: int = 16
    positions: int = 32
    """Latents that are taken together."""
    warps: int = 4
    stages: int = 2
    least_split: int = 128
    """Positions of one program, at least."""
    programs: int = 264
    """About as many as fill a GPU: a longer context is divided among more of them only while there are fewer."""


DECODE = Cut()
PREFILL = Cut(tokens=4, warps=8, least_split=1 << 20)
"""Many tokens: enough programs without splits."""


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
    out = torch.empty(tokens, heads, rank + 2 * half, dtype=query.dtype, device=query.device)
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
    tokens, heads, width = query.shape
    cache, tables, block_size = pages
    cut = cut or (DECODE if tokens <= _MAX_DECODE_TOKENS * len(tables) else PREFILL)
    if cache.dtype == torch.float32:  # else wide latents do not fit
        cut = cut._replace(tokens=1, positions=16, stages=1)
    if not tokens:
        return query.new_empty(0, heads, value_width)
    programs = triton.cdiv(tokens, cut.tokens) * triton.cdiv(heads, cut.heads)
    room = tables.shape[1] * block_size
    split = max(cut.least_split, triton.next_power_of_2(triton.cdiv(room * programs, cut.programs)))
    splits = triton.cdiv(room, split)
    partial = torch.empty(splits, tokens, heads, value_width, dtype=torch.float32, device=query.device)
    sums = torch.empty(2, splits, tokens, heads, dtype=torch.float32, device=query.device)
    value_room = max(16, triton.next_power_of_2(value_width))
    _attend[(triton.cdiv(tokens, cut.tokens), triton.cdiv(heads, cut.heads), splits)](
        query.contiguous(),
        cache,
        tables,
        sequence_rows,
        positions,
        partial,
        sums,
        scale,
        tokens,
        heads,
        tables.shape[1],
        splits * tokens * heads,
        split,
        BLOCK_SIZE=block_size,
        VALUES=value_width,
        REST=width - value_width,
        VALUES_ROOM=value_room,
        REST_ROOM=max(16, triton.next_power_of_2(width - value_width)),
        TOKENS=cut.tokens,
        HEADS=cut.heads,
        POSITIONS=cut.positions,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    if splits == 1:
        return partial[0].to(query.dtype)
    out = torch.empty(tokens, heads, value_width, dtype=query.dtype, device=query.device)
    _join[(tokens, heads)](
        partial, sums, out, splits, splits * tokens * heads, value_width, VALUES_ROOM=value_room, SPLITS=_JOINED
    )
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
    tl.store(to + values, own.to(out.dtype.element_ty), mask=values < rank)
    row = query + (number + 1) * query_width - 2 * half
    first, second = _turned(row, cos + token * half, sin + token * half, half, pairs, IS_INTERLEAVED)
    tl.store(to + rank + pairs, first.to(out.dtype.element_ty), mask=pairs < half)
    tl.store(to + rank + half + pairs, second.to(out.dtype.element_ty), mask=pairs < half)


@triton.jit
def _join(partial, sums, out, splits, num_sums, width, VALUES_ROOM: tl.constexpr, SPLITS: tl.constexpr):
    """Splits of one softmax, each relative to its own maximum, as one. A split without positions has the sum 0."""
    number = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    rows = tl.num_programs(0) * tl.num_programs(1)
    values = tl.arange(0, VALUES_ROOM)
    maximum, total = float("-inf"), 0.0
    result = tl.zeros((VALUES_ROOM,), dtype=tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        place = split * rows + number
        weights = tl.load(sums + num_sums + place, mask=split < splits, other=0.0)
        maxima = tl.load(sums + place, mask=weights > 0, other=float("-inf"))
        higher = tl.maximum(maximum, tl.max(maxima, 0))  # the first split has positions, so no -inf from here on
        weights = weights * tl.exp(maxima - higher)
        fade = tl.exp(maximum - higher)
        there = (weights > 0)[:, None] & (values < width)[None, :]
        own = tl.load(partial + place[:, None] * width + values[None, :], mask=there, other=0.0)
        result = result * fade + tl.sum(own * weights[:, None], 0)
        total = total * fade + tl.sum(weights, 0)
        maximum = higher
    tl.store(out + number * width + values, (result / total).to(out.dtype.element_ty), mask=values < width)


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
    num_tokens,
    num_heads,
    max_blocks,
    num_sums,
    split_size,
    BLOCK_SIZE: tl.constexpr,
    VALUES: tl.constexpr,
    REST: tl.constexpr,
    VALUES_ROOM: tl.constexpr,
    REST_ROOM: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Some heads of some neighbouring tokens over `split_size` positions, with a running maximum (FlashAttention,
    arXiv:2205.14135). Tokens of different sequences take turns.

    Writes the normalised values, and beside them the maximum and the sum of the exponentials relative to it.
    """
    split = tl.program_id(2)
    rows = tl.arange(0, TOKENS * HEADS)
    tokens = tl.program_id(0) * TOKENS + rows // HEADS
    heads = tl.program_id(1) * HEADS + rows % HEADS
    is_row = (tokens < num_tokens) & (heads < num_heads)
    values, rest = tl.arange(0, VALUES_ROOM), tl.arange(0, REST_ROOM)
    is_value, is_rest = (values < VALUES)[None, :], (rest < REST)[None, :]
    width = VALUES + REST
    dtype = cache.dtype.element_ty
    row = query + (tokens.to(tl.int64) * num_heads + heads)[:, None] * width
    query_values = tl.load(row + values[None, :], mask=is_row[:, None] & is_value, other=0.0).to(dtype)
    query_rest = tl.load(row + VALUES + rest[None, :], mask=is_row[:, None] & is_rest, other=0.0).to(dtype)
    sequences = tl.load(sequence_rows + tokens, mask=is_row, other=-1)
    ends = tl.load(positions + tokens, mask=is_row, other=-1).to(tl.int32) + 1

    maximum = tl.full((TOKENS * HEADS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((TOKENS * HEADS,), dtype=tl.float32)
    result = tl.zeros((TOKENS * HEADS, VALUES_ROOM), dtype=tl.float32)
    for number in range(TOKENS):
        token = tl.minimum(tl.program_id(0) * TOKENS + number, num_tokens - 1)
        sequence = tl.load(sequence_rows + token)
        own_ends = tl.where(sequences == sequence, ends, 0)
        end = tl.minimum(tl.max(own_ends, 0), (split + 1) * split_size)
        first = tl.min(tl.where(sequences == sequence, rows // HEADS, TOKENS), 0)
        end = tl.where(first < number, 0, end)  # its tokens have had their turn
        table = block_tables + sequence.to(tl.int64) * max_blocks
        for start in range(split * split_size, end, POSITIONS):
            places = start + tl.arange(0, POSITIONS)
            is_place = (places < end)[:, None]
            blocks = tl.load(table + places // BLOCK_SIZE, mask=places < end, other=0).to(tl.int64)
            latent = cache + (blocks * BLOCK_SIZE + places % BLOCK_SIZE)[:, None] * width
            keys = tl.load(latent + values[None, :], mask=is_place & is_value, other=0.0)
            keys_rest = tl.load(latent + VALUES + rest[None, :], mask=is_place & is_rest, other=0.0)
            scores = tl.dot(query_values, tl.trans(keys), input_precision="ieee")
            scores = tl.dot(query_rest, tl.trans(keys_rest), scores, input_precision="ieee") * scale
            scores = tl.where(places[None, :] < own_ends[:, None], scores, float("-inf"))
            higher = tl.maximum(maximum, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing of a row was seen yet
            weights = tl.exp(scores - base[:, None])
            fade = tl.exp(maximum - base)
            total = total * fade + tl.sum(weights, 1)
            result = tl.dot(weights.to(dtype), keys, result * fade[:, None], input_precision="ieee")
            maximum = higher

    place = (split * num_tokens + tokens).to(tl.int64) * num_heads + heads
    tl.store(sums + place, maximum, mask=is_row)
    tl.store(sums + num_sums + place, total, mask=is_row)
    normal = result / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(partial + place[:, None] * VALUES + values[None, :], normal, mask=is_row[:, None] & is_value)
