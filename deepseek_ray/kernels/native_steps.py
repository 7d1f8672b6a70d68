"""The C++ operators that stand for a dozen of torch's each: between products, a decode step is bound by their number.

Part of `NativeKernels`. Each gives the bits of the torch operators that it replaces.
"""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseek_ray.kernels.base import Choice, ExpertWeights, Kernels, PackedWeight, Rotation

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.int32: 3}
_LONG, _POINTER, _INT, _FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
_SIGNATURES = {
    "dr_write_latents": (
        *(_POINTER, _LONG, _INT, _LONG, _LONG, _LONG, _POINTER, _FLOAT, _POINTER, _POINTER, _INT, _POINTER),
        *(_POINTER, _INT),
    ),
    "dr_turn_query": (
        *(_POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, _LONG, _POINTER, _POINTER, _INT, _POINTER, _INT),
    ),
    "dr_choose_experts": (
        *(_POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, _LONG, _INT, _INT, _FLOAT, _POINTER, _POINTER),
    ),
    "dr_combine_slots": (_POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, _POINTER, _INT),
    "dr_experts": (
        *(_POINTER, _LONG, _INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, _POINTER, _POINTER, _POINTER),
        *(_POINTER, _INT, _POINTER, _INT),
    ),
}


def declare(library: ctypes.CDLL) -> None:
    """Say what the functions take, once: plain numbers then go in, and a pointer keeps its upper half."""
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = None
    library.dr_experts.restype = _INT


class ExpertTable(NamedTuple):
    """Where the weights of a layer's experts are."""

    pointers: NDArray[np.uint64]
    """[4, E]: data and scales of gate and up, then of down; 0 for what is not here."""
    like: PackedWeight
    """The down projection of one of them."""


class NativeSteps(Kernels):
    """See the module."""

    _library: ctypes.CDLL

    @property
    @abstractmethod
    def _threads(self) -> int: ...

    def write_latents(
        self, kv: Tensor, norm: Tensor, eps: float, rotation: Rotation, slots: Tensor, latents: Tensor
    ) -> bool:
        cos, sin, interleaved = rotation
        tokens, width = kv.shape
        rank = len(norm)
        assert kv.stride(1) == 1 and kv.dtype == latents.dtype and latents.is_contiguous() and slots.is_contiguous()
        assert latents.shape[1] == width == rank + 2 * cos.shape[1] and cos.is_contiguous() and sin.is_contiguous()
        self._library.dr_write_latents(
            *(kv.data_ptr(), kv.stride(0), DTYPES[kv.dtype], tokens, rank, (width - rank) // 2, norm.data_ptr(), eps),
            *(cos.data_ptr(), sin.data_ptr(), interleaved, slots.data_ptr(), latents.data_ptr(), self._threads),
        )
        return True

    def turn_query(self, absorbed: Tensor, query: Tensor, rotation: Rotation) -> Tensor:
        cos, sin, interleaved = rotation
        tokens, heads, rank = absorbed.shape
        half = cos.shape[1]
        assert absorbed.is_contiguous() and query.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
        assert absorbed.dtype == query.dtype == torch.float32
        out = torch.empty(tokens, heads, rank + 2 * half)
        self._library.dr_turn_query(
            *(absorbed.data_ptr(), query.data_ptr(), tokens, heads, query.shape[2], rank, half),
            *(cos.data_ptr(), sin.data_ptr(), interleaved, out.data_ptr(), self._threads),
        )
        return out

    def choose_experts(self, scores: Tensor, bias: Tensor | None, choice: Choice) -> tuple[Tensor, Tensor]:
        assert scores.is_contiguous() and scores.dtype == torch.float32
        tokens, num_experts = scores.shape
        ids, weights = torch.empty(tokens, choice.top_k, dtype=torch.int64), torch.empty(tokens, choice.top_k)
        self._library.dr_choose_experts(
            *(scores.data_ptr(), None if bias is None else bias.data_ptr(), tokens, num_experts),
            *(*choice, ids.data_ptr(), weights.data_ptr()),
        )
        return ids, weights

    def combine_slots(self, rows: Tensor, weights: Tensor) -> Tensor | None:
        if not (rows.is_contiguous() and weights.is_contiguous()):
            return None
        tokens, slots, width = rows.shape
        out = torch.empty(tokens, width, dtype=rows.dtype)
        self._library.dr_combine_slots(
            *(rows.data_ptr(), weights.data_ptr(), tokens, slots, width, DTYPES[rows.dtype], out.data_ptr()),
            self._threads,
        )
        return out

    def expert_table(self, experts: Mapping[int, ExpertWeights], num_experts: int) -> ExpertTable | None:
        if not experts:
            return None
        pointers = np.zeros((4, num_experts), dtype=np.uint64)
        for id, own in experts.items():
            for row, weight in ((0, own.gate_up), (2, own.down)):
                pointers[row, id] = weight.data.data_ptr()
                pointers[row + 1, id] = 0 if weight.scales is None else weight.scales.data_ptr()
        return ExpertTable(pointers, next(iter(experts.values())).down)

    def run_experts(self, table: ExpertTable, hidden: Tensor, token_rows: Tensor, ids: Tensor) -> Tensor | None:
        width, like = hidden.shape[1], table.like
        assert width == like.num_out and hidden.stride(1) == 1 and token_rows.is_contiguous() and ids.is_contiguous()
        out = torch.empty(len(ids), width, dtype=hidden.dtype)
        row = table.pointers.strides[0]
        first = table.pointers.ctypes.data
        is_here = self._library.dr_experts(
            *(hidden.data_ptr(), hidden.stride(0), DTYPES[hidden.dtype], token_rows.data_ptr(), ids.data_ptr()),
            *(len(ids), width, like.num_in, table.pointers.shape[1], first, first + row, first + 2 * row),
            *(first + 3 * row, DTYPES[like.data.dtype], out.data_ptr(), self._threads),
        )
        return out if is_here else None
