"""What uneven expert loads do to decode: bench-mini, and bench-mini whose gates favour some experts.

    python -m benchmarks.uneven_load [--strength 0.05] [--rounds 3] [--threads 2]

One process, two shards that hold all experts each, and two shards with half of them each, in turns; the unevenness is
that of the gates' choices for random tokens.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_model import BENCH_MINI, bench_mini_dir, uneven_bench_mini_dir
from benchmarks.generation import Driver
from benchmarks.results_file import write_results
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.shapes import CORRECTION_BIAS

SYSTEMS = ("local", "actors", "one replica")
_CASES = ((8, 64, 16), (32, 32, 12))
"""Sequences, prompt, tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--strength",
        type=float,
        default=0.05,
        help="of the gates' bias: with 0.05 the busiest expert has 3 times the mean, with 0.1 6 times",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    models = {0.0: bench_mini_dir(), options.strength: uneven_bench_mini_dir(options.strength)}
    rows = [row for strength, path in models.items() for row in _measure(strength, path, options)]
    for row in rows:
        print(
            f"busiest expert {row['busiest_over_mean']:4.1f} x the mean  {row['system']:>11}  {row['sequences']:>2} "
            f"sequences  {row['decode_tokens_per_second']:6.1f} tokens/s"
        )
    write_results("uneven_load", {"threads": options.threads, "rounds": options.rounds, "rows": rows})


def _measure(strength: float, model_dir: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    drivers = {system: Driver(system, model_dir, options.threads) for system in SYSTEMS}
    steps: dict[tuple[str, int], list[float]] = {}
    for seed in range(options.rounds + 1):  # the first warms up
        for sequences, prompt, tokens in _CASES:
            for system, driver in drivers.items():
                answer = driver.measure(sequences=sequences, prompt=prompt, tokens=tokens, seed=seed)
                if seed:
                    steps.setdefault((system, sequences), []).append(statistics.median(answer["steps"]))
    for driver in drivers.values():
        driver.close()
    busiest = busiest_over_mean(model_dir)
    return [
        {
            "strength": strength,
            "busiest_over_mean": busiest,
            "system": system,
            "sequences": sequences,
            "decode_tokens_per_second": sequences / statistics.median(seconds),
        }
        for (system, sequences), seconds in steps.items()
    ]


def busiest_over_mean(model_dir: Path, tokens: int = 4096) -> float:
    """Tokens of the busiest expert over their mean, the mean of all layers, for random hidden states of norm 1."""
    reader = CheckpointReader(model_dir)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, BENCH_MINI.hidden_size, generator=generator)
    found = []
    for layer in BENCH_MINI.moe_layers:
        gate = reader.tensor(f"model.layers.{layer}.mlp.gate.weight", torch.float32)
        bias = reader.tensor(f"model.layers.{layer}.{CORRECTION_BIAS}", torch.float32)
        chosen = ((hidden @ gate.T).sigmoid() + bias).topk(BENCH_MINI.num_experts_per_tok).indices
        counts = chosen.flatten().bincount(minlength=BENCH_MINI.n_routed_experts).float()
        found.append(float(counts.max() / counts.mean()))
    return statistics.mean(found)


if __name__ == "__main__":
    main()
