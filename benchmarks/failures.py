"""What each fault costs: streams in mid-generation, tokens compared with an undisturbed run, many runs of each.

    python -m benchmarks.failures runs/quickstart/model [--runs 20] [--streams 200] [--cells kill-shard ...]

Writes benchmarks/results/failures_*.json and the table of docs/failure-modes.md. A cell that was measured before and is
not named now keeps its row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.results_file import RESULTS, machine, results_path, write_results
from benchmarks.tables import write_between_marks
from deepseek_ray.chaos.cells import CELLS

PAGE = RESULTS.parent.parent / "docs" / "failure-modes.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=80)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    path = results_path("failures")
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    for cell in options.cells:
        rows[cell] = _measure(cell, options)
        ordered = {name: rows[name] for name in CELLS if name in rows}
        write_results("failures", {"question": __doc__.splitlines()[0], "rows": ordered})  # type: ignore[union-attr]
        write_between_marks(PAGE, "failures", table(ordered))


def _measure(cell: str, options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: each cell starts a cluster and leaves nothing."""
    command = [sys.executable, "-m", "deepseek_ray.cli.main", "chaos", str(options.model_dir), "--json", "--cell", cell]
    command += ["--runs", str(options.runs), "--streams", str(options.streams), "--dtype", options.dtype]
    command += ["--max-tokens", str(options.max_tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):  # 1: promises broken, and the row says which
        raise SystemExit(f"{' '.join(command)} exited with {done.returncode}")
    (row,) = json.loads(done.stdout)
    setting = {"streams": options.streams, "dtype": options.dtype, "model": options.model_dir.name}
    return {**row, **setting, "promised_stall": CELLS[cell].promised_stall, "machine": machine()}


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| fault | runs x streams | in flight | failed requests | wrong tokens | stall, median (worst) | promised "
        "| p90 gap during / before |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
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
