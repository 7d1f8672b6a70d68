"""All experts of a layer in three launches: pairs in the order of their experts, gate and up with SiLU, down.

A program has one expert, some columns of its output and a tile of its rows; those of the same weights are neighbours
and find them in the cache. Which experts have rows it reads on the GPU: the host hears nothing, and those without cost
a glance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_ray.kernels.base import ExpertWeights, PackedWeight

_PAIRS_PER_PROGRAM, _PAIRS_AT_A_TIME = 32, 512
_MAX_COUNTED_PAIRS = 16384
"""Each of them is compared with each: above, sorting is faster."""

_UNEVEN = 2
"""Rows of an expert, of their mean, for which there is a program each tile; those of a busier one take turns."""


class Tiles(NamedTuple):
    """How a product is cut: rows and columns of a program's tile, bfloat16 inputs it takes at a time, and Triton's
    options."""

    rows: int
    columns: int
    inputs: int
    warps: int
    stages: int


FEW = Tiles(rows=16, columns=64, inputs=128, warps=4, stages=3)
"""Rows of a decode step: 16 is the least that tensor cores take, and the time is that of reading the weights."""
MANY = Tiles(rows=128, columns=128, inputs=64, warps=8, stages=4)


class DeviceTable(NamedTuple):
    """Where the weights of a layer's experts are. Keeps none of them alive."""

    pointers: Tensor
    """[2, E] int64 on the device: gate and up, then down; 0 for what is not here."""
    is_complete: bool
    like: PackedWeight
    """The down projection of one of them."""


def device_table(experts: Mapping[int, ExpertWeights], num_experts: int) -> DeviceTable | None:
    """None for weights of fewer bits."""
    if not experts or any(own.down.scales is not None for own in experts.values()):
        return None
    like = next(iter(experts.values())).down
    pointers = torch.zeros(2, num_experts, dtype=torch.int64)
    for id, own in experts.items():
        pointers[0, id], pointers[1, id] = own.gate_up.data.data_ptr(), own.down.data.data_ptr()
    return DeviceTable(pointers.to(like.data.device), len(experts) == num_experts, like)


def run_experts(
    table: DeviceTable, hidden: Tensor, token_rows: Tensor, ids: Tensor, tiles: Tiles | None = None
) -> Tensor | None:
    """See `Kernels.run_experts`."""
    if not (table.is_complete or _are_here(table, ids)):
        return None
    num_experts, pairs = table.pointers.shape[1], len(ids)
    tiles = tiles or (FEW if pairs <= FEW.rows * num_experts else MANY)
    order, starts = order_pairs(ids, num_experts)
    dtype, width, hidden_size = table.like.data.dtype, table.like.num_in, table.like.num_out
    typed = hidden.to(dtype)
    assert typed.stride(1) == 1
    gated = torch.empty(pairs, width, dtype=dtype, device=hidden.device)
    out = torch.empty(pairs, hidden_size, dtype=dtype, device=hidden.device)
    gate_up, down = table.pointers
    row_tiles = triton.cdiv(_UNEVEN * pairs, num_experts * tiles.rows)
    inputs = tiles.inputs * torch.bfloat16.itemsize // dtype.itemsize  # as many bytes, or they do not fit
    cut = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "INPUTS": inputs}
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    _gate_up[(row_tiles, triton.cdiv(width, tiles.columns), num_experts)](
        typed, typed.stride(0), gated, gate_up, token_rows, order, starts, width, hidden_size, **cut, **options
    )
    _down[(row_tiles, triton.cdiv(hidden_size, tiles.columns), num_experts)](
        gated, out, down, order, starts, hidden_size, width, **cut, **options
    )
    return out.to(hidden.dtype)


def order_pairs(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """ids [P] -> order [P] int32, pairs sorted by expert and otherwise as they came, and starts [E + 1] int32: the
    pairs of expert e are `order[starts[e] : starts[e + 1]]`."""
    if len(ids) > _MAX_COUNTED_PAIRS:
        in_order, order = ids.sort(stable=True)
        edges = torch.arange(num_experts + 1, device=ids.device)
        return order.to(torch.int32), torch.searchsorted(in_order, edges).to(torch.int32)
    order = torch.empty(len(ids), dtype=torch.int32, device=ids.device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    programs = triton.cdiv(max(len(ids), num_experts + 1), _PAIRS_PER_PROGRAM)
    _order_pairs[(programs,)](
        ids, order, starts, len(ids), num_experts, BLOCK=_PAIRS_PER_PROGRAM, OTHERS=_PAIRS_AT_A_TIME
    )
    return order, starts


def _are_here(table: DeviceTable, ids: Tensor) -> bool:
    """Waits for the GPU."""
    num_experts = table.pointers.shape[1]
    known = (ids >= 0) & (ids < num_experts)
    return bool((known & (table.pointers[0][ids.clamp(0, num_experts - 1)] != 0)).all())


@triton.jit
def _order_pairs(ids, order, starts, num_pairs, num_experts, BLOCK: tl.constexpr, OTHERS: tl.constexpr):
    """The place of a pair is the number of those before it; the start of an expert, that of those below it."""
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own_ids = tl.load(ids + own, mask=own < num_pairs, other=0)[:, None]
    places = tl.zeros((BLOCK,), dtype=tl.int32)
    below = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, num_pairs, OTHERS):
        others = first + tl.arange(0, OTHERS)
        is_pair = (others < num_pairs)[None, :]
        other_ids = tl.load(ids + others, mask=others < num_pairs, other=0)[None, :]
        is_before = (other_ids < own_ids) | ((other_ids == own_ids) & (others[None, :] < own[:, None]))
        places += tl.sum((is_before & is_pair).to(tl.int32), 1)
        below += tl.sum(((other_ids < own[:, None]) & is_pair).to(tl.int32), 1)
    tl.store(order + places, own, mask=own < num_pairs)
    tl.store(starts + own, below, mask=own <= num_experts)


@triton.jit
def _gate_up(
    x,
    x_stride,
    out,
    pointers,
    token_rows,
    order,
    starts,
    num_out,
    num_in,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """silu(x W_gate^T) * (x W_up^T) of some columns of one expert -> out [P, num_out] in the order of experts."""
    expert = tl.program_id(2)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns[:, None] < num_out
    end = tl.load(starts + expert + 1)
    weight = tl.multiple_of(tl.load(pointers + expert).to(tl.pointer_type(x.dtype.element_ty)), 16)
    of_gate = weight + columns[:, None].to(tl.int64) * num_in
    of_up = of_gate + num_out.to(tl.int64) * num_in
    start_row = tl.load(starts + expert) + tl.program_id(0) * ROWS
    for first in range(start_row, end, ROWS * tl.num_programs(0)):
        places = first + tl.arange(0, ROWS)
        is_row = places < end
        tokens = tl.load(token_rows + tl.load(order + places, mask=is_row, other=0), mask=is_row, other=0)
        row = x + tokens[:, None].to(tl.int64) * x_stride
        gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        up = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, num_in, INPUTS):
            inputs = start + tl.arange(0, INPUTS)[None, :]
            is_input = inputs < num_in
            left = tl.load(row + inputs, mask=is_row[:, None] & is_input, other=0.0)
            right = tl.load(of_gate + inputs, mask=is_column & is_input, other=0.0)
            gate = tl.dot(left, tl.trans(right), gate, input_precision="ieee")
            right = tl.load(of_up + inputs, mask=is_column & is_input, other=0.0)
            up = tl.dot(left, tl.trans(right), up, input_precision="ieee")
        place = places[:, None].to(tl.int64) * num_out + columns[None, :]
        gated = gate * tl.sigmoid(gate) * up
        tl.store(out + place, gated.to(out.dtype.element_ty), mask=is_row[:, None] & (columns[None, :] < num_out))


@triton.jit
def _down(
    x,
    out,
    pointers,
    order,
    starts,
    num_out,
    num_in,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """x [P, num_in] in the order of experts -> out [P, num_out] in the order of pairs."""
    expert = tl.program_id(2)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns[:, None] < num_out
    end = tl.load(starts + expert + 1)
    weight = tl.multiple_of(tl.load(pointers + expert).to(tl.pointer_type(x.dtype.element_ty)), 16)
    of_columns = weight + columns[:, None].to(tl.int64) * num_in
    start_row = tl.load(starts + expert) + tl.program_id(0) * ROWS
    for first in range(start_row, end, ROWS * tl.num_programs(0)):
        places = first + tl.arange(0, ROWS)
        is_row = places < end
        row = x + places[:, None].to(tl.int64) * num_in
        sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, num_in, INPUTS):
            inputs = start + tl.arange(0, INPUTS)[None, :]
            is_input = inputs < num_in
            left = tl.load(row + inputs, mask=is_row[:, None] & is_input, other=0.0)
            right = tl.load(of_columns + inputs, mask=is_column & is_input, other=0.0)
            sums = tl.dot(left, tl.trans(right), sums, input_precision="ieee")
        pairs = tl.load(order + places, mask=is_row, other=0)
        place = pairs[:, None].to(tl.int64) * num_out + columns[None, :]
        tl.store(out + place, sums.to(out.dtype.element_ty), mask=is_row[:, None] & (columns[None, :] < num_out))
