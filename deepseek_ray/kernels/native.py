"""The C++ operators of `cpp/`, built at first use and called through ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseek_ray.kernels import build
from deepseek_ray.kernels.aside import Aside
from deepseek_ray.kernels.base import PackedWeight, Place, ScoreKind
from deepseek_ray.kernels.native_layout import DTYPES, LANES
from deepseek_ray.kernels.native_steps import NativeSteps, declare
from deepseek_ray.kernels.quantize import INT4_GROUP, Quantization


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled operators of serving; raises KernelBuildError."""
    library = build.library("rows", build.SOURCES, build.FLAGS)
    library.dr_check()
    declare(library)
    return library


class NativeKernels(NativeSteps):
    """Row-invariant C++ on the CPU. Packed weights are as `cpp/linear.cpp` says."""

    name = "native C++"
    layout = f"blocks of {LANES} outputs, inputs in units of 4 bytes, bytes from 0"

    def __init__(self) -> None:
        self._library = load_library()
        self._own = threading.local()
        self._aside = Aside(self._library)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """torch computes with one thread meanwhile: its helpers, once woken, spin for milliseconds on the cores that
        the pool of these operators needs."""
        self._own.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self._own.threads)
            del self._own.threads

    @property
    def _threads(self) -> int:
        return getattr(self._own, "threads", None) or torch.get_num_threads()

    def pack(self, weights: Sequence[Tensor], quantization: Quantization | None = None) -> PackedWeight:
        if quantization is not None:
            return self._pack_integers(weights, quantization)
        num_out, num_in = weights[0].shape
        dtype = weights[0].dtype
        blocks, inputs = -(-num_out // LANES), -(-num_in * dtype.itemsize // 4) * 4 // dtype.itemsize
        data = torch.empty(len(weights), blocks * inputs * LANES, dtype=dtype)
        for packed, weight in zip(data, weights, strict=True):
            assert weight.shape == (num_out, num_in) and weight.stride(1) == 1, (weight.shape, weight.stride())
            self._library.dr_pack(
                ctypes.c_void_p(weight.data_ptr()),
                ctypes.c_int64(weight.stride(0)),
                DTYPES[dtype],
                ctypes.c_int64(num_out),
                ctypes.c_int64(num_in),
                ctypes.c_void_p(packed.data_ptr()),
                self._threads,
            )
        return PackedWeight(data, len(weights), num_out, num_in)

    def _pack_integers(self, weights: Sequence[Tensor], quantization: Quantization) -> PackedWeight:
        num_out, num_in = weights[0].shape
        count, blocks, groups = len(weights), -(-num_out // LANES), -(-num_in // INT4_GROUP)
        if quantization == "int8":
            pack = self._library.dr_pack_int8
            data = torch.empty(count, blocks * groups * 32 * LANES, dtype=torch.int8)
            scales = torch.empty(count, blocks * LANES)
        else:
            pack = self._library.dr_pack_int4
            data = torch.empty(count, blocks * groups * (INT4_GROUP // 8) * LANES, dtype=torch.int32)
            scales = torch.empty(count, blocks * groups * LANES, dtype=torch.bfloat16)
        for packed, own_scales, weight in zip(data, scales, weights, strict=True):
            assert weight.shape == (num_out, num_in) and weight.stride(1) == 1, (weight.shape, weight.stride())
            pack(
                ctypes.c_void_p(weight.data_ptr()),
                ctypes.c_int64(weight.stride(0)),
                DTYPES[weight.dtype],
                ctypes.c_int64(num_out),
                ctypes.c_int64(num_in),
                ctypes.c_void_p(packed.data_ptr()),
                ctypes.c_void_p(own_scales.data_ptr()),
                self._threads,
            )
        return PackedWeight(data, count, num_out, num_in, scales)

    def linear(self, x: Tensor, weight: PackedWeight, out_dtype: torch.dtype | None = None) -> Tensor:
        out = torch.empty(x.shape[0], weight.num_out, dtype=out_dtype or x.dtype)
        scales = [] if weight.scales is None else [weight.scales.data_ptr()]
        self._grouped([x.shape[0]], [x.data_ptr()], x, weight, [weight.data.data_ptr()], scales, [out.data_ptr()], out)
        return out

    def per_head_linear(self, x: Tensor, weight: PackedWeight, out_dtype: torch.dtype | None = None) -> Tensor:
        tokens, heads, _ = x.shape
        out = torch.empty(tokens, heads, weight.num_out, dtype=out_dtype or x.dtype)
        x_step, out_step = x.stride(1) * x.element_size(), out.stride(1) * out.element_size()
        self._grouped(
            [tokens] * heads,
            [x.data_ptr() + head * x_step for head in range(heads)],
            x,
            weight,
            [part.data_ptr() for part in weight.data],
            [] if weight.scales is None else [part.data_ptr() for part in weight.scales],
            [out.data_ptr() + head * out_step for head in range(heads)],
            out,
        )
        return out

    def grouped_linear(self, x: Tensor, weights: Sequence[PackedWeight], rows: Sequence[int]) -> Tensor:
        out = torch.empty(x.shape[0], weights[0].num_out, dtype=x.dtype)
        x_row, out_row = x.stride(0) * x.element_size(), out.stride(0) * out.element_size()
        starts = [0]
        for count in rows:
            starts.append(starts[-1] + count)
        assert starts[-1] == x.shape[0], f"groups hold {starts[-1]} rows, the input has {x.shape[0]}"
        self._grouped(
            rows,
            [x.data_ptr() + start * x_row for start in starts[:-1]],
            x,
            weights[0],
            [weight.data.data_ptr() for weight in weights],
            [weight.scales.data_ptr() for weight in weights if weight.scales is not None],
            [out.data_ptr() + start * out_row for start in starts[:-1]],
            out,
        )
        return out

    def _grouped(
        self,
        rows: Sequence[int],
        x_pointers: Sequence[int],
        x: Tensor,
        like: PackedWeight,
        weight_pointers: Sequence[int],
        scale_pointers: Sequence[int],
        out_pointers: Sequence[int],
        out: Tensor,
    ) -> None:
        """One product per entry of `rows`; all weights have the shape and dtype of `like`."""
        assert x.shape[-1] == like.num_in and x.stride(-1) == 1, (x.shape, x.stride(), like.num_in)
        count = len(rows)
        scales = (ctypes.c_void_p * count)(*scale_pointers) if scale_pointers else None
        self._library.dr_grouped_linear(
            ctypes.c_int64(count),
            (ctypes.c_int64 * count)(*rows),
            (ctypes.c_void_p * count)(*x_pointers),
            ctypes.c_int64(x.stride(0)),
            DTYPES[x.dtype],
            (ctypes.c_void_p * count)(*weight_pointers),
            DTYPES[like.data.dtype],
            scales,
            (ctypes.c_void_p * count)(*out_pointers),
            ctypes.c_int64(out.stride(0)),
            DTYPES[out.dtype],
            ctypes.c_int64(like.num_out),
            ctypes.c_int64(like.num_in),
            self._threads,
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        assert x.stride(1) == 1 and weight.dtype == torch.float32
        out = torch.empty(x.shape, dtype=x.dtype)
        self._library.dr_rms_norm(
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_int64(x.stride(0)),
            ctypes.c_void_p(weight.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_int64(out.stride(0)),
            DTYPES[x.dtype],
            ctypes.c_int64(x.shape[0]),
            ctypes.c_int64(x.shape[1]),
            ctypes.c_float(eps),
            self._threads,
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        assert gate_up.is_contiguous()
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, width, dtype=gate_up.dtype)
        self._library.dr_silu_mul(
            ctypes.c_void_p(gate_up.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            DTYPES[gate_up.dtype],
            ctypes.c_int64(rows),
            ctypes.c_int64(width),
            self._threads,
        )
        return out

    def mlp_aside(self, x: Tensor, gate_up: PackedWeight, down: PackedWeight) -> Callable[[], Tensor] | None:
        return self._aside.begin(x, gate_up, down, self._threads)

    def scores(self, logits: Tensor, kind: ScoreKind) -> Tensor:
        assert logits.dtype == torch.float32
        out = logits.contiguous().clone()
        self._library.dr_scores(
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_int64(out.shape[0]),
            ctypes.c_int64(out.shape[1]),
            0 if kind == "sigmoid" else 1,
        )
        return out

    def draw(self, logits: NDArray[np.float32], rows: Sequence[int], places: Sequence[Place]) -> list[int]:
        assert logits.dtype == np.float32 and logits.flags.c_contiguous
        count = len(places)
        temperatures, seeds, positions = zip(*places, strict=True) if places else ((), (), ())
        tokens = (ctypes.c_int64 * count)()
        self._library.dr_draw(
            ctypes.c_void_p(logits.ctypes.data),
            ctypes.c_int64(logits.shape[1]),
            (ctypes.c_int64 * count)(*rows),
            (ctypes.c_float * count)(*temperatures),
            (ctypes.c_uint64 * count)(*seeds),
            (ctypes.c_int64 * count)(*positions),
            ctypes.c_int64(count),
            tokens,
            self._threads,
        )
        return list(tokens)

    def latent_attention(
        self,
        query: Tensor,
        cache: Tensor,
        block_tables: Tensor,
        sequence_rows: Tensor,
        positions: Tensor,
        block_size: int,
        value_width: int,
        scale: float,
    ) -> Tensor:
        assert query.is_contiguous() and cache.is_contiguous() and block_tables.is_contiguous()
        assert query.dtype == cache.dtype, (query.dtype, cache.dtype)
        tokens, heads, width = query.shape
        out = torch.empty(tokens, heads, value_width, dtype=query.dtype)
        self._library.dr_latent_attention(
            ctypes.c_void_p(query.data_ptr()),
            ctypes.c_void_p(cache.data_ptr()),
            DTYPES[cache.dtype],
            ctypes.c_void_p(block_tables.data_ptr()),
            ctypes.c_int64(block_tables.shape[1]),
            ctypes.c_int64(block_size),
            ctypes.c_void_p(sequence_rows.data_ptr()),
            ctypes.c_void_p(positions.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_int64(tokens),
            ctypes.c_int64(heads),
            ctypes.c_int64(width),
            ctypes.c_int64(value_width),
            ctypes.c_float(scale),
            self._threads,
        )
        return out
