"""Routed experts of one process, packed for inference: all of them beside a local model, or those of one shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from deepseek_ray.kernels.base import Kernels, PackedWeight
from deepseek_ray.kernels.select import default_kernels
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.nn.moe import ExpertBackend


class ExpertStore:
    """Packed weights of some experts, and the pure function of (weights, activations) that they are.

    `held` maps a layer to the logical experts kept for it; only their tensors are read from the checkpoint.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        held: Mapping[int, Sequence[int]],
        dtype: torch.dtype,
        kernels: Kernels | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        self.kernels = kernels or default_kernels()
        self._layers: dict[int, _LayerExperts] = {}
        for layer, experts in held.items():
            if experts:
                self._layers[layer] = _LayerExperts(reader, layer, experts, dtype, self.kernels)
            if on_layer:
                on_layer(layer)

    def holds(self, layer: int, expert: int) -> bool:
        return layer in self._layers and expert in self._layers[layer].place

    def weights_of(self, layer: int, expert: int) -> Tensor:
        """The packed down projection of one expert, a view: whoever writes to it changes the expert."""
        experts = self._layers[layer]
        return experts.down.data[experts.place[expert]]

    def run(self, layer: int, hidden: Tensor, token_rows: Tensor, expert_ids: Tensor) -> Tensor:
        """One row per (token, expert) pair, in the order of the pairs, unweighted.

        hidden [tokens, hidden_size]; token_rows [pairs] int64, which row of `hidden`; expert_ids [pairs] int64
        `-> [pairs, hidden_size]` in hidden's dtype.
        """
        if not len(expert_ids):
            return hidden.new_empty(0, hidden.shape[1])
        experts = self._layers[layer]
        order = expert_ids.argsort(stable=True)
        present, counts = expert_ids[order].unique_consecutive(return_counts=True)
        groups = [experts.place[expert] for expert in present.tolist()]
        rows = counts.tolist()
        gate_up = self.kernels.grouped_linear(hidden[token_rows[order]], experts.gate_up, groups, rows)
        down = self.kernels.grouped_linear(self.kernels.silu_mul(gate_up), experts.down, groups, rows)
        out = torch.empty_like(down)
        out[order] = down
        return out


class _LayerExperts:
    """`place[logical expert]` is the group of the packed weights that holds it."""

    def __init__(
        self, reader: CheckpointReader, layer: int, experts: Sequence[int], dtype: torch.dtype, kernels: Kernels
    ) -> None:
        self.place = {expert: place for place, expert in enumerate(experts)}
        gate_up, down = [], []
        for expert in experts:
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            gate, up, back = (reader.tensor(f"{prefix}.{part}_proj.weight", dtype) for part in ("gate", "up", "down"))
            gate_up.append(torch.cat([gate, up]))
            down.append(back)
        self.gate_up: PackedWeight = kernels.pack(gate_up)
        self.down: PackedWeight = kernels.pack(down)


class LocalExperts(ExpertBackend):
    """All experts in this process: the plain version that the remote one is compared with."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store

    def dispatch(self, layer: int, hidden: Tensor, expert_ids: Tensor) -> Tensor:
        tokens, top_k = expert_ids.shape
        token_rows = torch.arange(tokens).repeat_interleave(top_k)
        rows = self._store.run(layer, hidden, token_rows, expert_ids.flatten())
        return rows.view(tokens, top_k, hidden.shape[1])

    def combine(self, ticket: Tensor) -> Tensor:
        return ticket
