"""Writes the tables of `docs/performance.md` from the newest results files.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.results_file import RESULTS

Rows = dict[tuple[str, int], dict[str, Any]]
"""(system, sequences) -> what was measured."""
PAGE = RESULTS.parent.parent / "docs" / "performance.md"
_HEAD = """# Speed

Every figure is measured on one machine in one run with interleaved rounds; only ratios within a table mean anything.
This page is written by `python -m benchmarks.tables` from `benchmarks/results/`; `make bench` measures again.
"""


def main() -> None:
    written = {
        "generation": generation_section,
        "quantization": quantization_section,
        "long_context": long_context_section,
        "frame_round_trip": frames_section,
        "placement": placement_section,
        "strategies": strategies_section,
        "tuning": tuning_section,
    }
    sections = [_HEAD, *(section(newest(what)) for what, section in written.items() if list(results_of(what)))]
    PAGE.write_text("\n".join(sections), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(RESULTS.parent.parent)}")


def write_between_marks(page: Path, name: str, text: str) -> None:
    """Put `text` between the page's comments `<!-- name: begin -->` and `<!-- name: end -->`."""
    content = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = content.split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")
    print(f"wrote {page.relative_to(RESULTS.parent.parent)}")


def results_of(what: str) -> Iterator[Path]:
    return RESULTS.glob(f"{what}_*.json")


def newest(what: str) -> dict[str, Any]:
    path = max(results_of(what), key=lambda found: found.stem.rsplit("_", 1)[1])
    return {**json.loads(Path(path).read_text()), "file": path.name}


PEERS = ("transformers", "llama.cpp", "vllm")
OWN = ("local", "actors")
_LIMITS = "The limit is the sum over operators of max(bytes / read bandwidth, FLOP / matmul rate), measured in the run"


def generation_section(result: dict[str, Any]) -> str:
    """Tokens per second of each system, against the best peer of the same run and against the machine's limit."""
    rows = {(row["system"], row["sequences"]): row for row in result["rows"]}
    bounds = {int(sequences): bound for sequences, bound in result["roofline_step_milliseconds"].items()}
    plot = Path(result["file"]).with_suffix(".png").name
    lines = [
        "## Generation: `LLM` against transformers, llama.cpp and vLLM on bench-mini",
        "",
        f"{_machine(result)}, {result['threads']} threads, bfloat16, medians of {result['rounds']} rounds "
        f"(`{result['file']}`). {_LIMITS}. Actors: 1 attention worker, 2 shards.",
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
                cells += [f"{speed:.1f}", f"{speed / _best_peer(rows, sequences, phase):.2f}x"]
            cells.append(f"{bounds[sequences] / row['decode_step_milliseconds']:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    ready = ", ".join(f"{system} {seconds:.1f} s" for system, seconds in result["ready_seconds"].items())
    lines += ["", f"From the start of the process to ready: {ready}.", ""]
    systems = {system for system, _ in rows}
    if {"local", "fast"} <= systems:
        lines += _deterministic(rows)
    if {"local", "int8", "int4"} <= systems:
        lines += _integers(rows)
    return "\n".join(lines)


def _best_peer(rows: Rows, sequences: int, phase: str) -> float:
    return max(rows[peer, sequences][f"{phase}_tokens_per_second"] for peer in PEERS if (peer, sequences) in rows)


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
        "The same run, `LLM(quantization=...)` in one process; what it does to the loss is in the next section.",
        "",
        "| sequences | quantization | decode tokens/s | against bfloat16 |",
        "|---|---|---|---|",
    ]
    for sequences in sorted({sequences for _, sequences in rows}):
        base = rows["local", sequences]["decode_tokens_per_second"]
        for kind in ("int8", "int4"):
            speed = rows[kind, sequences]["decode_tokens_per_second"]
            lines.append(f"| {sequences} | {kind} | {speed:.1f} | {speed / base:.2f}x |")
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


def long_context_section(result: dict[str, Any]) -> str:
    lines = [
        "## Long contexts",
        "",
        f"A decode step of {result['sequences']} sequences of bench-mini over a cache of random latents, bfloat16. "
        f"{_machine(result)}, {result['threads']} threads (`{result['file']}`). {_LIMITS}.",
        "",
        "| positions | step, ms | of the limit |",
        "|---|---|---|",
    ]
    for row in result["rows"]:
        ratio = row["step_milliseconds"] / row["limit_milliseconds"]
        lines.append(f"| {row['context']:,} | {row['step_milliseconds']:.0f} | {ratio:.2f}x |")
    return "\n".join([*lines, ""])


def frames_section(result: dict[str, Any]) -> str:
    micros = result["microseconds"]
    lines = [
        "## Frame round trip between two processes on one node",
        "",
        f"{_machine(result)}, {result['bytes_each_way'] // 1024} KB each way, medians of {result['runs']} runs "
        f"(`{result['file']}`). Bare is an eventfd wake-up and a memcpy.",
        "",
        "| way | microseconds | against bare |",
        "|---|---|---|",
    ]
    lines += [f"| {way} | {value:.0f} | {value / micros['bare']:.1f}x |" for way, value in micros.items()]
    return "\n".join([*lines, ""])


def placement_section(result: dict[str, Any]) -> str:
    """The busiest shard over the mean and the replicas loaded, per model, skew, shard speeds and strategy."""
    drift = result["drift"]
    plot = Path(result["file"]).with_suffix(".png").name
    lines = [
        "## Expert placement: how even, and at what price",
        "",
        "Time of the busiest shard over the mean (mean of layers, 1 is even) and, in brackets, how many replicas "
        "shards have to load, from contiguous runs, for Zipf loads "
        f"(`{result['file']}`; seeded, so the same on every machine). "
        "EPLB and `rebalance` may use one replica per shard and layer more than there are experts. EPLB does not look "
        "at what a shard holds or how fast it is; `rebalance` does, leaves layers within 10 % of the best alone and "
        "brings the others within 5 %.",
        "",
        f"![busiest shard and replicas loaded](../benchmarks/results/{plot})",
        "",
    ]
    lines += _placement_table(result["rows"], ("model", "exponent", "speeds"), lambda row: f"{row['adds']}")
    lines += [
        "",
        f"The same while the popularity of experts drifts (exponent {drift['exponent']}, equal shards): mean of "
        f"{drift['rebalances']} rebalances, each from the placement before.",
        "",
    ]
    lines += _placement_table(drift["rows"], ("model",), lambda row: f"{statistics.mean(row['adds']):.0f}")
    return "\n".join([*lines, ""])


def _placement_table(
    rows: list[dict[str, Any]], case: tuple[str, ...], adds: Callable[[dict[str, Any]], str]
) -> list[str]:
    """One line per case, one column per strategy."""
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    cells: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        cells.setdefault(tuple(row[name] for name in case), []).append(f"{row['max_over_mean']:.2f} ({adds(row)})")
    lines = [f"| {' | '.join([*case, *strategies])} |", "|---" * (len(case) + len(strategies)) + "|"]
    return lines + [f"| {' | '.join([*map(str, key), *of_case])} |" for key, of_case in cells.items()]


def strategies_section(result: dict[str, Any]) -> str:
    """Loss, bytes and speed of each training strategy against one worker, or against ddp."""
    lines = [
        "## Training strategies on two gloo workers",
        "",
        f"{_machine(result)}, one thread per worker, {result['parameters'] / 1e6:.1f} M parameters, {result['steps']} "
        f"steps in float32 (`{result['file']}`). One worker holds {result['bytes_of_one_worker'] / 1e6:.1f} MB of "
        "weights, gradients and optimiser state. Losses differ by the order of sums alone. Bytes are those of the "
        "fuller worker.",
        "",
        "| strategy | largest loss difference, nats | MB per worker | tokens/s against ddp |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['max_loss_difference']:.1e} | {row['bytes_per_rank'] / 1e6:.1f} | "
        f"{row['tokens_per_second_to_ddp']:.2f}x |"
        for name, row in result["strategies"].items()
    ]
    return "\n".join([*lines, ""])


def tuning_section(result: dict[str, Any]) -> str:
    """The best trial of each sweep against the run file as it is, at equal training tokens."""
    lines = [
        "## What a sweep finds",
        "",
        f"`{result['config']}` as it is against the best of {result['trials']} trials of `{result['space']}`, "
        f"{result['tokens_per_trial']:,} training tokens each (`{result['file']}`). Validation loss in nats; the last "
        "two columns train both again from other weights on another order of the data, because the best of many trials "
        "owes a part of its lead to luck.",
        "",
        "| seed | default | best | default again | best again | trials finished / stopped early / failed |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['seed']} | {row['default']:.3f} | {row['best']:.3f} | {row['retrained_default']:.3f} | "
        f"{row['retrained_best']:.3f} | {row['finished']} / {row['stopped']} / {row['failed']} |"
        for row in result["rows"]
    ]
    return "\n".join([*lines, ""])


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['cores']} cores of {machine['cpu']}, {machine['date']}"


if __name__ == "__main__":
    main()
