"""Plots of results files whose benchmarks draw none themselves: what was measured of each system, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    bars: dict[str, float]
    """Name -> value."""


def draw(panels: list[Panel], path: Path) -> None:
    """Horizontal bars, a panel beside the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = max(len(panel.bars) for panel in panels)
    size = (4.2 * len(panels), 1.2 + 0.3 * rows)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        bars = axis.barh(list(panel.bars), list(panel.bars.values()), color="tab:blue")
        labels = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in panel.bars.values()]
        axis.bar_label(bars, labels, padding=2, fontsize=8)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(panel.unit)
        axis.invert_yaxis()
        axis.margins(x=0.18)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _long_context(result: dict[str, Any]) -> list[Panel]:
    rows = result["rows"]
    steps = {f"{row['context']:,}": row["step_milliseconds"] for row in rows}
    ratios = {f"{row['context']:,}": row["step_milliseconds"] / row["limit_milliseconds"] for row in rows}
    title = f"{result['sequences']} sequences over so many positions"
    return [Panel(title, "ms a step", steps), Panel("the same", "times the limit", ratios)]


def _http(result: dict[str, Any]) -> list[Panel]:
    rows = sorted(result["rows"], key=lambda row: row["streams"])
    rows = [row for row in rows if row["system"] not in ("trivial", "small")]
    names = [f"{row['system']}, {row['streams']}" for row in rows]

    def panel(title: str, unit: str, field: str) -> Panel:
        return Panel(title, unit, dict(zip(names, (row[field] for row in rows), strict=True)))

    return [
        panel("server, streams: first token", "ms, p50", "first_p50_milliseconds"),
        panel("between tokens", "ms, p50", "gap_p50_milliseconds"),
        panel("all streams", "tokens/s", "tokens_per_second"),
    ]


def _startup(result: dict[str, Any]) -> list[Panel]:
    rows = result["rows"]
    return [
        Panel("from start to ready", "s", {row["system"]: row["ready_seconds"] for row in rows}),
        Panel("to the first token", "s", {row["system"]: row["first_token_seconds"] for row in rows}),
        Panel("memory", "GiB", {row["system"]: row["memory_bytes"] / 2**30 for row in rows}),
    ]


def _frames(result: dict[str, Any]) -> list[Panel]:
    return [Panel("a frame there and back", "microseconds", result["microseconds"])]


def _training(result: dict[str, Any]) -> list[Panel]:
    rows = result["rows"]
    speeds = Panel("training", "tokens/s", {row["system"]: row["tokens_per_second"] for row in rows})
    return [speeds, *(Panel(f"{row['system']}: a step", "ms", row["profile"]) for row in rows)]


def _step_profile(result: dict[str, Any]) -> list[Panel]:
    return [
        Panel(
            f"sequences: {row['sequences']}, a step of {row['step_milliseconds']:.0f} ms",
            "ms",
            {name: own["milliseconds"] for name, own in row["operators"].items()},
        )
        for row in result["rows"]
        if row["system"] == "local"
    ]


def _uneven_load(result: dict[str, Any]) -> list[Panel]:
    return [
        Panel(
            f"{count} sequences; busiest expert over the mean",
            "tokens/s",
            {
                f"{row['system']}, {row['busiest_over_mean']:.1f}": row["decode_tokens_per_second"]
                for row in result["rows"]
                if row["sequences"] == count
            },
        )
        for count in sorted({row["sequences"] for row in result["rows"]})
    ]


def _quantization(result: dict[str, Any]) -> list[Panel]:
    rises = {row["quantization"]: 100 * row["against_none"] for row in result["rows"]}
    return [Panel("loss against unquantised weights", "%", rises)]


def _speculation(result: dict[str, Any]) -> list[Panel]:
    speeds = {f"{row['method']}, {row['sequences']}": row["against_none"] for row in result["trained"]}
    return [Panel("drafts, sequences", "times the speed without", speeds)]


def _strategies(result: dict[str, Any]) -> list[Panel]:
    rows = result["strategies"]
    return [
        Panel("speed", "times ddp's", {name: row["tokens_per_second_to_ddp"] for name, row in rows.items()}),
        Panel("memory of a worker", "MB", {name: row["bytes_per_rank"] / 1e6 for name, row in rows.items()}),
    ]


def _tuning(result: dict[str, Any]) -> list[Panel]:
    bars = {f"seed {row['seed']}: {name}": row[name] for row in result["rows"] for name in ("default", "best")}
    return [Panel("validation loss", "nats", bars)]


PANELS: dict[str, Callable[[dict[str, Any]], list[Panel]]] = {
    "long_context": _long_context,
    "http_load": _http,
    "startup": _startup,
    "frame_round_trip": _frames,
    "training": _training,
    "step_profile": _step_profile,
    "uneven_load": _uneven_load,
    "quantization": _quantization,
    "speculation": _speculation,
    "strategies": _strategies,
    "tuning": _tuning,
}
"""Question -> panels of its results."""
