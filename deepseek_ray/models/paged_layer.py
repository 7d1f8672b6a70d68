"""A decoder layer for inference: attention, then a dense network or a mixture of experts.

Letters: T tokens of the step, H hidden size, K experts per token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.kernels.base import MoeWeights, Step
from deepseek_ray.models.decoder_weights import DecoderWeights
from deepseek_ray.models.paged_attention import LatentAttention
from deepseek_ray.nn.gate import choice_of, choose_experts
from deepseek_ray.nn.moe import ExpertBackend
from deepseek_ray.nn.slots import combine_slots
from deepseek_ray.nn.transfer import moved

LayerEnd = Callable[[], Tensor]
"""Waits for the layer's experts and returns its output [T, H]."""


class Layer:
    """One layer of a checkpoint; its routed experts are behind `experts`."""

    def __init__(self, config: ModelConfig, layer: int, weights: DecoderWeights, experts: ExpertBackend) -> None:
        prefix = f"model.layers.{layer}"
        self._attention = LatentAttention(config, prefix, weights)
        self._mlp: Mlp | _Moe
        if config.is_moe_layer(layer):
            self._mlp = _Moe(config, layer, f"{prefix}.mlp", weights, experts)
        else:
            self._mlp = Mlp(f"{prefix}.mlp", weights)

    def begin(self, hidden: Tensor, step: Step, latents: Tensor, first_row: int = 0) -> LayerEnd:
        """Everything up to the routed experts, which are asked. first_row: place of the first of hidden [T, H] in the
        whole step."""
        hidden, normed = self._attention.forward(hidden, step, latents)
        return self._mlp.begin(hidden, normed, first_row)


class Mlp:
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, prefix: str, weights: DecoderWeights) -> None:
        self._kernels = weights.kernels
        gate_up = weights.linear(f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
        self.weights = gate_up, weights.linear(f"{prefix}.down_proj.weight")

    def begin(self, hidden: Tensor, normed: Tensor, first_row: int) -> LayerEnd:
        """Of a layer without experts."""
        output = hidden + self.forward(normed)
        return lambda: output

    def begin_aside(self, normed: Tensor) -> Callable[[], Tensor]:
        """`forward` with the time that the cores have left meanwhile."""
        return self._kernels.mlp_aside(normed, *self.weights) or (lambda: self.forward(normed))

    def forward(self, normed: Tensor) -> Tensor:
        return self._kernels.mlp(normed, *self.weights)


class _Moe:
    """Gate, routed experts behind the backend, shared experts while the routed ones are away (where these are computed
    on the same cores, in the time that they leave)."""

    def __init__(
        self, config: ModelConfig, layer: int, prefix: str, weights: DecoderWeights, experts: ExpertBackend
    ) -> None:
        self._config = config
        self._layer = layer
        self._kernels = weights.kernels
        self._experts = experts
        self._gate = weights.kernels.pack([weights.plain(f"{prefix}.gate.weight", torch.float32)])
        self._bias = weights.bias(f"{prefix}.gate.e_score_correction_bias")
        self._choice = choice_of(config)
        self._shared = Mlp(f"{prefix}.shared_experts", weights) if config.n_shared_experts else None
        shared = self._shared.weights if self._shared else None
        self._whole = self._kernels.moe(MoeWeights(self._gate, config.scoring_func, self._bias, self._choice, shared))

    def begin(self, hidden: Tensor, normed: Tensor, first_row: int) -> LayerEnd:
        """Ask the experts; where they are here, compute all."""
        if self._whole is not None and (table := self._experts.table(self._layer, self._kernels)) is not None:
            whole = self._whole(hidden, normed, table)
            assert whole is not None, f"experts of layer {self._layer} are gone"
            return lambda: whole
        expert_ids, slot_weights = self._route(normed)
        there = self._experts.device
        ticket = self._experts.dispatch(self._layer, moved(normed, there), moved(expert_ids, there), first_row)
        if self._shared is None:
            return lambda: self._combine(ticket, slot_weights, hidden)
        if self._experts.uses_our_cores(ticket):
            shared = self._shared.begin_aside(normed)
            return lambda: self._combine(ticket, slot_weights, hidden, shared)
        output = self._shared.forward(normed)
        return lambda: self._combine(ticket, slot_weights, hidden, lambda: output)

    def _route(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and weights [T, K] of each token's experts."""
        kernels, kind = self._kernels, self._config.scoring_func
        if (chosen := kernels.route(normed, self._gate, kind, self._bias, self._choice)) is not None:
            return chosen
        scores = kernels.scores(kernels.linear(normed, self._gate, torch.float32), kind)
        return kernels.choose_experts(scores, self._bias, self._choice) or choose_experts(
            scores, self._bias, self._config
        )

    def _combine(
        self, ticket: Any, slot_weights: Tensor, hidden: Tensor, shared: Callable[[], Tensor] | None = None
    ) -> Tensor:
        rows = moved(self._experts.combine(ticket), hidden.device)
        more = [shared(), hidden] if shared else [hidden]
        combined = self._kernels.combine_slots(rows, slot_weights, more)
        if combined is not None:
            return combined
        return functools.reduce(torch.add, more, combine_slots(rows, slot_weights).to(hidden.dtype))
