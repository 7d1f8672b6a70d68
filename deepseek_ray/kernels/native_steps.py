"""The C++ operators that are a large part of a decoder layer each: a step of few tokens is bound by their number.

Part of `NativeKernels`. Each gives the bits of the operators that it is composed of.
"""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deepseek_ray.kernels.base import (
    AttentionOperator,
    AttentionWeights,
    Choice,
    ExpertWeights,
    Kernels,
    MoeOperator,
    MoeWeights,
    PackedWeight,
    ScoreKind,
)
from deepseek_ray.kernels.native_attention import NativeAttention
from deepseek_ray.kernels.native_layout import DTYPES, matrix_of
from deepseek_ray.kernels.native_moe import ExpertTable, NativeMoe

_LONG, _POINTER, _INT, _FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
_SIGNATURES = {
    "dr_attention": (_POINTER, _POINTER, _POINTER, _LONG, _INT, _POINTER, _POINTER, _POINTER, _INT),
    "dr_moe": (_POINTER, _POINTER, _POINTER, _POINTER, _INT, _LONG, _POINTER, _INT),
    "dr_mlp": (_POINTER, _LONG, _INT, _LONG, _POINTER, _POINTER, _POINTER, _INT),
    "dr_route": (
        *(_POINTER, _LONG, _INT, _LONG, _POINTER, _INT, _POINTER, _LONG, _LONG, _LONG, _INT, _INT, _FLOAT, _POINTER),
        *(_POINTER, _INT),
    ),
    "dr_combine_slots": (_POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, _POINTER, _LONG, _POINTER, _INT),
    "dr_experts": (_POINTER, _LONG, _INT, _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _INT),
}


def declare(library: ctypes.CDLL) -> None:
    """Say what the functions take, once: plain numbers then go in, and a pointer keeps its upper half."""
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = None
    library.dr_experts.restype = library.dr_moe.restype = _INT


class NativeSteps(Kernels):
    """See the module."""

    _library: ctypes.CDLL

    @property
    @abstractmethod
    def _threads(self) -> int: ...

    def attention(self, weights: AttentionWeights) -> AttentionOperator:
        return NativeAttention(self._library, weights, lambda: self._threads)

    def moe(self, weights: MoeWeights) -> MoeOperator:
        return NativeMoe(self._library, weights, lambda: self._threads)

    def mlp(self, x: Tensor, gate_up: PackedWeight, down: PackedWeight) -> Tensor:
        assert x.stride(1) == 1 and x.shape[1] == gate_up.num_in and gate_up.num_out == 2 * down.num_in
        out = torch.empty(x.shape[0], down.num_out, dtype=x.dtype)
        self._library.dr_mlp(
            *(x.data_ptr(), x.stride(0), DTYPES[x.dtype], x.shape[0]),
            *(matrix_of(gate_up), matrix_of(down), out.data_ptr(), self._threads),
        )
        return out

    def route(
        self, x: Tensor, gate: PackedWeight, kind: ScoreKind, bias: Tensor | None, choice: Choice
    ) -> tuple[Tensor, Tensor]:
        assert x.stride(1) == 1 and x.shape[1] == gate.num_in and gate.data.dtype == torch.float32
        tokens = x.shape[0]
        ids, weights = torch.empty(tokens, choice.top_k, dtype=torch.int64), torch.empty(tokens, choice.top_k)
        self._library.dr_route(
            *(x.data_ptr(), x.stride(0), DTYPES[x.dtype], tokens, matrix_of(gate), 0 if kind == "sigmoid" else 1),
            *(None if bias is None else bias.data_ptr(), *choice, ids.data_ptr(), weights.data_ptr(), self._threads),
        )
        return ids, weights

    def combine_slots(self, rows: Tensor, weights: Tensor, more: Sequence[Tensor] = ()) -> Tensor | None:
        if not all(part.is_contiguous() for part in (rows, weights, *more)):
            return None
        tokens, slots, width = rows.shape
        assert all(part.shape == (tokens, width) and part.dtype == rows.dtype for part in more)
        out = torch.empty(tokens, width, dtype=rows.dtype)
        self._library.dr_combine_slots(
            *(rows.data_ptr(), weights.data_ptr(), tokens, slots, width, DTYPES[rows.dtype]),
            *((_POINTER * len(more))(*(part.data_ptr() for part in more)), len(more), out.data_ptr(), self._threads),
        )
        return out

    def expert_table(self, experts: Mapping[int, ExpertWeights], num_experts: int) -> ExpertTable | None:
        if not experts:
            return None
        return ExpertTable(experts, num_experts)

    def run_experts(self, table: ExpertTable, hidden: Tensor, token_rows: Tensor, ids: Tensor) -> Tensor | None:
        width, like = hidden.shape[1], table.like
        assert width == like.num_out and hidden.stride(1) == 1 and token_rows.is_contiguous() and ids.is_contiguous()
        out = torch.empty(len(ids), width, dtype=hidden.dtype)
        is_here = self._library.dr_experts(
            *(hidden.data_ptr(), hidden.stride(0), DTYPES[hidden.dtype], token_rows.data_ptr(), ids.data_ptr()),
            *(len(ids), table.reference, out.data_ptr(), self._threads),
        )
        return out if is_here else None
