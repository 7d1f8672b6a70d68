"""Serving: long contexts, HTTP, frames between processes, and simulated deployments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.results_file import measured_on
from benchmarks.roofline import LIMITS


def long_context_section(result: dict[str, Any]) -> str:
    lines = [
        "## Long contexts",
        "",
        f"A decode step of {result['sequences']} sequences of bench-mini over a cache of random latents, bfloat16. "
        f"{measured_on(result)}, {result['threads']} threads (`{result['file']}`). {LIMITS}.",
        "",
        "| positions | step, ms | of the limit |",
        "|---|---|---|",
    ]
    for row in result["rows"]:
        ratio = row["step_milliseconds"] / row["limit_milliseconds"]
        lines.append(f"| {row['context']:,} | {row['step_milliseconds']:.0f} | {ratio:.2f}x |")
    return "\n".join([*lines, ""])


def http_section(result: dict[str, Any]) -> str:
    """Streams of each server side by side."""
    lines = [
        "## Streams over HTTP",
        "",
        f"Random prompts, {result['tokens']} tokens out, "
        f"{measured_on(result)}, {result['threads']} threads, medians of {result['rounds']} rounds "
        f"(`{result['file']}`). "
        "`serve` and `vllm` have bench-mini, `llm` the same work by `LLM` through actors (its first token is that of "
        "the slowest stream); `small` is `deepseek-ray serve` with a model that costs next to nothing, "
        "`trivial` a Serve application without one.",
        "",
        "| streams x prompt | server | first token, ms: p50 / p90 | between tokens, ms: p50 / p90 | tokens/s |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(result["rows"], key=lambda row: row["streams"]):
        times = [
            " / ".join(f"{row[f'{name}_{part}_milliseconds']:.0f}" for part in ("p50", "p90"))
            for name in ("first", "gap")
        ]
        lines.append(
            f"| {row['streams']} x {row['prompt']} | {row['system']} | {times[0]} | {times[1]} "
            f"| {row['tokens_per_second']:.1f} |"
        )
    return "\n".join([*lines, ""])


def frames_section(result: dict[str, Any]) -> str:
    micros = result["microseconds"]
    lines = [
        "## Frame round trip between two processes on one node",
        "",
        f"{measured_on(result)}, {result['bytes_each_way'] // 1024} KB each way, medians of {result['runs']} runs "
        f"(`{result['file']}`). Bare is an eventfd wake-up and a memcpy.",
        "",
        "| way | microseconds | against bare |",
        "|---|---|---|",
    ]
    lines += [f"| {way} | {value:.0f} | {value / micros['bare']:.1f}x |" for way, value in micros.items()]
    return "\n".join([*lines, ""])


def simulation_section(result: dict[str, Any]) -> str:
    """What the simulator gets right, and what it says of DeepSeek-V3."""
    plot = Path(result["file"]).with_suffix(".png").name
    lines = [
        "## DeepSeek-V3-671B on many machines, simulated",
        "",
        "`benchmarks/simulation.py` against what was measured of one attention worker and two shards on two cores "
        f"(`{result['file']}`):",
        "",
        "| sequences | predicted, ms a step | measured | predicted / measured |",
        "|---|---|---|---|",
    ]
    for row in result["check"]:
        cells = [f"{row['predicted_milliseconds']:.0f}", f"{row['measured_milliseconds']:.0f}", f"{row['ratio']:.2f}"]
        lines.append(f"| {row['sequences']} | {' | '.join(cells)} |")
    lines += [
        "",
        f"V3 in bfloat16 on nodes of one H100 by its data sheet, of which operators reach half, {result['context']:,} "
        f"positions a sequence, the busiest shard at {result['busiest_shard']:g} of the mean; the best number of "
        "micro-batches of each row. The last column is the same with shards that compute one call after the other. "
        "Nothing of this table was measured.",
        "",
        f"![tokens per second and GPU against time between tokens](../benchmarks/results/{plot})",
        "",
        "| attention : expert nodes | sequences a worker | micro-batches | ms between tokens | tokens/s and node "
        "| $ per million tokens | calls one by one: tokens/s and node |",
        "|---|---|---|---|---|---|---|",
    ]
    best: dict[tuple[int, int, int], dict[str, Any]] = {}
    for row in result["rows"]:
        key = (row["attention_workers"], row["expert_shards"], row["sequences"])
        best[key] = max(best.get(key, row), row, key=lambda each: each["tokens_per_second_per_node"])
    for (workers, shards, sequences), row in best.items():
        cells = [f"{workers} : {shards}", sequences, row["micro_batches"], f"{row['step_milliseconds']:.0f}"]
        cells += [f"{row['tokens_per_second_per_node']:.0f}", f"{row['dollars_per_million_tokens']:.2f}"]
        cells.append(f"{row['tokens_per_second_per_node_one_by_one']:.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])
