"""How near the Triton operators come to what a GPU can do, at bench-mini's widths.

    python -m benchmarks.gpu_kernels [--runs 30]

Experts of a layer and attention over paged latents, as fractions of copying a gigabyte within the GPU's memory (decode,
which reads weights or latents once) and of torch's best matrix product (prefill), measured in turns; `torch` beside
them is what serves without Triton. Says so and stops where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.bench_model import BENCH_MINI
from benchmarks.results_file import write_results
from deepseek_ray.kernels.fast import FastKernels

Run = Callable[[], object]
_BLOCK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30, help="of each operator, in turns")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure here")
        return
    torch.set_default_device("cuda")
    copied, factor = torch.ones(250_000_000), torch.randn(4096, 4096).bfloat16()
    bytes_per_second = 2 * copied.nbytes / _seconds({"": lambda: copied.clone()}, options.runs)[""]
    flop_per_second = 2 * 4096**3 / _seconds({"": lambda: factor @ factor}, options.runs)[""]
    print(f"copies {bytes_per_second / 1e9:,.0f} GB/s, multiplies {flop_per_second / 1e12:,.0f} TFLOP/s", flush=True)
    rows = []
    for tokens in (1, 8, 32, 4096):
        rows.append(_row("experts", tokens, *_experts(tokens), options.runs, bytes_per_second, flop_per_second))
    for sequences, context in ((8, 512), (8, 16384), (64, 4096)):
        work = _attention(sequences, context)
        rows.append(
            _row(f"attention over {context}", sequences, *work, options.runs, bytes_per_second, flop_per_second)
        )
    device = {"device": torch.cuda.get_device_name(), "copy": bytes_per_second, "product": flop_per_second}
    write_results("gpu_kernels", {**device, "runs": options.runs, "rows": rows})


def _row(
    what: str, tokens: int, runs: dict[str, Run], num_bytes: float, flop: float, times: int, *rates: float
) -> dict[str, Any]:
    seconds = _seconds(runs, times)
    limit = max(num_bytes / rates[0], flop / rates[1])
    row = {"operator": what, "tokens": tokens, "limit_seconds": limit, "seconds": seconds}
    row["of_limit"] = {name: limit / own for name, own in seconds.items()}
    print(row, flush=True)
    return row


def _kernels() -> dict[str, FastKernels]:
    from deepseek_ray.kernels.gpu import GpuKernels

    return {"triton": GpuKernels(), "torch": FastKernels()}


def _experts(tokens: int) -> tuple[dict[str, Run], float, float]:
    """The first product of a layer's experts, each token's chosen at random."""
    config = BENCH_MINI
    num_out, num_in = 2 * config.moe_intermediate_size, config.hidden_size
    ids = torch.stack([torch.randperm(config.n_routed_experts)[: config.num_experts_per_tok] for _ in range(tokens)])
    counts = ids.flatten().bincount(minlength=config.n_routed_experts).tolist()
    touched, pairs = [count for count in counts if count], ids.numel()
    weights = [FastKernels().pack([torch.randn(num_out, num_in).bfloat16()]) for _ in touched]
    x = torch.randn(pairs, num_in).bfloat16()
    runs: dict[str, Run] = {
        name: lambda own=own: own.grouped_linear(x, weights, touched)  # type: ignore[misc]
        for name, own in _kernels().items()
    }
    return runs, len(touched) * num_out * num_in * 2, 2 * pairs * num_out * num_in


def _attention(sequences: int, context: int) -> tuple[dict[str, Run], float, float]:
    """One decode step of a layer: every sequence has `context` latents behind it."""
    config = BENCH_MINI
    heads, width, values = config.num_attention_heads, config.latent_width, config.kv_lora_rank
    blocks = context // _BLOCK
    case: dict[str, Any] = {
        "query": torch.randn(sequences, heads, width),
        "cache": torch.randn(sequences * context, width).bfloat16(),
        "block_tables": torch.randperm(sequences * blocks, dtype=torch.int32).view(sequences, blocks),
        "sequence_rows": torch.arange(sequences, dtype=torch.int32),
        "positions": torch.full((sequences,), context - 1),
        "block_size": _BLOCK,
        "value_width": values,
        "scale": config.qk_head_dim**-0.5,
    }
    runs: dict[str, Run] = {
        name: lambda own=own: own.latent_attention(**case)  # type: ignore[misc]
        for name, own in _kernels().items()
    }
    return runs, sequences * context * width * 2, 2 * sequences * heads * context * (width + values)


def _seconds(runs: dict[str, Run], times: int) -> dict[str, float]:
    """Median of each, in turns, after two to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(times + 2):
        for name, run in runs.items():
            started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            started.record()
            run()
            ended.record()
            torch.cuda.synchronize()
            if number > 1:
                seconds[name].append(started.elapsed_time(ended) / 1000)
    return {name: statistics.median(own) for name, own in seconds.items()}


if __name__ == "__main__":
    main()
