"""What the C++ operators are told about tensors: types, and where packed weights are."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from deepseek_ray.kernels.base import PackedWeight

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.int32: 3}
LANES = 16
"""Outputs in a block of a packed weight."""


class PackedMatrix(ctypes.Structure):
    """Where a packed weight is: `PackedMatrix` of `cpp/operators.h`. It does not keep the weight alive."""

    _fields_ = (
        *(("data", ctypes.c_void_p), ("scales", ctypes.c_void_p)),
        *(
            ("data_bytes", ctypes.c_int64),
            ("scale_bytes", ctypes.c_int64),
            ("num_out", ctypes.c_int64),
            ("num_in", ctypes.c_int64),
            ("dtype", ctypes.c_int32),
        ),
    )

    @classmethod
    def of(cls, weight: PackedWeight) -> PackedMatrix:
        blocks = -(-weight.num_out // LANES) * weight.groups
        data, scales = weight.data, weight.scales
        return cls(
            data.data_ptr(),
            None if scales is None else scales.data_ptr(),
            data.nbytes // blocks,
            0 if scales is None else scales.nbytes // blocks,
            weight.num_out,
            weight.num_in,
            DTYPES[data.dtype],
        )


def matrix_of(weight: PackedWeight) -> Any:
    """A reference to its `PackedMatrix`, made once: weights stay where they are."""
    if weight.reference is None:
        weight.reference = ctypes.byref(PackedMatrix.of(weight))
    return weight.reference
