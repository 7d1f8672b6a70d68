"""What a decode step costs as the context grows: 8 sequences of bench-mini, 512 to 16,384 positions in the cache.

    python -m benchmarks.long_context [--rounds 5] [--threads 2]

The cache is filled with random latents. Each context is measured once per round; medians over rounds, against the
machine's limit (`benchmarks/roofline.py`).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.bench_model import BENCH_MINI, bench_mini_dir
from benchmarks.results_file import write_results
from benchmarks.roofline import probe, step_seconds
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore, LocalExperts
from deepseek_ray.models.paged_decoder import PagedDecoder
from deepseek_ray.nn.paged import PagedBatch

_CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384)
_SEQUENCES, _BLOCK = 8, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    decoder = _decoder()
    blocks = _CONTEXTS[-1] // _BLOCK
    cache = decoder.new_cache(_SEQUENCES * blocks, _BLOCK)
    for layer in range(BENCH_MINI.num_hidden_layers):
        cache.layer(layer).normal_()
    tables = torch.randperm(_SEQUENCES * blocks).int().view(_SEQUENCES, blocks)
    seconds: dict[int, list[float]] = {context: [] for context in _CONTEXTS}
    limits: dict[int, list[float]] = {context: [] for context in _CONTEXTS}
    for turn in range(options.rounds + 1):  # the first warms up
        probes = probe(options.threads)
        for context in _CONTEXTS:
            batch = _batch(context, tables)
            started = time.perf_counter()
            decoder.forward(batch, cache)
            if turn:
                seconds[context].append(time.perf_counter() - started)
                limits[context].append(step_seconds(BENCH_MINI, _SEQUENCES, context, probes))
    rows = []
    for context in _CONTEXTS:
        step, limit = (1000 * statistics.median(values[context]) for values in (seconds, limits))
        rows.append({"context": context, "step_milliseconds": step, "limit_milliseconds": limit})
        print(f"{context:>6} positions: {step:7.1f} ms a step, {step / limit:.2f} of the limit")
    write_results("long_context", {"sequences": _SEQUENCES, "threads": options.threads, "rows": rows})


def _decoder() -> PagedDecoder:
    reader = CheckpointReader(bench_mini_dir())
    held = {layer: range(BENCH_MINI.n_routed_experts) for layer in BENCH_MINI.moe_layers}
    store = ExpertStore(reader, held, torch.bfloat16)
    return PagedDecoder(reader, torch.bfloat16, LocalExperts(store), max_positions=_CONTEXTS[-1])


def _batch(context: int, tables: torch.Tensor) -> PagedBatch:
    """One new token of each sequence, at the last position."""
    place = context - 1
    return PagedBatch(
        token_ids=torch.randint(BENCH_MINI.vocab_size, (_SEQUENCES,)),
        positions=torch.full((_SEQUENCES,), place),
        slots=tables[:, place // _BLOCK].long() * _BLOCK + place % _BLOCK,
        sequence_rows=torch.arange(_SEQUENCES, dtype=torch.int32),
        block_tables=tables,
        logit_rows=torch.arange(_SEQUENCES),
    )


if __name__ == "__main__":
    main()
