"""One GPU: a decode step as a whole, and the operators it spends its time in."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def gpu_decode_section(result: dict[str, Any]) -> str:
    lines = [
        "## A decode step on one GPU",
        "",
        f"bench-mini, bfloat16, {result['context']} positions, {_measured_on(result)}, medians of {result['runs']} "
        "steps of each kind in turns. The limit is that of the other tables with what this GPU copies and multiplies. "
        "`graphs` replays a step, `operators` launches the same ones one by one, `torch` has no operators of ours.",
        "",
        f"![milliseconds of a step, tokens per second]({_plot(result)})",
        "",
        "| sequences | limit, ms | graphs, ms | of the limit | operators, ms | torch, ms |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        limit, seconds = row["limit_seconds"], row["seconds"]
        lines.append(
            f"| {row['sequences']} | {1000 * limit:.2f} | {1000 * seconds['graphs']:.2f} "
            f"| {limit / seconds['graphs']:.2f} | {1000 * seconds['operators']:.2f} | {1000 * seconds['torch']:.2f} |"
        )
    lines += [
        "",
        "`LLM` as a whole there, tokens chosen on the host (prompts of 128 tokens, first tokens of all):",
        "",
        "| sequences | first token, ms | tokens/s |",
        "|---|---|---|",
    ]
    for row in result["llm"]:
        lines.append(f"| {row['sequences']} | {1000 * row['prefill_seconds']:.0f} | {row['tokens_per_second']:,.0f} |")
    return "\n".join([*lines, ""])


def gpu_kernels_section(result: dict[str, Any]) -> str:
    lines = [
        "## Operators on one GPU",
        "",
        f"At bench-mini's widths, {_measured_on(result)}, medians of {result['runs']} runs in turns. Of the limit is "
        "the larger of the bytes at the speed of copying and the products at that of torch's best matrix product, over "
        f"what it took. {result.get('note', '')}".rstrip(),
        "",
        f"![shares of the limit]({_plot(result)})",
        "",
        "| operator | tokens | limit, us | Triton, us | of the limit | torch, us |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        limit, seconds = row["limit_seconds"], row["seconds"]
        torch = f"{1e6 * seconds['torch']:,.0f}" if "torch" in seconds else "-"
        lines.append(
            f"| {row['operator']} | {row['tokens']:,} | {1e6 * limit:,.0f} | {1e6 * seconds['triton']:,.0f} "
            f"| {limit / seconds['triton']:.2f} | {torch} |"
        )
    return "\n".join([*lines, ""])


def _plot(result: dict[str, Any]) -> str:
    """Drawn by `benchmarks/gpu_plots.py`."""
    return f"../benchmarks/results/{Path(result['file']).with_suffix('.png').name}"


def _measured_on(result: dict[str, Any]) -> str:
    rates = f"copies {result['copy'] / 1e9:,.0f} GB/s, multiplies {result['product'] / 1e12:,.0f} TFLOP/s in bfloat16"
    return f"{result['device']} ({rates}), {result['machine']['date']} (`{result['file']}`)"
