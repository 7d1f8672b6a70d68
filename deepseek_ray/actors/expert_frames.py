"""Expert calls and replies as frames: raw tensor bytes behind a header.

A call's payload is pair_rows [P] int32, pair_experts [P] int32, hidden [N, H]; a reply's is rows [P, H]. A call with
the flag ONE_BY_ONE, whose pairs are in order of their rows, gets two replies per row, in order: an empty one when it is
about to be computed, and one with that row's pairs. A reply's `num_rows` says how many pairs of the call have been
answered before it. On links that take tensors, `hidden` and the rows of a reply travel beside the payload, from device
to device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepseek_ray.errors import LinkError
from deepseek_ray.expert_parallel.dispatch import ShardCall
from deepseek_ray.links.frame import DtypeCode, Frame, FrameKind

RELOAD = 1
"""Flag of a call: the last answer was not finite, so the shard reads the experts anew before it computes."""
ONE_BY_ONE = 2
"""Flag of a call: an answer for each row as soon as it is there, to know over which one a shard has died."""

_CODES = {torch.float32: DtypeCode.FLOAT32, torch.bfloat16: DtypeCode.BFLOAT16}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_INDEX_BYTES = 4


class CallContent(NamedTuple):
    """What a shard reads from a call; the tensors look into the frame's memory."""

    hidden: Tensor
    """[N, H]."""
    pair_rows: Tensor
    """[P] int64."""
    pair_experts: Tensor
    """[P] int64."""


def call_frame(
    call: ShardCall,
    rows: Tensor,
    layer: int,
    sequence: int,
    attempt: int,
    incarnation: int,
    table_version: tuple[int, int],
    flags: int = 0,
    by_tensor: bool = False,
) -> Frame:
    """rows [N, H], contiguous: of the layer's input, those that the shard needs. `by_tensor`: the link takes them."""
    generation, epoch = table_version
    indices = [_bytes(call.pair_rows), _bytes(call.pair_experts)]
    return Frame(
        FrameKind.EXPERT_CALL,
        indices if by_tensor else [*indices, _bytes(rows.cpu())],
        flags=flags,
        incarnation=incarnation,
        generation=generation,
        epoch=epoch,
        sequence=sequence,
        layer=layer,
        attempt=attempt,
        num_rows=rows.shape[0],
        num_pairs=call.pair_rows.numel(),
        dtype=_CODES[rows.dtype],
        tensor=rows if by_tensor else None,
    )


def read_call(frame: Frame, hidden_size: int) -> CallContent:
    """Raises LinkError when the payload is not as long as the counts say, or an index points outside."""
    dtype = _DTYPES.get(frame.dtype)
    pairs, rows = frame.num_pairs, frame.num_rows
    if dtype is None or not pairs or not rows:
        raise LinkError(f"an expert call has dtype {frame.dtype!r}, {rows} rows, {pairs} pairs; it needs some of each")
    here = 0 if frame.tensor is not None else rows * hidden_size * dtype.itemsize
    expected = 2 * pairs * _INDEX_BYTES + here
    if len(frame.payload) != expected:
        raise LinkError(f"an expert call has {len(frame.payload)} payload bytes, its counts say {expected}")
    # In numpy, whose small operations cost a third of torch's; a negative row is a very large one without its sign.
    indices = np.frombuffer(frame.payload, np.int32, 2 * pairs).astype(np.int64)
    if indices[:pairs].view(np.uint64).max() >= rows:
        raise LinkError(f"an expert call names rows {indices[:pairs].min()} to {indices[:pairs].max()} of {rows}")
    pair_rows, pair_experts = torch.from_numpy(indices).split(pairs)
    if frame.tensor is not None:
        hidden = _checked(frame.tensor, rows, hidden_size)
    else:
        hidden = torch.frombuffer(frame.payload, dtype=dtype, offset=2 * pairs * _INDEX_BYTES).view(rows, hidden_size)
    return CallContent(hidden, pair_rows, pair_experts)


def one_by_one(content: CallContent) -> Iterator[CallContent]:
    """The call as calls of one row each. Raises LinkError when the pairs are not in order of their rows."""
    if len(content.pair_rows) > 1 and int(content.pair_rows.diff().min()) < 0:
        raise LinkError("an expert call to be answered row by row has pairs that are not in order of their rows")
    counts = content.pair_rows.bincount(minlength=len(content.hidden)).tolist()
    rows = zip(content.hidden.split(1), content.pair_experts.split(counts), strict=True)
    for hidden, experts in rows:
        yield CallContent(hidden, torch.zeros(len(experts), dtype=torch.int64), experts)


def reply_frame(call: Frame, rows: Tensor, num_before: int = 0, by_tensor: bool = False) -> Frame:
    """`num_before`: pairs of the call that were answered before these. `by_tensor`: the link takes the rows."""
    payload = b"" if by_tensor else _bytes(rows.cpu())
    reply = answer(call, FrameKind.EXPERT_REPLY, payload, rows.shape[0], _CODES[rows.dtype], num_before)
    reply.tensor = rows if by_tensor else None
    return reply


def answer(
    call: Frame,
    kind: FrameKind,
    payload: object = b"",
    num_pairs: int = 0,
    dtype: DtypeCode = DtypeCode.NONE,
    num_rows: int = 0,
) -> Frame:
    """A frame that the caller can match with its call."""
    return Frame(
        kind,
        payload,
        incarnation=call.incarnation,
        sequence=call.sequence,
        layer=call.layer,
        attempt=call.attempt,
        num_rows=num_rows,
        num_pairs=num_pairs,
        dtype=dtype,
    )


def read_reply(frame: Frame, hidden_size: int) -> Tensor:
    """[P, H], looking into the frame's memory: use it before the frame is released."""
    if frame.tensor is not None:
        return _checked(frame.tensor, frame.num_pairs, hidden_size)
    dtype = _DTYPES.get(frame.dtype)
    if dtype is None or len(frame.payload) != frame.num_pairs * hidden_size * dtype.itemsize:
        raise LinkError(
            f"an expert reply for {frame.num_pairs} pairs has {len(frame.payload)} bytes of {frame.dtype!r}; "
            f"expected rows of {hidden_size}"
        )
    if not frame.num_pairs:
        return torch.empty(0, hidden_size, dtype=dtype)
    return torch.frombuffer(frame.payload, dtype=dtype).view(frame.num_pairs, hidden_size)


def _checked(tensor: Tensor, rows: int, hidden_size: int) -> Tensor:
    if tensor.shape != (rows, hidden_size):
        raise LinkError(f"a frame's tensor has shape {list(tensor.shape)}; expected [{rows}, {hidden_size}]")
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data
