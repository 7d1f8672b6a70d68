"""What DeepSeek-V3-671B would do on many machines, by the costs measured on two cores and by machines' data sheets.

    python -m benchmarks.simulate

First the simulator (`benchmarks/simulation.py`) is held against the newest generation results: operators reach the part
of the limit that `local` reached at the same number of sequences, a layer's call costs a measured frame round trip, and
what comes out for one attention worker and two shards is compared with what was measured of them. Then V3 on nodes of
one GPU, whose figures are their data sheet's and whose operators reach half of it: attention workers against expert
shards, sequences, micro-batches; and what it would be if shards computed one call after the other. Nothing of the
second table was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.bench_model import BENCH_MINI
from benchmarks.generation import CASES
from benchmarks.results_file import newest, write_results
from benchmarks.roofline import Probes, step_seconds
from benchmarks.simulation import Deployment, Machine, Network, simulate
from deepseek_ray.config.model import ModelConfig

V3 = ModelConfig.parse(
    {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "max_position_embeddings": 4096,
    }
)
GPU = Machine(Probes(3.35e12, {1: 990e12}), efficiency=0.5)
"""An H100 SXM by its data sheet: HBM3 and dense bfloat16."""
GPU_BYTES, DOLLARS_PER_HOUR = 80e9, 2.0
GPU_NETWORK = Network(latency_seconds=10e-6, bytes_per_second=50e9, call_seconds=20e-6)
"""One 400 Gbit/s port for each GPU."""
CONTEXT, BUSIEST = 4096, 1.1
"""Positions of every sequence; the busiest shard over the mean after a rebalance."""
_BFLOAT16 = 2
_WORKERS_AND_SHARDS = ((4, 32), (8, 32), (16, 32), (32, 32), (64, 32))
_SEQUENCES = (64, 128)
_MICRO_BATCHES = (1, 2, 3)


def main() -> None:
    checked = list(check(newest("generation"), newest("frame_round_trip")))
    for row in checked:
        print(
            f"{row['sequences']:>2} sequences: predicted {row['predicted_milliseconds']:6.1f} ms a step, "
            f"measured {row['measured_milliseconds']:6.1f} ms ({row['ratio']:.2f}x)"
        )
    rows = list(predictions())
    path = write_results("simulation", {"context": CONTEXT, "busiest_shard": BUSIEST, "check": checked, "rows": rows})
    plot(rows, path.with_suffix(".png"))


def check(generation: dict[str, Any], frames: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One attention worker and two shards on the measured machine, at every measured number of sequences."""
    probes = _probes(generation["probes"][0])
    half = Probes(probes.bytes_per_second / 2, {n: rate / 2 for n, rate in probes.flop_per_second.items()})
    call = frames["microseconds"]["shared_memory"] / 1e6
    network = Network(latency_seconds=0.0, bytes_per_second=probes.bytes_per_second / 2, call_seconds=call)
    measured = {(row["system"], row["sequences"]): row["decode_step_milliseconds"] for row in generation["rows"]}
    for sequences, prompt, tokens in CASES:
        context = prompt + tokens // 2
        reached = 1000 * step_seconds(BENCH_MINI, sequences, context, probes) / measured["local", sequences]
        deployment = Deployment(
            attention_workers=1,
            expert_shards=2,
            sequences=sequences,
            context=context,
            attention=Machine(probes, reached),
            experts=Machine(half, reached),
            network=network,
        )
        predicted = 1000 * simulate(BENCH_MINI, deployment).step_seconds
        seen = measured["actors", sequences]
        yield {
            "sequences": sequences,
            "predicted_milliseconds": predicted,
            "measured_milliseconds": seen,
            "ratio": predicted / seen,
        }


def predictions() -> Iterator[dict[str, Any]]:
    """V3 on GPUs, wherever weights and cache fit."""
    for workers, shards in _WORKERS_AND_SHARDS:
        for sequences in _SEQUENCES:
            for micro_batches in _MICRO_BATCHES:
                deployment = Deployment(
                    attention_workers=workers,
                    expert_shards=shards,
                    sequences=sequences,
                    context=CONTEXT,
                    micro_batches=micro_batches,
                    busiest_shard=BUSIEST,
                    attention=GPU,
                    experts=GPU,
                    network=GPU_NETWORK,
                )
                if max(_bytes_held(deployment)) > GPU_BYTES:
                    continue
                predicted = simulate(V3, deployment, steps=2)
                one_by_one = simulate(V3, dataclasses.replace(deployment, joint_calls=False), steps=2)
                nodes = workers + shards
                dollars = nodes * DOLLARS_PER_HOUR / 3600 / predicted.tokens_per_second * 1e6
                yield {
                    "attention_workers": workers,
                    "expert_shards": shards,
                    "sequences": sequences,
                    "micro_batches": micro_batches,
                    "step_milliseconds": 1000 * predicted.step_seconds,
                    "tokens_per_second_per_node": predicted.tokens_per_second / nodes,
                    "tokens_per_second_per_node_one_by_one": one_by_one.tokens_per_second / nodes,
                    "dollars_per_million_tokens": dollars,
                    "attention_busy": predicted.attention_busy,
                    "experts_busy": predicted.experts_busy,
                }


def _bytes_held(deployment: Deployment) -> tuple[float, float]:
    """By an attention worker and by a shard."""
    experts = V3.num_expert_parameters * V3.n_routed_experts * len(V3.moe_layers)
    cache = deployment.sequences * deployment.context * V3.latent_width * V3.num_hidden_layers
    return _BFLOAT16 * (V3.num_parameters - experts + cache), _BFLOAT16 * experts / deployment.expert_shards


def _probes(found: dict[str, Any]) -> Probes:
    return Probes(found["bytes_per_second"], {int(rows): rate for rows, rate in found["flop_per_second"].items()})


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time between tokens against tokens per second and node; a colour for each number of attention workers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for workers in sorted({row["attention_workers"] for row in rows}):
        own = [row for row in rows if row["attention_workers"] == workers]
        axis.plot(
            [row["step_milliseconds"] for row in own],
            [row["tokens_per_second_per_node"] for row in own],
            marker="o",
            linestyle="none",
            label=f"{workers} : {own[0]['expert_shards']}",
        )
    axis.set_xlabel("milliseconds between two tokens of a sequence")
    axis.set_ylabel("tokens per second and GPU")
    axis.legend(title="attention : experts", fontsize=8)
    axis.set_title("DeepSeek-V3-671B, simulated", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
