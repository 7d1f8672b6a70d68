"""The least time a decode step can take on this machine: sum over operators of max(bytes / bandwidth, FLOP / rate).

Bandwidth and rates are measured (`probe`): reading 1 GB, and the best matrix product at hand at each number of rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.kernels.native import NativeKernels

LIMITS = "The limit is the sum over operators of max(bytes / read bandwidth, FLOP / matmul rate), measured in the run"
_ROWS = (1, 2, 4, 8, 16, 32)
_INPUTS, _OUTPUTS = 2048, 1024
_BFLOAT16 = 2


class Operator(NamedTuple):
    num_bytes: float
    flop: float
    rows: float


class Probes(NamedTuple):
    bytes_per_second: float
    flop_per_second: dict[int, float]
    """By the number of rows."""

    def seconds(self, operator: Operator) -> float:
        rate = self.flop_per_second[max(rows for rows in self.flop_per_second if rows <= max(1, operator.rows))]
        return max(operator.num_bytes / self.bytes_per_second, operator.flop / rate)


def probe(threads: int) -> Probes:
    torch.set_num_threads(threads)
    much = torch.ones(250_000_000)
    bandwidth = much.nbytes / _best(much.sum, 5)
    kernels = NativeKernels()
    weight = torch.randn(_OUTPUTS, _INPUTS)
    packed = kernels.pack([weight.bfloat16()])
    rates = {}
    for rows in _ROWS:
        x = torch.randn(rows, _INPUTS)
        x16 = x.bfloat16()
        ways: list[Callable[[], object]] = [
            lambda x=x: x @ weight.T,  # type: ignore[misc]
            lambda x16=x16: kernels.linear(x16, packed),  # type: ignore[misc]
        ]
        rates[rows] = 2 * rows * _INPUTS * _OUTPUTS / min(_best(way, 50) for way in ways)
    return Probes(bandwidth, rates)


def step_seconds(config: ModelConfig, sequences: int, context: int, probes: Probes) -> float:
    return sum(probes.seconds(operator) for operator in operators(config, sequences, context))


def operators(config: ModelConfig, sequences: float, context: float) -> Iterator[Operator]:
    """Of one decode step in bfloat16; each expert's routing is taken for equally likely."""
    for layer in range(config.num_hidden_layers):
        yield from attention_operators(config, layer, sequences, context)
        if config.is_moe_layer(layer):
            yield expert_operator(config, sequences)
    yield head_operator(config, sequences)


def attention_operators(config: ModelConfig, layer: int, sequences: float, context: float) -> Iterator[Operator]:
    """All of a layer but its routed experts: what an attention worker computes."""
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = heads * config.qk_head_dim
    rank = config.q_lora_rank or 0
    attention = [(rank, hidden), (queries, rank)] if rank else [(queries, hidden)]
    attention += [(config.latent_width, hidden), (hidden, heads * config.v_head_dim)]
    attention += [(heads * latent, config.qk_nope_head_dim), (heads * config.v_head_dim, latent)]
    for num_out, num_in in attention:
        yield _linear(num_out, num_in, sequences)
    scores = 2 * sequences * heads * context * (config.latent_width + latent)
    yield Operator(sequences * context * config.latent_width * _BFLOAT16, scores, sequences * heads)
    if not config.is_moe_layer(layer):
        yield _linear(3 * config.intermediate_size, hidden, sequences)
        return
    yield _linear(2 * config.n_routed_experts, hidden, sequences)  # float32: twice the bytes
    yield _linear(3 * config.moe_intermediate_size * config.n_shared_experts, hidden, sequences)


def expert_operator(config: ModelConfig, sequences: float, part: float = 1.0) -> Operator:
    """A layer's routed experts, or those of a shard that holds `part` of them."""
    untouched = (1 - config.num_experts_per_tok / config.n_routed_experts) ** sequences
    touched = config.n_routed_experts * (1 - untouched)
    rows = sequences * config.num_experts_per_tok / touched
    one = _linear(3 * config.moe_intermediate_size, config.hidden_size, rows)
    return Operator(part * touched * one.num_bytes, part * touched * one.flop, rows)


def head_operator(config: ModelConfig, sequences: float) -> Operator:
    return _linear(config.vocab_size, config.hidden_size, sequences)


def _linear(num_out: int, num_in: int, rows: float) -> Operator:
    return Operator(num_out * num_in * _BFLOAT16, 2 * rows * num_out * num_in, rows)


def _best(run: Callable[[], object], times: int) -> float:
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best
