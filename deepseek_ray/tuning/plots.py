"""A sweep as pictures: learning curves, Pareto front, importance of parameters, parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deepseek_ray.tuning.importance import parameter_importance
from deepseek_ray.tuning.records import TrialRecord, best_first, pareto_front, tokens_per_step
from deepseek_ray.tuning.settings import SweepSettings

_GRAY, _BEST = "0.75", "tab:orange"
_MOST_TICKS = 8
_LABEL_WIDTH = 14


def plot_sweep(records: Sequence[TrialRecord], settings: SweepSettings, directory: Path) -> list[Path]:
    """Draw what the trials so far allow; returns the files written."""
    plots: dict[str, Callable[[Sequence[TrialRecord], SweepSettings], Figure | None]] = {
        "learning_curves.png": learning_curves,
        "pareto_front.png": pareto,
        "importance.png": importance,
        "parallel_coordinates.png": parallel_coordinates,
    }
    written = []
    for name, draw in plots.items():
        figure = draw(records, settings)
        if figure is not None:
            figure.savefig(directory / name, dpi=120)
            written.append(directory / name)
    return written


def learning_curves(records: Sequence[TrialRecord], settings: SweepSettings) -> Figure | None:
    """The metric over tokens, one line per trial; a cross where the scheduler stopped one."""
    ranked = best_first(records, settings)
    if not ranked:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for record in reversed(ranked):  # the best is drawn last, over the others
        best = record is ranked[0]
        curve = record.curve(settings.metric, tokens_per_step(record, settings))
        style: dict[str, Any] = {"color": _BEST, "linewidth": 2} if best else {"color": _GRAY, "linewidth": 1}
        axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=record.name if best else None, **style)
        if record.status == "stopped":
            axes.plot(*curve[-1], "x", color="tab:red", markersize=6)
    axes.plot([], [], "x", color="tab:red", label="stopped early")
    axes.set_xlabel("training tokens")
    axes.set_ylabel(settings.metric)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def pareto(records: Sequence[TrialRecord], settings: SweepSettings) -> Figure | None:
    """The first two objectives of every finished trial; the front is joined up and named. None for one objective."""
    front = pareto_front(records, settings)
    if len(settings.objectives) < 2 or not front:
        return None
    first, second = settings.objectives[:2]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    finished = [record for record in records if first in record.metrics and second in record.metrics]
    axes.scatter(
        [record.metrics[second] for record in finished], [record.metrics[first] for record in finished], color=_GRAY
    )
    points = sorted((record.metrics[second], record.metrics[first], record.name) for record in front)
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o--", color=_BEST, label="Pareto front")
    for x, y, name in points:
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.margins(0.12)
    axes.set_xlabel(second)
    axes.set_ylabel(first)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def importance(records: Sequence[TrialRecord], settings: SweepSettings) -> Figure | None:
    """Share of each parameter in who is among the best (PED-ANOVA). None when there is too little to tell from."""
    shares = parameter_importance(records, settings)
    if not shares:
        return None
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(shares)), layout="constrained")
    axes = figure.add_subplot()
    names = list(shares)[::-1]
    bars = axes.barh(names, [shares[name] for name in names], color="tab:blue")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlim(0, 1.1 * max(max(shares.values()), 0.01))
    axes.set_xlabel(f"importance for {settings.metric} (PED-ANOVA)")
    return figure


def parallel_coordinates(records: Sequence[TrialRecord], settings: SweepSettings) -> Figure | None:
    """One line per trial through its parameters to its metric; the darker, the better."""
    ranked = best_first(records, settings)
    names = [name for name in _names(ranked) if len({repr(record.params.get(name)) for record in ranked}) > 1]
    if len(ranked) < 2 or not names:
        return None
    scales = [_Scale([record.params.get(name) for record in ranked]) for name in names]
    scales.append(_Scale([record.metrics[settings.metric] for record in ranked]))
    figure = Figure(figsize=(max(6.0, 1.6 * len(scales)), 5), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"]
    for place, record in reversed(list(enumerate(ranked))):
        values = [*(record.params.get(name) for name in names), record.metrics[settings.metric]]
        heights = [scale.height(value) for scale, value in zip(scales, values, strict=True)]
        share = place / (len(ranked) - 1)
        axes.plot(heights, color=colours(0.9 * share), alpha=1 - 0.6 * share, linewidth=2.5 - 1.5 * share)
    for place, scale in enumerate(scales):
        _draw_axis(axes, place, scale)
    labels = [_wrap(name) for name in [*names, settings.metric]]
    axes.set_xticks(range(len(scales)), labels, fontsize=8)
    axes.set_xlim(-0.3, len(scales) - 0.4)
    axes.set_yticks([])
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


class _Scale:
    """Where a value stands on a parallel axis, 0 to 1: logarithmic when values span more than a decade."""

    def __init__(self, values: Sequence[Any]) -> None:
        present = [value for value in values if value is not None]
        self.numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in present)
        if not self.numeric:
            self.choices = sorted({str(value) for value in values})
            return
        self.low, self.high = min(present), max(present)
        self.log = self.low > 0 and self.high / self.low > 10
        self.lacking = len(present) < len(values)

    def height(self, value: Any) -> float:
        if not self.numeric:
            return self.choices.index(str(value)) / max(len(self.choices) - 1, 1)
        if value is None:  # a conditional parameter that this trial does not have
            return -0.08
        if self.high == self.low:
            return 0.5
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        if not self.numeric:
            return [(self.height(choice), choice) for choice in self.choices[:_MOST_TICKS]]
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        marks = [(self.height(value), f"{value:.3g}") for value in dict.fromkeys((self.low, middle, self.high))]
        return [*marks, (-0.08, "none")] if self.lacking else marks


def _draw_axis(axes: Axes, place: int, scale: _Scale) -> None:
    axes.plot([place, place], [0, 1], color="black", linewidth=0.8)
    for height, text in scale.ticks():
        axes.annotate(
            text, (place, height), textcoords="offset points", xytext=(4, 0), fontsize=7, va="center",
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
        )  # fmt: skip


def _names(records: Sequence[TrialRecord]) -> list[str]:
    """Every parameter that any trial has, in the order of the space."""
    return list(dict.fromkeys(name for record in records for name in record.params))


def _wrap(name: str) -> str:
    """A long dotted name on several lines."""
    return name.replace(".", ".\n").replace("_", "_\n") if len(name) > _LABEL_WIDTH else name
