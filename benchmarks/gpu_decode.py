"""A decode step of bench-mini on one GPU: replayed as a graph, operator by operator, and with torch's operators alone.

    python -m benchmarks.gpu_decode [--runs 20]

Steps of 1 to 64 sequences of 512 tokens, against the least time that the GPU could take (`benchmarks/roofline.py` with
its measured copying and multiplying), and tokens per second of `LLM` as a whole, sampling on the host included. Says
so and stops where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.bench_model import BENCH_MINI, bench_mini_dir
from benchmarks.generation_drivers import local_config, measure_backend
from benchmarks.gpu_timing import measured_rates, seconds_in_turns
from benchmarks.results_file import write_results
from benchmarks.roofline import Probes, step_seconds
from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.engine.offline import LocalBackend
from deepseek_ray.kernels.fast import FastKernels
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore, LocalExperts
from deepseek_ray.models.graphed_decoder import GraphedDecoder
from deepseek_ray.models.paged_decoder import PagedDecoder
from deepseek_ray.nn.paged import PagedBatch

_SEQUENCES, _CONTEXT, _BLOCK = (1, 8, 32, 64), 512, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="steps of each kind, in turns")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure here")
        return
    rates = measured_rates()
    probes = Probes(rates.bytes_per_second, {1: rates.flop_per_second})
    steps = decode_steps()
    rows = []
    for sequences in _SEQUENCES:
        seconds = seconds_in_turns({name: step(sequences) for name, step in steps.items()}, options.runs)
        limit = step_seconds(BENCH_MINI, sequences, _CONTEXT, probes)
        rows.append({"sequences": sequences, "limit_seconds": limit, "seconds": seconds})
        told = ", ".join(f"{name} {own * 1e3:.2f} ms ({limit / own:.2f})" for name, own in seconds.items())
        print(f"{sequences} sequences: limit {limit * 1e3:.2f} ms, {told}", flush=True)
    del steps
    torch.cuda.empty_cache()
    whole = whole_engine()
    device = {"device": torch.cuda.get_device_name(), "copy": rates.bytes_per_second, "product": rates.flop_per_second}
    write_results("gpu_decode", {**device, "context": _CONTEXT, "runs": options.runs, "rows": rows, "llm": whole})


def decode_steps() -> dict[str, Callable[[int], Callable[[], Any]]]:
    """Of each kind: a number of sequences -> a step of them."""
    from deepseek_ray.kernels.gpu.operators import GpuKernels

    reader = CheckpointReader(bench_mini_dir())
    held = {layer: range(BENCH_MINI.n_routed_experts) for layer in BENCH_MINI.moe_layers}
    found = {}
    for name, kernels, kind in (
        ("graphs", GpuKernels(), GraphedDecoder),
        ("operators", GpuKernels(), PagedDecoder),
        ("torch", FastKernels(), PagedDecoder),
    ):
        experts = LocalExperts(ExpertStore(reader, held, torch.bfloat16, kernels, device="cuda"))
        found[name] = _step_of(kind(reader, torch.bfloat16, experts, kernels, device="cuda"))
    return found


def _step_of(decoder: PagedDecoder) -> Callable[[int], Callable[[], Any]]:
    blocks = _CONTEXT // _BLOCK
    cache = decoder.new_cache(max(_SEQUENCES) * blocks, _BLOCK)
    cache.data.normal_()

    def step(sequences: int) -> Callable[[], Any]:
        tables = torch.randperm(max(_SEQUENCES) * blocks)[: sequences * blocks].int().view(sequences, blocks)
        last = _CONTEXT - 1
        batch = PagedBatch(
            token_ids=torch.randint(BENCH_MINI.vocab_size, (sequences,)),
            positions=torch.full((sequences,), last),
            slots=tables[:, last // _BLOCK].long() * _BLOCK + last % _BLOCK,
            sequence_rows=torch.arange(sequences, dtype=torch.int32),
            block_tables=tables,
            logit_rows=torch.arange(sequences),
        )

        @torch.inference_mode()
        def run() -> Any:
            return decoder.forward(batch, cache)

        return run

    return step


def whole_engine() -> list[dict[str, Any]]:
    """Tokens per second of requests that `LLM` ends together."""
    config = local_config(str(bench_mini_dir()), threads=4)
    engine = config.engine.model_copy(update={"deterministic": False})
    on_gpu = {"engine": engine, "attention_device": "cuda", "expert_device": "cuda"}
    measure = measure_backend(LocalBackend(DeploymentConfig(**{**config.model_dump(), **on_gpu})))
    rows = []
    for sequences in _SEQUENCES:
        request = {"sequences": sequences, "prompt": 128, "tokens": 64, "seed": 1}
        measure(request)
        found = measure({**request, "seed": 2})
        step = statistics.median(found["steps"])
        rows.append(
            {"sequences": sequences, "prefill_seconds": found["prefill"], "tokens_per_second": sequences / step}
        )
        print(f"LLM, {sequences} sequences: {sequences / step:,.0f} tokens/s, first after {found['prefill']:.3f} s")
    return rows


if __name__ == "__main__":
    main()
