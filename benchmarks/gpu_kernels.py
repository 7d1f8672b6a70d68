"""How near the operators of a GPU come to what it can do, at bench-mini's widths.

    python -m benchmarks.gpu_kernels [--runs 20]

All experts of a layer and attention over paged latents, as fractions of copying within the GPU's memory (decode, which
reads weights or latents once) and of torch's best matrix product (prefill), in turns; `torch` beside them is what
serves without Triton. Ours are captured as graphs, as decode steps are. Each run takes the next of several sets of
weights and latents, so that none is still in the cache. Says so and stops where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.bench_model import BENCH_MINI
from benchmarks.gpu_timing import Rates, Run, graphed, measured_rates, seconds_in_turns
from benchmarks.results_file import write_results
from deepseek_ray.kernels.base import PackedWeight
from deepseek_ray.kernels.fast import FastKernels

_BLOCK, _SETS = 64, 6


class Work(NamedTuple):
    """One operator, computed in several ways."""

    runs: dict[str, Run]
    num_bytes: float
    flop: float


class Expert(NamedTuple):
    gate_up: PackedWeight
    down: PackedWeight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="of each operator, in turns")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure here")
        return
    torch.set_default_device("cuda")
    rates = measured_rates()
    rows = []
    layer = layer_of_experts()
    for tokens in (1, 8, 32, 64, 4096):
        rows.append(measured("experts", tokens, expert_work(layer, tokens), options.runs, rates))
    for sequences, context in ((1, 4096), (8, 512), (8, 4096), (8, 16384), (64, 4096)):
        work = attention_work(sequences, context)
        rows.append(measured(f"attention over {context:,} positions", sequences, work, options.runs, rates))
    device = {"device": torch.cuda.get_device_name(), "copy": rates.bytes_per_second, "product": rates.flop_per_second}
    write_results("gpu_kernels", {**device, "runs": options.runs, "rows": rows})


def measured(what: str, tokens: int, work: Work, times: int, rates: Rates) -> dict[str, Any]:
    seconds = seconds_in_turns(work.runs, times)
    limit = max(work.num_bytes / rates.bytes_per_second, work.flop / rates.flop_per_second)
    of_limit = {name: limit / own for name, own in seconds.items()}
    told = ", ".join(f"{name} {own * 1e6:,.0f} us ({of_limit[name]:.2f})" for name, own in seconds.items())
    print(f"{what}, {tokens} tokens: limit {limit * 1e6:,.0f} us, {told}", flush=True)
    return {"operator": what, "tokens": tokens, "limit_seconds": limit, "seconds": seconds, "of_limit": of_limit}


def layer_of_experts() -> dict[int, Expert]:
    width, hidden = BENCH_MINI.moe_intermediate_size, BENCH_MINI.hidden_size
    pack = FastKernels().pack
    return {
        id: Expert(*(pack([torch.randn(*shape).bfloat16()]) for shape in ((2 * width, hidden), (hidden, width))))
        for id in range(BENCH_MINI.n_routed_experts)
    }


def expert_work(layer: dict[int, Expert], tokens: int, **changes: Any) -> Work:
    """A layer's experts, each token's chosen at random. `changes` are arguments of the Triton operator."""
    from deepseek_ray.kernels.gpu.experts import device_table, run_experts

    config = BENCH_MINI
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    choices = [torch.rand(tokens, experts).topk(top_k).indices.flatten() for _ in range(_SETS)]
    token_rows = torch.arange(tokens).repeat_interleave(top_k)
    x = torch.randn(tokens, config.hidden_size).bfloat16()
    table = device_table(layer, experts)
    assert table is not None
    ours = [
        graphed(lambda ids=ids: run_experts(table, x, token_rows, ids, **changes))  # type: ignore[misc]
        for ids in choices
    ]
    touched = sum(len(ids.unique()) for ids in choices) / _SETS
    weights = 3 * config.moe_intermediate_size * config.hidden_size
    runs = {
        "triton": _in_turn(ours),
        "torch": _in_turn([_expert_by_expert(layer, x, token_rows, ids) for ids in choices]),
    }
    return Work(runs, touched * weights * 2, 2 * len(token_rows) * weights)


def _expert_by_expert(layer: dict[int, Expert], x: torch.Tensor, token_rows: torch.Tensor, ids: torch.Tensor) -> Run:
    """As `ExpertStore` does it without an operator for all of them, the sorting left out."""
    kernels, order = FastKernels(), ids.argsort(stable=True)
    present, counts = ids[order].unique_consecutive(return_counts=True)
    own, rows = [layer[id] for id in present.tolist()], counts.tolist()

    def run() -> torch.Tensor:
        gate_up = kernels.grouped_linear(x[token_rows[order]], [expert.gate_up for expert in own], rows)
        return kernels.grouped_linear(kernels.silu_mul(gate_up), [expert.down for expert in own], rows)

    return run


def attention_work(sequences: int, context: int, **changes: Any) -> Work:
    """One decode step of a layer: every sequence has `context` latents behind it."""
    from deepseek_ray.kernels.gpu.latents import Pages, attend

    config = BENCH_MINI
    heads, width, values = config.num_attention_heads, config.latent_width, config.kv_lora_rank
    blocks = context // _BLOCK
    query = torch.randn(sequences, heads, width).bfloat16()
    tables = torch.randperm(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    rows, positions = torch.arange(sequences, dtype=torch.int32), torch.full((sequences,), context - 1)
    caches = [torch.randn(sequences * context, width).bfloat16() for _ in range(_SETS)]
    scale = config.qk_head_dim**-0.5

    def ours(cache: torch.Tensor) -> torch.Tensor:
        return attend(query, Pages(cache, tables, _BLOCK), rows, positions, values, scale, **changes)

    def torchs(cache: torch.Tensor) -> torch.Tensor:
        return FastKernels().latent_attention(query, cache, tables, rows, positions, _BLOCK, values, scale)

    runs = {
        "triton": _in_turn([graphed(lambda cache=cache: ours(cache)) for cache in caches]),  # type: ignore[misc]
        "torch": _in_turn([lambda cache=cache: torchs(cache) for cache in caches]),  # type: ignore[misc]
    }
    return Work(runs, sequences * context * width * 2, 2 * sequences * heads * context * (width + values))


def _in_turn(runs: list[Callable[[], Any]]) -> Run:
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


if __name__ == "__main__":
    main()
