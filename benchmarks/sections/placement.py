"""Placement of experts."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
