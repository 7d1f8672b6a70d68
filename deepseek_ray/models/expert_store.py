"""Routed experts of one process, packed for inference: all of them beside a local model, or those of one shard."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from deepseek_ray.kernels.base import Kernels
from deepseek_ray.kernels.quantize import Quantization
from deepseek_ray.kernels.select import default_kernels
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.mapped_memory import bring_in
from deepseek_ray.models.packed_files import PackedExpert, PackedFiles
from deepseek_ray.nn.moe import ExpertBackend

_MOST_BEHIND = 2
"""Experts that are packed and not written yet: each is in memory twice."""


class _Layer:
    """Experts of a layer that are here; never changed, so whoever computes keeps those that it began with."""

    def __init__(self, experts: dict[int, PackedExpert], kernels: Kernels, num_experts: int) -> None:
        self.experts = experts
        self._kernels = kernels
        self._num_experts = num_experts

    @functools.cached_property
    def table(self) -> Any | None:
        """Made by the first call: experts that come one by one make none in between."""
        return self._kernels.expert_table(self.experts, self._num_experts)


class ExpertStore:
    """Packed weights of some experts, and the pure function of (weights, activations) that they are.

    `held` maps a layer to the logical experts kept for it; only their tensors are read from the checkpoint. Experts
    come and go one at a time (`load`, `drop`, `reload`) while other threads call `run`: a call computes with those that
    were there when it began.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        held: Mapping[int, Sequence[int]],
        dtype: torch.dtype,
        kernels: Kernels | None = None,
        on_layer: Callable[[int], None] | None = None,
        shared_files: bool = False,
        device: torch.device | str = "cpu",
        quantization: Quantization | None = None,
    ) -> None:
        """`shared_files`: packed experts are kept in files of this node and mapped from there, see `PackedFiles`.

        `kernels` must be able to compute on `device`. `quantization`: weights of fewer bits than `dtype`.
        """
        self._quantization: Quantization | None = quantization
        self.kernels = kernels or default_kernels()
        self._reader = reader
        self._dtype = dtype
        self.device = torch.device(device)
        self._layers: dict[int, _Layer] = {}
        self._ahead: dict[tuple[int, int], PackedExpert] = {}
        self._changing = threading.Lock()
        layout = self.kernels.layout
        self._files = PackedFiles(reader, layout, dtype, quantization) if shared_files and layout else None
        for layer, experts in held.items():
            for _ in self.load_all((layer, expert) for expert in experts):
                pass
            if on_layer:
                on_layer(layer)

    @property
    def held(self) -> dict[int, list[int]]:
        """layer -> logical experts that are here, in order."""
        return {layer: sorted(here.experts) for layer, here in list(self._layers.items()) if here.experts}

    def holds(self, layer: int, expert: int) -> bool:
        here = self._layers.get(layer)
        return here is not None and expert in here.experts

    def load(self, layer: int, expert: int) -> None:
        """Read and pack one expert; harmless when it is here. CheckpointError when its tensors are not usable."""
        if not self.holds(layer, expert):
            self._read(layer, expert)

    def load_all(self, wanted: Iterable[tuple[int, int]]) -> Generator[None]:
        """`load` of (layer, expert) after (layer, expert), each time it is advanced; at the end, or when it is closed,
        all that were packed are here. One is written to its file while the next is packed."""
        with ThreadPoolExecutor(1, "write experts") as writing:
            behind: deque[Future[None]] = deque()
            for layer, expert in wanted:
                if self.holds(layer, expert):
                    pass
                elif (mapped := self._found(layer, expert)) is not None:
                    self._put(layer, expert, mapped)
                else:
                    behind.append(writing.submit(self._keep, layer, expert, self._pack(layer, expert)))
                while len(behind) > _MOST_BEHIND:
                    behind.popleft().result()
                yield
            for written in behind:
                written.result()

    def map_ahead(self, most_bytes: float) -> None:
        """Map the packed files that others have written for experts that are not here, so that `load` finds them mapped
        and in memory; up to `most_bytes`. Called again, it takes those that were written meanwhile."""
        if self._files is None:
            return
        room = most_bytes - sum(packed.nbytes for packed in self._ahead.values())
        for key in sorted(self._files.written() - self._ahead.keys()):
            if self.holds(*key) or (packed := self._mapped(*key)) is None:
                continue
            if (room := room - packed.nbytes) < 0:
                return
            self._ahead[key] = packed

    def forget_ahead(self) -> None:
        """Unmap what was mapped ahead and is not here."""
        self._ahead = {}

    def reload(self, layer: int, expert: int) -> None:
        """Read and pack one expert anew, if it is here: its weights in memory are not to be trusted."""
        if self.holds(layer, expert):
            if self._files is not None:
                self._files.forget(layer, expert)
                self._ahead.pop((layer, expert), None)
            self._read(layer, expert)

    def drop(self, layer: int, expert: int) -> None:
        """Forget one expert; its memory is free when the last call that uses it has ended."""
        with self._changing:
            here = self._layers[layer].experts
            self._hold(layer, {id: packed for id, packed in here.items() if id != expert})

    def _read(self, layer: int, expert: int) -> None:
        if (mapped := self._found(layer, expert)) is not None:
            self._put(layer, expert, mapped)
        else:
            self._keep(layer, expert, self._pack(layer, expert))

    def _found(self, layer: int, expert: int) -> PackedExpert | None:
        """From its file, if somebody has written it."""
        if self._files is None:
            return None
        return self._ahead.pop((layer, expert), None) or self._mapped(layer, expert)

    def _keep(self, layer: int, expert: int, packed: PackedExpert) -> None:
        """Write it to its file and hold what that maps, or the packed one itself where there are no files."""
        if self._files is not None:
            self._files.write(layer, expert, packed)
            packed = self._mapped(layer, expert) or packed
        self._put(layer, expert, packed)

    def _mapped(self, layer: int, expert: int) -> PackedExpert | None:
        """In memory, too: read one page at a time by the first calls, it would take many times as long."""
        assert self._files is not None
        if (packed := self._files.read(layer, expert)) is not None:
            for part in packed.parts:
                bring_in(part)
        return packed

    def _pack(self, layer: int, expert: int) -> PackedExpert:
        names = [f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
        gate, up, down = weights = [self._reader.tensor(name, self._dtype) for name in names]
        gate_up = self.kernels.pack([torch.cat([gate, up])], self._quantization)
        packed = PackedExpert(gate_up, self.kernels.pack([down], self._quantization))
        for name, weight in zip(names, weights, strict=True):
            self._reader.let_go(name, weight)
        return packed

    def _put(self, layer: int, expert: int, packed: PackedExpert) -> None:
        with self._changing:
            here = self._layers[layer].experts if layer in self._layers else {}
            self._hold(layer, {**here, expert: packed.to(self.device)})

    def _hold(self, layer: int, experts: dict[int, PackedExpert]) -> None:
        self._layers[layer] = _Layer(experts, self.kernels, self._reader.config.n_routed_experts)

    def weights_of(self, layer: int, expert: int) -> Tensor:
        """The packed down projection of one expert, a view: whoever writes to it changes the expert."""
        return self._layers[layer].experts[expert].down.data

    def table(self, layer: int) -> Any | None:
        """See `Kernels.expert_table`; None as well when no expert of the layer is here."""
        here = self._layers.get(layer)
        return None if here is None else here.table

    def run(self, layer: int, hidden: Tensor, token_rows: Tensor, expert_ids: Tensor) -> Tensor | None:
        """One row per (token, expert) pair, in the order of the pairs, unweighted; None when an expert is not here.

        hidden [tokens, hidden_size]; token_rows [pairs] int64, which row of `hidden`; expert_ids [pairs] int64
        `-> [pairs, hidden_size]` in hidden's dtype, on the store's device, wherever the input was.
        """
        hidden, token_rows, expert_ids = (part.to(self.device) for part in (hidden, token_rows, expert_ids))
        if not len(expert_ids):
            return hidden.new_empty(0, hidden.shape[1])
        here = self._layers.get(layer)
        if here is None:
            return None
        if (table := here.table) is not None:
            return self.kernels.run_experts(table, hidden, token_rows, expert_ids)
        return self._run_in_groups(here.experts, hidden, token_rows, expert_ids)

    def _run_in_groups(
        self, here: Mapping[int, PackedExpert], hidden: Tensor, token_rows: Tensor, expert_ids: Tensor
    ) -> Tensor | None:
        order = expert_ids.argsort(stable=True)
        present, counts = expert_ids[order].unique_consecutive(return_counts=True)
        experts = [here[expert] for expert in present.tolist() if expert in here]
        if len(experts) < len(present):
            return None
        rows = counts.tolist()
        gate_up = self.kernels.grouped_linear(hidden[token_rows[order]], [own.gate_up for own in experts], rows)
        down = self.kernels.grouped_linear(self.kernels.silu_mul(gate_up), [own.down for own in experts], rows)
        out = torch.empty_like(down)
        out[order] = down
        return out


class LocalExperts(ExpertBackend):
    """All experts in this process: the plain version that the remote one is compared with."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store
        self.device = store.device

    def table(self, layer: int, kernels: Kernels) -> Any | None:
        return self._store.table(layer) if self._store.kernels is kernels else None

    def dispatch(self, layer: int, hidden: Tensor, expert_ids: Tensor, first_row: int = 0) -> Tensor:
        tokens, top_k = expert_ids.shape
        token_rows = torch.arange(tokens, device=self.device).repeat_interleave(top_k)
        rows = self._store.run(layer, hidden, token_rows, expert_ids.flatten())
        assert rows is not None, f"the local store lacks experts of layer {layer}"
        return rows.view(tokens, top_k, hidden.shape[1])

    def combine(self, ticket: Tensor) -> Tensor:
        return ticket
