"""A feed-forward network computed in the time that the cores have left, see `cpp/aside.cpp`."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_ray.kernels.base import PackedWeight
from deepseek_ray.kernels.native_layout import DTYPES, matrix_of

_LONG, _POINTER, _INT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32


class _Work(NamedTuple):
    """What was begun."""

    handle: int
    weights: tuple[PackedWeight, PackedWeight]
    finish: weakref.ref[Callable[[], Tensor]]


_all: list[_Work] = []
"""That the thread may still be at, whoever has forgotten it: there is one thread for the whole process."""


_changing = threading.Lock()


class Aside:
    """Begins such work."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.dr_aside_begin.restype = _POINTER
        library.dr_aside_begin.argtypes = (_POINTER, _LONG, _INT, _LONG, _POINTER, _POINTER)
        library.dr_aside_finish.argtypes = (_POINTER, _POINTER)
        library.dr_aside_finish.restype = library.dr_aside_free.restype = None
        library.dr_aside_is_left.argtypes = library.dr_aside_free.argtypes = (_POINTER,)
        self._library = library

    def begin(self, x: Tensor, gate_up: PackedWeight, down: PackedWeight, threads: int) -> Callable[[], Tensor]:
        """`down(silu_mul(gate_up(x)))` of x [T, K], not empty; the result does what was not done by then."""
        assert x.stride(1) == 1 and gate_up.num_out == 2 * down.num_in and gate_up.num_in == x.shape[1]
        handle = self._library.dr_aside_begin(
            *(x.data_ptr(), x.stride(0), DTYPES[x.dtype], x.shape[0]),
            *(matrix_of(gate_up), matrix_of(down)),
        )
        out = torch.empty(x.shape[0], down.num_out, dtype=x.dtype)

        def finish() -> Tensor:
            self._library.dr_aside_finish(handle, out.data_ptr(), threads)
            return out

        with _changing:
            self._free()
            _all.append(_Work(handle, (gate_up, down), weakref.ref(finish)))
        return finish

    def _free(self) -> None:
        """Those that neither the thread nor anybody else will come back to."""
        for work in list(_all):
            if work.finish() is None and self.is_left(work):
                self._library.dr_aside_free(work.handle)
                _all.remove(work)

    def is_left(self, work: _Work) -> bool:
        """Whether the thread is done with it."""
        return bool(self._library.dr_aside_is_left(work.handle))
