"""Safetensors files: opened with a check of their header, written tensor after tensor without a second copy in memory.

Format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, byte range), then the raw data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek_ray.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_HEADER_ALIGNMENT = 8


def open_safetensors(path: Path) -> Any:
    """A memory-mapped `safe_open` handle. Raises CheckpointError when the file is missing, cut short or malformed."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}); it may be cut short: copy or download it again"
        ) from None


def stream_float32(path: Path, shapes: Mapping[str, Sequence[int]], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write and fsync one file of float32 tensors as they come, holding one at a time.

    `tensors` are those of `shapes`, in its order. Raises OSError as the system does.
    """
    expected = {name: torch.empty(tuple(shape), dtype=torch.float32, device="meta") for name, shape in shapes.items()}
    with path.open("wb") as file:
        file.write(_header(list(expected.items())))
        for (name, like), (given, tensor) in zip(expected.items(), tensors, strict=True):
            assert (given, tensor.shape, tensor.dtype) == (name, like.shape, like.dtype), (name, given, tensor.shape)
            file.write(_raw(tensor))
        file.flush()
        os.fsync(file.fileno())


def write_safetensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Write and fsync one file. Raises OSError as the system does; the caller removes what was left."""
    # Wide dtypes first, so that every tensor starts at a multiple of its item size.
    ordered = sorted(tensors, key=lambda item: (-item[1].dtype.itemsize, item[0]))
    with path.open("wb") as file:
        file.write(_header(ordered))
        for _, tensor in ordered:
            if tensor.numel():
                file.write(_raw(tensor))
        file.flush()
        os.fsync(file.fileno())


def require_finite(name: str, tensor: Tensor, where: object) -> None:
    """Raise CheckpointError naming the tensor and its first NaN or infinity.

    Finite extremes prove there is none (NaN is the extreme of whatever holds it), at the speed of memory; `isfinite` of
    every element takes ten times as long.
    """
    if tensor.numel() == 0 or all(extreme.isfinite() for extreme in tensor.aminmax()):
        return
    bad = (~tensor.isfinite()).nonzero()
    if len(bad):
        place = bad[0].tolist()
        raise CheckpointError(
            f"{where}: tensor {name} holds {len(bad)} values that are not finite, the first "
            f"{tensor[tuple(place)].item()} at {place}; weights must be finite: go back to an earlier checkpoint"
        )


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors:
        end = offset + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
