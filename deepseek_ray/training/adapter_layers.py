"""Layers with low-rank adapters (arXiv 2106.09685): y = W x + scale * B A x, with W frozen.

A layer with an adapter stays what it was, under the same parameter names; `lora_A` and `lora_B` stand beside them.
Letters: r rank, E routed experts, C experts with an adapter, I width of an expert, H hidden size, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_ray.config.finetune import LoraConfig
from deepseek_ray.nn.experts import Experts

Pair = tuple[Tensor, Tensor]
"""A [r, in] and B [out, r]."""


class LoraLinear(nn.Linear):
    """A linear layer that shares the weight (and bias) of the one it replaces."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = _new_a(1, base.in_features, config, base.weight)
        self.lora_B = _new_b(1, base.out_features, config, base.weight)
        self.lora_A.data, self.lora_B.data = self.lora_A.data[0], self.lora_B.data[0]
        self.config = config

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return with_adapter(super().forward(input), input, (self.lora_A, self.lora_B), self.config, self.training)


class ExpertAdapters(nn.Module):
    """Adapters of one projection of some of a layer's experts."""

    def __init__(self, experts: Sequence[int], num_in: int, num_out: int, config: LoraConfig, like: Tensor) -> None:
        super().__init__()
        self.experts = tuple(experts)
        """Numbers of the C experts, ascending."""
        self.lora_A = _new_a(len(experts), num_in, config, like)
        """[C, r, in]"""
        self.lora_B = _new_b(len(experts), num_out, config, like)
        """[C, out, r]"""

    def by_expert(self) -> dict[int, Pair]:
        return dict(zip(self.experts, zip(self.lora_A.unbind(0), self.lora_B.unbind(0), strict=True), strict=True))


class LoraExperts(Experts):
    """Routed experts that share the stacked weights of those they replace."""

    def __init__(self, base: Experts, chosen: Mapping[str, Sequence[int]], config: LoraConfig) -> None:
        """chosen: for each of gate_proj, up_proj and down_proj the experts whose projection gets an adapter."""
        nn.Module.__init__(self)
        self.gate_up, self.down = base.gate_up, base.down
        _, hidden, width = base.down.shape
        sizes = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
        self.projections = tuple(name for name in sizes if chosen.get(name))
        for name in self.projections:
            self.add_module(name, ExpertAdapters(chosen[name], *sizes[name], config, base.down))
        self.config = config

    def adapters(self, projection: str) -> ExpertAdapters:
        module = self.get_submodule(projection)
        assert isinstance(module, ExpertAdapters)
        return module

    def compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        """As without adapters. Every adapter takes part, with nothing where its experts have no rows, so that it has a
        gradient in every step and on every worker.

        Python loops over the experts that have rows.
        """
        pairs = {name: self.adapters(name).by_expert() for name in self.projections}
        outputs = [rows[:0]]
        stacked = zip(rows.split(counts.tolist()), self.gate_up.unbind(0), self.down.unbind(0), strict=True)
        for expert, (own, gate_up, down) in enumerate(stacked):
            if own.shape[0]:
                adapted = {name: pair[expert] for name, pair in pairs.items() if expert in pair}
                outputs.append(self._compute_one(own, gate_up, down, adapted))
        nothing = torch.stack([p.sum() for name in self.projections for p in self.adapters(name).parameters()]).sum()
        output = torch.cat([part.to(outputs[-1].dtype) for part in outputs])
        return output + (0.0 * nothing).to(output.dtype)

    def _compute_one(self, rows: Tensor, gate_up: Tensor, down: Tensor, own: Mapping[str, Pair]) -> Tensor:
        """One expert over its rows: [R, H] -> [R, H], with its adapters by projection."""
        gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
        gate = self._adapted(gate, rows, own.get("gate_proj"))
        inner = F.silu(gate) * self._adapted(up, rows, own.get("up_proj"))
        return self._adapted(F.linear(inner, down), inner, own.get("down_proj"))

    def _adapted(self, output: Tensor, rows: Tensor, pair: Pair | None) -> Tensor:
        if pair is None:
            return output
        return with_adapter(output, rows, pair, self.config, self.training)


def with_adapter(output: Tensor, rows: Tensor, pair: Pair, config: LoraConfig, training: bool) -> Tensor:
    """output [..., out] of a frozen matrix for `rows` [..., in], and the adapter's part added."""
    return output + config.scale * low_rank(F.dropout(rows, config.lora_dropout, training), pair)


def low_rank(rows: Tensor, pair: Pair) -> Tensor:
    """B A x: [..., in] -> [..., out], in the dtype of the rows; the adapters' own dtype inside."""
    a, b = pair
    return F.linear(F.linear(rows.to(a.dtype), a), b).to(rows.dtype)


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight + scale * B A, computed in float32. weight: [..., out, in]; a: [..., r, in]; b: [..., out, r]."""
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)


def _new_a(count: int, num_in: int, config: LoraConfig, like: Tensor) -> nn.Parameter:
    """Uniform as PEFT draws it: He initialisation with slope sqrt(5), that is +-1 / sqrt(in)."""
    bound = 1 / math.sqrt(num_in)
    values = torch.empty(count, config.r, num_in, device=like.device, dtype=torch.float32)
    return nn.Parameter(values.uniform_(-bound, bound))


def _new_b(count: int, num_out: int, config: LoraConfig, like: Tensor) -> nn.Parameter:
    """Zeros: a model with new adapters computes what it computed before."""
    return nn.Parameter(torch.zeros(count, num_out, config.r, device=like.device, dtype=torch.float32))
