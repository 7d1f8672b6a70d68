"""Copies of full cache blocks as frames: raw bytes behind a header.

The payload is the shape (three uint32: num_layers, block_size, width; and four bytes of nothing), the block's key, its
parent's key, and the latents [num_layers, block_size, width] in the cache's dtype.
"""

from __future__ import annotations

import struct

import torch

from deepseek_ray.engine.block_copies import BlockCopy, BlockShape
from deepseek_ray.engine.prefix_cache import KEY_BYTES
from deepseek_ray.errors import LinkError
from deepseek_ray.links.frame import DtypeCode, Frame, FrameKind

_SHAPE = struct.Struct("<III4x")
_LATENTS_AT = _SHAPE.size + 2 * KEY_BYTES
_CODES = {torch.float32: DtypeCode.FLOAT32, torch.bfloat16: DtypeCode.BFLOAT16}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def block_frame(copy: BlockCopy) -> Frame:
    """`copy.latents` is contiguous, on the CPU."""
    latents = copy.latents
    return Frame(
        FrameKind.KV_BLOCK,
        [_SHAPE.pack(*latents.shape), copy.key, copy.parent, latents.reshape(-1).view(torch.uint8).numpy().data],
        num_rows=latents.shape[1],
        dtype=_CODES[latents.dtype],
    )


def read_block(frame: Frame, shape: BlockShape) -> BlockCopy:
    """The copy, with memory of its own. Raises LinkError unless it fits blocks of `shape` exactly."""
    payload = frame.payload
    expected = _LATENTS_AT + shape.num_bytes
    if len(payload) != expected:
        raise LinkError(f"a cache block has {len(payload)} payload bytes; blocks of {shape} have {expected}")
    num_layers, block_size, width = _SHAPE.unpack_from(payload)
    sent = BlockShape(num_layers, block_size, width, _DTYPES.get(frame.dtype, torch.uint8))
    if sent != shape:
        raise LinkError(f"a cache block is {sent}, this worker's are {shape}; run one configuration everywhere")
    key = bytes(payload[_SHAPE.size : _SHAPE.size + KEY_BYTES])
    parent = bytes(payload[_SHAPE.size + KEY_BYTES : _LATENTS_AT])
    latents = torch.frombuffer(payload, dtype=shape.dtype, offset=_LATENTS_AT).clone()
    return BlockCopy(key, parent, latents.view(shape.num_layers, shape.block_size, shape.width))
