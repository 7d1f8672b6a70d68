"""(token, expert) pairs of an MoE layer on their way to expert shards and back: counted, divided, picked and put.

Between two layers' products these take much of an attention worker's own time, since each small operation of torch or
numpy finds its code and data out of the caches: one call of C++ replaces five to ten of them. `Pairs` is the slow
obvious one, and serves where nothing was built.

Letters: T tokens, K experts per token, P pairs, H hidden size, E experts of a layer.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Collection

import torch
from torch import Tensor

from deepseek_ray.expert_parallel.dispatch import LayerRoutes, ShardCall, plan_calls
from deepseek_ray.kernels.native import NativeKernels, load_library
from deepseek_ray.kernels.select import default_kernels

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Pairs:
    """With operators of torch and numpy."""

    def count(self, expert_ids: Tensor, num_experts: int) -> Tensor:
        """[E] int64: how often each expert is in expert_ids [T, K] int64."""
        return expert_ids.flatten().bincount(minlength=num_experts)

    def choose(self, routes: LayerRoutes, counts: Tensor, avoid: Collection[int], reading: int) -> Tensor:
        """See `LayerRoutes.choose`."""
        return routes.choose(counts, avoid, reading)

    def plan(self, expert_ids: Tensor, owners: Tensor, places: Tensor | None = None) -> list[ShardCall]:
        """See `plan_calls`."""
        return plan_calls(expert_ids, owners, places)

    def divide(
        self, expert_ids: Tensor, routes: LayerRoutes, avoid: Collection[int], reading: int
    ) -> tuple[Tensor, list[ShardCall]]:
        """The three at once: the counts, and a call for each shard that is chosen."""
        counts = self.count(expert_ids, len(routes.first))
        return counts, self.plan(expert_ids, self.choose(routes, counts, avoid, reading))

    def pick(self, x: Tensor, rows: Tensor) -> Tensor:
        """The rows `rows` [N] int64 of x [T, H] -> [N, H], contiguous."""
        return x[rows.to(x.device)].contiguous()

    def put(self, rows: Tensor, places: Tensor, to: Tensor) -> bool:
        """Rows [P, H] at `places` [P] int64 of `to`, in place; whether all of them are finite."""
        to[places.to(to.device)] = rows.to(to.device)
        return bool(rows.isfinite().all())


class NativePairs(Pairs):
    """The same in C++, for tensors on the CPU in float32 and bfloat16; others take the way of torch."""

    def __init__(self) -> None:
        library = load_library()
        long, pointer = ctypes.c_int64, ctypes.c_void_p
        self._choose = library.dr_choose_shards
        self._choose.argtypes = [pointer, long, *[pointer] * 4, long, long, pointer]
        self._choose.restype = None
        self._plan = library.dr_plan_calls
        self._plan.argtypes, self._plan.restype = [pointer, long, pointer, pointer, long, *[pointer] * 6], long
        self._divide = library.dr_divide_pairs
        self._divide.argtypes = [pointer, *[long] * 3, *[pointer] * 4, long, long, *[pointer] * 7]
        self._divide.restype = long
        self._pick = library.dr_pick_rows
        self._pick.argtypes, self._pick.restype = [pointer, long, pointer, long, long, ctypes.c_int32, pointer], None
        self._put = library.dr_put_rows
        self._put.argtypes, self._put.restype = [pointer, pointer, long, long, ctypes.c_int32, pointer], ctypes.c_int32

    def choose(self, routes: LayerRoutes, counts: Tensor, avoid: Collection[int], reading: int) -> Tensor:
        if routes.is_given:
            return routes.first
        chosen = torch.empty_like(routes.first)
        avoided = (ctypes.c_int64 * len(avoid))(*avoid)
        pointers = (part.data_ptr() for part in (routes.first, routes.starts, routes.shards))
        self._choose(counts.data_ptr(), len(counts), *pointers, avoided, len(avoided), reading, chosen.data_ptr())
        return chosen

    def plan(self, expert_ids: Tensor, owners: Tensor, places: Tensor | None = None) -> list[ShardCall]:
        assert expert_ids.is_contiguous() and (places is None or places.is_contiguous())
        room = _CallRoom(expert_ids.numel() if places is None else places.numel())
        wanted = None if places is None else places.data_ptr()
        pointers = expert_ids.data_ptr(), expert_ids.shape[1], owners.data_ptr(), wanted
        return room.calls(self._plan(*pointers, room.num_pairs, *room.pointers))

    def divide(
        self, expert_ids: Tensor, routes: LayerRoutes, avoid: Collection[int], reading: int
    ) -> tuple[Tensor, list[ShardCall]]:
        assert expert_ids.is_contiguous()
        room, counts = _CallRoom(expert_ids.numel()), torch.empty(len(routes.first), dtype=torch.int64)
        num_calls = self._divide(
            *(expert_ids.data_ptr(), expert_ids.shape[1], room.num_pairs, len(counts), routes.first.data_ptr()),
            *(routes.starts.data_ptr(), None if routes.is_given else routes.shards.data_ptr()),
            *((ctypes.c_int64 * len(avoid))(*avoid), len(avoid), reading, counts.data_ptr(), *room.pointers),
        )
        return counts, room.calls(num_calls)

    def pick(self, x: Tensor, rows: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype not in _DTYPES or x.stride(1) != 1:
            return super().pick(x, rows)
        out = torch.empty(len(rows), x.shape[1], dtype=x.dtype)
        self._pick(x.data_ptr(), x.stride(0), rows.data_ptr(), len(rows), x.shape[1], _DTYPES[x.dtype], out.data_ptr())
        return out

    def put(self, rows: Tensor, places: Tensor, to: Tensor) -> bool:
        on_cpu = rows.device.type == to.device.type == "cpu"
        is_plain = rows.is_contiguous() and to.is_contiguous() and rows.dtype == to.dtype
        if not on_cpu or not is_plain or rows.dtype not in _DTYPES:
            return super().put(rows, places, to)
        count, width = rows.shape
        dtype = _DTYPES[rows.dtype]
        return bool(self._put(rows.data_ptr(), places.data_ptr(), count, width, dtype, to.data_ptr()))


class _CallRoom:
    """Where C++ leaves the calls of `num_pairs` pairs, see `dr_plan_calls`."""

    def __init__(self, num_pairs: int) -> None:
        self.num_pairs = num_pairs
        self._longs = torch.empty(5, num_pairs, dtype=torch.int64)
        self._indices = torch.empty(2 * num_pairs, dtype=torch.int32)
        first, row = self._longs.data_ptr(), self._longs.stride(0) * self._longs.element_size()
        self.pointers = *(first + row * index for index in range(5)), self._indices.data_ptr()

    def calls(self, count: int) -> list[ShardCall]:
        """As views of the room."""
        calls, start = [], 0
        for shard, rows, pairs in self._longs[:3, :count].T.tolist():
            end, middle = start + pairs, 2 * start + pairs
            indices = self._indices[2 * start : middle], self._indices[middle : 2 * end]
            calls.append(ShardCall(shard, self._longs[3, start : start + rows], *indices, self._longs[4, start:end]))
            start = end
        return calls


@functools.cache
def default_pairs() -> Pairs:
    """In C++ where the kernels are."""
    return NativePairs() if isinstance(default_kernels(), NativeKernels) else Pairs()
