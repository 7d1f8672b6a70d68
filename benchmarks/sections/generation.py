"""Generation by `LLM`: against peers, against the limit, and with weights of fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.results_file import measured_on
from benchmarks.roofline import LIMITS

Rows = dict[tuple[str, int], dict[str, Any]]
"""(system, sequences) -> what was measured."""

PEERS = ("transformers", "llama.cpp", "vllm")
OWN = ("local", "actors")


def generation_section(result: dict[str, Any]) -> str:
    """Tokens per second of each system, against the best peer of the same run and against the machine's limit."""
    rows = rows_of(result)
    bounds = {int(sequences): bound for sequences, bound in result["roofline_step_milliseconds"].items()}
    plot = Path(result["file"]).with_suffix(".png").name
    lines = [
        "## Generation: `LLM` against transformers, llama.cpp and vLLM on bench-mini",
        "",
        f"{measured_on(result)}, {result['threads']} threads, bfloat16, medians, rounds: {result['rounds']} "
        f"(`{result['file']}`). {LIMITS}. Actors: 1 attention worker, 2 shards.",
        "",
        f"![tokens per second of each system](../benchmarks/results/{plot})",
        "",
        "| sequences x prompt | system | prefill tokens/s | against the best peer | decode tokens/s "
        "| against the best peer | of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for (system, sequences), row in rows.items():
        if system in (*PEERS, *OWN):
            cells = [f"{sequences} x {row['prompt']}", system]
            for phase in ("prefill", "decode"):
                speed = row[f"{phase}_tokens_per_second"]
                cells += [f"{speed:.1f}", f"{speed / best(rows, PEERS, sequences, phase):.2f}x"]
            cells.append(f"{bounds[sequences] / row['decode_step_milliseconds']:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    ready = ", ".join(f"{system} {seconds:.1f} s" for system, seconds in result["ready_seconds"].items())
    lines += ["", f"From the start of the process to ready: {ready}.", ""]
    systems = {system for system, _ in rows}
    if {"local", "fast"} <= systems:
        lines += _deterministic(rows)
    if {"bfloat16", "int8", "int4"} <= systems:
        lines += _integers(rows)
    return "\n".join(lines)


def rows_of(result: dict[str, Any]) -> Rows:
    return {(row["system"], row["sequences"]): row for row in result["rows"]}


def best(rows: Rows, systems: tuple[str, ...], sequences: int, phase: str) -> float:
    """Tokens per second of the best of `systems` that were there, in the phase "prefill" or "decode"."""
    return max(rows[name, sequences][f"{phase}_tokens_per_second"] for name in systems if (name, sequences) in rows)


def _deterministic(rows: Rows) -> list[str]:
    lines = [
        "### What determinism costs",
        "",
        "The same run, `LLM` as it is against `deterministic=False`, which takes torch's own operators. Above 1.00x "
        "determinism costs nothing: our operators are the faster ones.",
        "",
        "| sequences | prefill tokens/s, deterministic / not | ratio | decode tokens/s, deterministic / not | ratio |",
        "|---|---|---|---|---|",
    ]
    for sequences in sorted({sequences for _, sequences in rows}):
        cells = [f"{sequences}"]
        for phase in ("prefill", "decode"):
            ours, torchs = (rows[system, sequences][f"{phase}_tokens_per_second"] for system in ("local", "fast"))
            cells += [f"{ours:.1f} / {torchs:.1f}", f"{ours / torchs:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _integers(rows: Rows) -> list[str]:
    lines = [
        "### Weights of fewer bits",
        "",
        "The same run, `LLM(quantization=...)` in one process, in turns with bfloat16 once more and with llama.cpp at "
        "the same width; what it does to the loss is in the next section.",
        "",
        "| sequences | weights | prefill tokens/s | decode tokens/s | decode against bfloat16 | against llama.cpp |",
        "|---|---|---|---|---|---|",
    ]
    for sequences in sorted({sequences for _, sequences in rows}):
        base = rows["bfloat16", sequences]["decode_tokens_per_second"]
        for kind, peer in (("bfloat16", ""), ("int8", "llama.cpp Q8_0"), ("int4", "llama.cpp Q4_0")):
            row, other = rows[kind, sequences], rows.get((peer, sequences))
            speed = row["decode_tokens_per_second"]
            against = f"{speed / other['decode_tokens_per_second']:.2f}x" if other else "-"
            lines.append(
                f"| {sequences} | {kind} | {row['prefill_tokens_per_second']:.1f} | {speed:.1f} "
                f"| {speed / base:.2f}x | {against} |"
            )
            if other:
                prefill, decode = other["prefill_tokens_per_second"], other["decode_tokens_per_second"]
                lines.append(f"| {sequences} | {peer} | {prefill:.1f} | {decode:.1f} | {decode / base:.2f}x | |")
    return [*lines, ""]


def quantization_section(result: dict[str, Any]) -> str:
    lines = [
        "## Weights of fewer bits: loss",
        "",
        f"The quickstart model on {result['tokens']:,} tokens of source it was not trained on, bfloat16 activations "
        f"(`{result['file']}`).",
        "",
        "| quantization | nats per token | against none |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['quantization']} | {row['nats_per_token']:.4f} | {100 * row['against_none']:+.3f} % |"
        for row in result["rows"]
    ]
    return "\n".join([*lines, ""])


def uneven_load_section(result: dict[str, Any]) -> str:
    """Decode where gates favour some experts, beside decode where they do not."""
    even = {(row["system"], row["sequences"]): row for row in result["rows"] if not row["strength"]}
    lines = [
        "## Uneven expert loads",
        "",
        "bench-mini, and bench-mini whose gates favour some experts; two shards hold all experts each (`actors`) or "
        f"half of them (`one replica`). {measured_on(result)}, {result['threads']} threads, medians of "
        f"{result['rounds']} rounds in turns (`{result['file']}`). Fewer experts are read then, "
        "which makes a step shorter.",
        "",
        "| busiest expert over the mean | sequences | system | decode tokens/s | against even loads | against local |",
        "|---|---|---|---|---|---|",
    ]
    speeds = {
        (row["strength"], row["system"], row["sequences"]): row["decode_tokens_per_second"] for row in result["rows"]
    }
    for row in result["rows"]:
        speed, system, sequences = row["decode_tokens_per_second"], row["system"], row["sequences"]
        before = speed / even[system, sequences]["decode_tokens_per_second"]
        local = speed / speeds[row["strength"], "local", sequences]
        cells = [f"{row['busiest_over_mean']:.1f}", f"{sequences}", system, f"{speed:.1f}", f"{before:.2f}x"]
        lines.append(f"| {' | '.join(cells)} | {local:.2f}x |")
    return "\n".join([*lines, ""])


def speculation_section(result: dict[str, Any]) -> str:
    """Drafts of a trained model, and what a draft costs a large one."""
    lines = [
        "## Speculative decoding",
        "",
        "The quickstart model, trained with a multi-token-prediction layer, continues source text that it was not "
        f"trained on; {measured_on(result)}, medians of {result['rounds']} rounds in turns (`{result['file']}`). "
        "Outputs are the same with and without drafts.",
        "",
        "| sequences | drafts by | right | tokens/s | against none |",
        "|---|---|---|---|---|",
    ]
    for row in result["trained"]:
        right = (
            "-" if row["right"] is None else f"{100 * row['right']:.0f} % of {row['drafts_per_token']:.2f} per token"
        )
        lines.append(
            f"| {row['sequences']} | {row['method']} | {right} | {row['tokens_per_second']:.0f} "
            f"| {row['against_none']:.2f}x |"
        )
    lines += [
        "",
        "bench-mini with drafts that are all right or all wrong (without the cost of making them): what lies between "
        "is a straight line.",
        "",
        "| sequences | tokens/s without | all right | all wrong | right drafts that pay |",
        "|---|---|---|---|---|",
    ]
    for row in result["cost"]:
        none, right, wrong = (row["tokens_per_second"][kind] for kind in ("none", "right", "wrong"))
        # A step costs 1 / wrong whatever is drafted; with a share a of right ones it gives 1 + a tokens.
        least = max(0.0, none / wrong - 1)
        lines.append(
            f"| {row['sequences']} | {none:.1f} | {right / none:.2f}x | {wrong / none:.2f}x | {100 * least:.0f} % |"
        )
    return "\n".join([*lines, ""])


def startup_section(result: dict[str, Any]) -> str:
    """Start-up and memory of each system, as parts of vLLM's where it was measured."""
    rows = {row["system"]: row for row in result["rows"]}
    peer = rows.get("vllm")
    lines = [
        "## From start to first token, and memory",
        "",
        f"bench-mini, bfloat16, checkpoint in the page cache, kernels built; {measured_on(result)}, medians of "
        f"{result['rounds']} rounds in turns (`{result['file']}`). Memory is the proportional share of all processes.",
        "",
        "| system | ready, s | first token, s | of vLLM's | memory, GiB |",
        "|---|---|---|---|---|",
    ]
    for system, row in rows.items():
        part = "-" if peer is None else f"{row['ready_seconds'] / peer['ready_seconds']:.2f}x"
        lines.append(
            f"| {system} | {row['ready_seconds']:.1f} | {row['first_token_seconds']:.1f} | {part} "
            f"| {row['memory_bytes'] / 2**30:.1f} |"
        )
    return "\n".join([*lines, ""])


_PARTS = {
    "attention": "attention, its products and norms",
    "moe": "mixtures of experts, gates included",
    "dense network": "the dense layer's network",
    "head": "output head",
}


def step_profile_section(result: dict[str, Any]) -> str:
    """Operators of a decode step, and of a step through actors what shards compute."""
    lines = [
        "## Where the time of a decode step goes",
        "",
        f"bench-mini, bfloat16; {measured_on(result)}, {result['threads']} threads (`{result['file']}`). Of one "
        "process the operators, whole parts of a layer each, with how fast they read their weights (with more rows "
        "they multiply instead of waiting for memory), beside reading memory with torch at that "
        "moment; of actors what the two shards compute of it.",
        "",
        "| sequences | step, ms | of it | ms | GB/s |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        step, first = row["step_milliseconds"], f"| {row['sequences']} | {row['step_milliseconds']:.1f} |"
        if row["system"] == "actors":
            computed = " and ".join(f"{each:.1f}" for each in row["computed_by_shards"])
            lines.append(f"{first} actors: shards compute | {computed} | |")
            lines.append(f"| | | actors: attention, frames, waiting | {step - max(row['computed_by_shards']):.1f} | |")
            continue
        lines.append(f"{first} (reading memory) | | {row['read_gigabytes_per_second']:.1f} |")
        left = step
        for name, own in row["operators"].items():
            left -= own["milliseconds"]
            read = own["gigabytes_per_second"]
            told = f"{own['milliseconds']:.1f} | {f'{read:.1f}' if read else ''}"
            lines.append(f"| | | {_PARTS.get(name, name)} | {told} |")
        lines.append(f"| | | Python and torch in between | {max(0.0, left):.1f} | |")
    return "\n".join([*lines, ""])
