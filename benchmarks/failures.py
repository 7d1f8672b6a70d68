"""What each fault costs: streams in mid-generation, tokens compared with an undisturbed run, many runs of each.

    python -m benchmarks.failures runs/quickstart/model [--runs 20] [--streams 200] [--cells kill-shard ...]
    python -m benchmarks.failures bench-mini --streams 8 --dtype bfloat16 --prompt-tokens 512 --max-tokens 48

Writes benchmarks/results/failures_*.json and the tables of docs/failure-modes.md. What was measured before and is not
named now keeps its row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.bench_model import bench_mini_dir
from benchmarks.results_file import RESULTS, machine, results_path, write_results
from benchmarks.tables import write_between_marks
from deepseek_ray.chaos.cells import CELLS

PAGE = RESULTS.parent.parent / "docs" / "failure-modes.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", help="a checkpoint, or bench-mini")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=80)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    model_dir = bench_mini_dir() if options.model_dir == "bench-mini" else Path(options.model_dir)
    path = results_path("failures")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for cell in options.cells:
        row = _measure(cell, model_dir, options)
        rows = sorted([old for old in rows if _setting(old) != _setting(row)] + [row], key=_order)
        write_results("failures", {"question": __doc__.splitlines()[0], "rows": rows})  # type: ignore[union-attr]
        write_between_marks(PAGE, "failures", tables(rows))


def _measure(cell: str, model_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: each cell starts a cluster and leaves nothing."""
    command = [sys.executable, "-m", "deepseek_ray.cli.main", "chaos", str(model_dir), "--json", "--cell", cell]
    command += ["--runs", str(options.runs), "--streams", str(options.streams), "--dtype", options.dtype]
    command += ["--max-tokens", str(options.max_tokens), "--prompt-tokens", str(options.prompt_tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        raise SystemExit(f"{' '.join(command)} exited with {done.returncode}")
    (row,) = json.loads(done.stdout)  # promises that were broken are in it
    model = "quickstart" if model_dir.name == "model" else model_dir.name
    setting = {"streams": options.streams, "dtype": options.dtype, "model": model}
    setting |= {"prompt_tokens": options.prompt_tokens, "machine": machine()}
    return {**row, **setting, "promised_stall": CELLS[cell].promised_stall}


def _setting(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["dtype"], row["prompt_tokens"], row["cell"]


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"] != "quickstart", row["dtype"], row["prompt_tokens"], list(CELLS).index(row["cell"])


def tables(rows: list[dict[str, Any]]) -> str:
    """One table per model, dtype and length of prompts."""
    groups = itertools.groupby(rows, key=lambda row: _setting(row)[:-1])
    return "\n\n".join(
        f"{model}, {dtype}, prompts of up to {longest} tokens:\n\n{_table(list(group))}"
        for (model, dtype, longest), group in groups
    )


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| fault | runs x streams | in flight | failed requests | wrong tokens | stall, median (worst) | promised "
        "| p90 gap during / before |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        stall = "-" if row["stall_median"] is None else f"{row['stall_median']:.2f} s ({row['stall_worst']:.2f} s)"
        promised = "-" if row["promised_stall"] is None else f"{row['promised_stall']:g} s"
        gap = "-" if row["gap_p90_ratio"] is None else f"{row['gap_p90_ratio']:.2f}"
        lines.append(
            f"| {row['fault']} | {row['runs']} x {row['streams']} | {row['in_flight']} | {row['failed']} | "
            f"{row['wrong']} | {stall} | {promised} | {gap} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
