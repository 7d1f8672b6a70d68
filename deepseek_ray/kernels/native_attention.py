"""Attention and the norms around it as one C++ operator, `dr_attention` of `cpp/layer.cpp`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_ray.kernels.base import AttentionWeights, Step
from deepseek_ray.kernels.native_layout import DTYPES, PackedMatrix


class _StepPlaces(ctypes.Structure):
    """`Step` of `cpp/layer.cpp`."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("cosine", "sine", "slots", "positions", "sequence_rows", "block_tables")
        ),
        *((name, ctypes.c_int64) for name in ("tokens", "half", "max_blocks", "block_size")),
        ("interleaved", ctypes.c_int32),
    )

    @classmethod
    def of(cls, step: Step) -> _StepPlaces:
        cos, sin, interleaved = step.rotation
        tensors = (cos, sin, step.slots, step.positions, step.sequence_rows, step.block_tables)
        assert all(tensor.is_contiguous() for tensor in tensors)
        pointers = [tensor.data_ptr() for tensor in tensors]
        return cls(*pointers, cos.shape[0], cos.shape[1], step.block_tables.shape[1], step.block_size, interleaved)


_VECTORS = ("input_norm", "q_norm", "kv_norm", "post_norm", "q_a_bias", "kv_a_bias", "o_bias")
_MATRICES = ("q_a", "q", "kv_a", "w_uk", "w_uv", "o")


class _AttentionPlaces(ctypes.Structure):
    """`AttentionWeights` of `cpp/layer.cpp`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _VECTORS),
        *((name, PackedMatrix) for name in _MATRICES),
        *(
            ("heads", ctypes.c_int64),
            ("eps", ctypes.c_float),
            ("latent_eps", ctypes.c_float),
            ("softmax_scale", ctypes.c_float),
        ),
    )


class NativeAttention:
    """An `AttentionOperator`."""

    def __init__(self, library: ctypes.CDLL, weights: AttentionWeights, threads: Callable[[], int]) -> None:
        vectors = [getattr(weights, name) for name in _VECTORS]
        assert all(vector is None or (vector.dtype == torch.float32 and vector.is_contiguous()) for vector in vectors)
        matrices = [getattr(weights, name) for name in _MATRICES]
        self._library = library
        self.weights = weights
        """Kept alive: C++ knows where they are."""
        self._threads = threads
        self._places = _AttentionPlaces(
            *(None if vector is None else vector.data_ptr() for vector in vectors),
            *(PackedMatrix() if matrix is None else PackedMatrix.of(matrix) for matrix in matrices),
            *(weights.w_uk.groups, weights.eps, weights.latent_eps, weights.softmax_scale),
        )

    def __call__(self, hidden: Tensor, step: Step, latents: Tensor) -> tuple[Tensor, Tensor]:
        tokens, width = hidden.shape
        rank, half = self.weights.w_uk.num_out, step.rotation.cos.shape[1]
        assert hidden.stride(1) == 1 and hidden.dtype == latents.dtype and width == self.weights.o.num_out
        assert latents.is_contiguous() and latents.shape[1] == rank + 2 * half and step.rotation.cos.shape[0] == tokens
        total, normed = torch.empty(tokens, width, dtype=hidden.dtype), torch.empty(tokens, width, dtype=hidden.dtype)
        self._library.dr_attention(
            *(ctypes.byref(self._places), ctypes.byref(_StepPlaces.of(step)), hidden.data_ptr(), hidden.stride(0)),
            *(DTYPES[hidden.dtype], latents.data_ptr(), total.data_ptr(), normed.data_ptr(), self._threads()),
        )
        return total, normed
