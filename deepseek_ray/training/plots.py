"""A run's metrics as pictures: the loss curve, and which experts its tokens went to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

LOSS_CURVE_FILE = "loss_curve.png"
EXPERT_HEAT_MAP_FILE = "expert_heat_map.png"

Metrics = Sequence[Mapping[str, Any]]
"""Lines of `metrics.jsonl`, in order."""


def plot_loss_curve(metrics: Metrics, path: Path, baselines: Mapping[str, float] | None = None) -> None:
    """Training and validation loss over tokens; `baselines` (name -> nats per token) are drawn as lines."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    tokens = tokens_seen(metrics)
    axes.plot(tokens, [line["loss"] for line in metrics], linewidth=1, color="tab:blue", label="training")
    pairs = zip(tokens, metrics, strict=True)
    validated = [(seen, line["validation_loss"]) for seen, line in pairs if is_validated(line)]
    if validated:
        axes.plot(*zip(*validated, strict=True), "o-", color="tab:orange", label="validation")
    for (name, value), style in zip((baselines or {}).items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color="tab:gray", linestyle=style, label=name)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_expert_heat_map(counts: Sequence[Sequence[int]], layers: Sequence[int], path: Path) -> None:
    """counts: [MoE layers][experts] tokens of the validation split; colour is load relative to an even share."""
    relative = relative_load(counts)
    figure = Figure(figsize=(max(5.0, 0.45 * len(relative[0]) + 2), 0.5 * len(relative) + 2), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(relative, aspect="auto", cmap="viridis", vmin=0, vmax=max(2.0, max(map(max, relative))))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_xticks(range(len(relative[0])))
    axes.set_title("expert load on the validation split (1.0 = an even share)")
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)


def tokens_seen(metrics: Metrics) -> list[int]:
    """Training tokens up to and including each line."""
    seen, total = [], 0
    for line in metrics:
        total += int(line["tokens"])
        seen.append(total)
    return seen


def is_validated(line: Mapping[str, Any]) -> bool:
    return "validation_loss" in line


def relative_load(counts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Each expert's tokens divided by its layer's mean; zeros for a layer without tokens."""
    return [[count * len(row) / max(sum(row), 1) for count in row] for row in counts]
