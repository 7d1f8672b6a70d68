"""A mixture of experts as one C++ operator, `dr_moe` of `cpp/layer.cpp`, and where it finds the experts' weights."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from deepseek_ray.kernels.base import ExpertWeights, MoeWeights
from deepseek_ray.kernels.native_layout import DTYPES, PackedMatrix


class _TablePlaces(ctypes.Structure):
    """`ExpertTable` of `cpp/operators.h`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate_up", "gate_up_scales", "down", "down_scales")),
        *((name, ctypes.c_int64) for name in ("num_experts", "hidden", "width")),
        ("dtype", ctypes.c_int32),
    )


class ExpertTable:
    """Where the weights of those of a layer's experts are that are here; there is one at least."""

    def __init__(self, experts: Mapping[int, ExpertWeights], num_experts: int) -> None:
        self._pointers = np.zeros((4, num_experts), dtype=np.uint64)
        for id, own in experts.items():
            for row, weight in ((0, own.gate_up), (2, own.down)):
                self._pointers[row, id] = weight.data.data_ptr()
                self._pointers[row + 1, id] = 0 if weight.scales is None else weight.scales.data_ptr()
        self.like = next(iter(experts.values())).down
        """The down projection of one of them."""
        rows = (self._pointers[row].ctypes.data for row in range(4))
        dtype = DTYPES[self.like.data.dtype]
        self.reference = ctypes.byref(_TablePlaces(*rows, num_experts, self.like.num_out, self.like.num_in, dtype))


class _MoePlaces(ctypes.Structure):
    """`MoeWeights` of `cpp/layer.cpp`."""

    _fields_ = (
        *((name, PackedMatrix) for name in ("gate", "shared_gate_up", "shared_down")),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("top_k", "num_groups", "best_groups")),
        *((name, ctypes.c_int32) for name in ("two_best", "is_normalised", "kind")),
        ("factor", ctypes.c_float),
    )


class NativeMoe:
    """A `MoeOperator`."""

    def __init__(self, library: ctypes.CDLL, weights: MoeWeights, threads: Callable[[], int]) -> None:
        assert weights.gate.data.dtype == torch.float32
        shared = [PackedMatrix.of(weight) for weight in weights.shared] if weights.shared else [PackedMatrix()] * 2
        choice = weights.choice
        self._library = library
        self.weights = weights
        """Kept alive: C++ knows where they are."""
        self._threads = threads
        self._places = _MoePlaces(
            *(PackedMatrix.of(weights.gate), *shared, None if weights.bias is None else weights.bias.data_ptr()),
            *(choice.top_k, choice.num_groups, choice.best_groups, choice.two_best, choice.is_normalised),
            *(0 if weights.kind == "sigmoid" else 1, choice.factor),
        )

    def __call__(self, hidden: Tensor, normed: Tensor, table: ExpertTable) -> Tensor | None:
        assert hidden.is_contiguous() and normed.is_contiguous() and hidden.shape == normed.shape
        assert hidden.dtype == normed.dtype and hidden.shape[1] == table.like.num_out
        out = torch.empty_like(hidden)
        is_here = self._library.dr_moe(
            *(ctypes.byref(self._places), table.reference, hidden.data_ptr(), normed.data_ptr()),
            *(DTYPES[hidden.dtype], hidden.shape[0], out.data_ptr(), self._threads()),
        )
        return out if is_here else None
