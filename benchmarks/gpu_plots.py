"""The plots beside the results of one GPU: `python -m benchmarks.gpu_plots` draws them from the newest files.

They are not drawn where they are measured: a machine that is lent for a benchmark need not have matplotlib.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.results_file import RESULTS


def main() -> None:
    plots: dict[str, Callable[[dict[str, Any], Path], None]] = {"gpu_decode": plot_decode, "gpu_kernels": plot_kernels}
    for what, plot in plots.items():
        for path in sorted(RESULTS.glob(f"{what}_*.json")):
            plot(json.loads(path.read_text()), path.with_suffix(".png"))
            print(f"drew {path.with_suffix('.png').name}")


def plot_decode(result: dict[str, Any], path: Path) -> None:
    """Milliseconds of a step, and tokens per second of `LLM`, against the number of sequences."""
    figure, (steps, whole) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    rows = result["rows"]
    sequences = [row["sequences"] for row in rows]
    for name, style in (("torch", "o-"), ("operators", "o-"), ("graphs", "o-")):
        steps.plot(sequences, [1000 * row["seconds"][name] for row in rows], style, label=name)
    steps.plot(sequences, [1000 * row["limit_seconds"] for row in rows], "k--", label="limit")
    steps.set(xscale="log", yscale="log", xlabel="sequences", ylabel="ms", title="decode step")
    llm = result["llm"]
    ideal = [row["sequences"] / row["seconds"]["graphs"] for row in rows]
    whole.plot(sequences, ideal, "o-", color="tab:green", label="its steps alone (graphs)")
    whole.plot([row["sequences"] for row in llm], [row["tokens_per_second"] for row in llm], "o-", label="LLM")
    whole.set(xscale="log", yscale="log", xlabel="sequences", ylabel="tokens/s", title="whole engine")
    for axis in (steps, whole):
        axis.set_xticks(sequences, [str(number) for number in sequences])
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(f"bench-mini, {result['device']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_kernels(result: dict[str, Any], path: Path) -> None:
    """What share of the limit each operator reaches, and torch's in its place."""
    rows = result["rows"]
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(rows) + 1), layout="constrained")
    for offset, name in ((-0.2, "triton"), (0.2, "torch")):
        places = [index + offset for index, row in enumerate(rows) if name in row["seconds"]]
        shares = [row["limit_seconds"] / row["seconds"][name] for row in rows if name in row["seconds"]]
        bars = axis.barh(places, shares, height=0.4, label=name)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axis.set_yticks(range(len(rows)), [f"{row['operator']}, {row['tokens']:,} tokens" for row in rows])
    axis.axvline(1, color="black", linewidth=1, linestyle="--")
    axis.set(xlabel="of the limit", title=result["device"])
    axis.invert_yaxis()
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
