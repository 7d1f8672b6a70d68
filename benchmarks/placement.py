"""How even, and with how many expert loads: EPLB's placements against `rebalance`, on Zipf-skewed loads.

A figure is the time of the busiest shard over the mean, averaged over layers: 1 is even. Loads are seeded, nothing is
timed, so every machine gives the same numbers. All but contiguous may hold one replica per shard and layer more than
there are experts; shards have slots for just that.

    python -m benchmarks.placement
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from benchmarks.results_file import write_results
from deepseek_ray.expert_parallel.eplb import rebalance_experts
from deepseek_ray.expert_parallel.placement import Placement, contiguous_placement
from deepseek_ray.expert_parallel.rebalance import rebalance
from deepseek_ray.expert_parallel.replicas import ShardCapacity, change_between, grid_of

SEED = 0
EXPONENTS = (0.4, 0.8, 1.2)
DRIFT_EXPONENT, DRIFT_STEPS, DRIFT_MEMORY = 0.8, 6, 0.98
"""Popularity of an expert from one rebalance to the next: correlation 0.98 of what its rank is drawn from."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    experts: int
    shards: int
    groups: int
    nodes: int

    @property
    def physical(self) -> int:
        return self.experts + self.shards


MODELS = (Model("V2-Lite-like", 26, 64, 8, 8, 2), Model("V3-like", 58, 256, 32, 8, 4))
SPEEDS = {"equal": (1.0, 1.0), "every second at half": (1.0, 0.5)}


@dataclass(frozen=True)
class Outcome:
    """A placement, and the time of the busiest shard over the mean for the loads it was made for."""

    placement: Placement
    max_over_mean: float


Strategy = Callable[[Model, Floats, list[ShardCapacity], Placement], Outcome]


def contiguous(model: Model, loads: Floats, shards: list[ShardCapacity], before: Placement) -> Outcome:
    placement = first_placement(model)
    return Outcome(placement, max_over_mean(placement, loads, shards))


def eplb_global(model: Model, loads: Floats, shards: list[ShardCapacity], before: Placement) -> Outcome:
    return _eplb(model, loads, shards, 1, 1)


def eplb_hierarchical(model: Model, loads: Floats, shards: list[ShardCapacity], before: Placement) -> Outcome:
    return _eplb(model, loads, shards, model.groups, model.nodes)


def ours(model: Model, loads: Floats, shards: list[ShardCapacity], before: Placement) -> Outcome:
    change = rebalance(before, shards, dict(enumerate(loads)), extra_replicas=model.shards)
    return Outcome(change.placement, max_over_mean(change.placement, loads, shards))


STRATEGIES: dict[str, Strategy] = {
    "contiguous": contiguous,
    "EPLB global": eplb_global,
    "EPLB hierarchical": eplb_hierarchical,
    "rebalance": ours,
}


def _eplb(model: Model, loads: Floats, shards: list[ShardCapacity], groups: int, nodes: int) -> Outcome:
    """Each of an expert's slots gets the same share there, also if two are on one shard."""
    experts, _, counts = rebalance_experts(loads, model.physical, groups, nodes, model.shards)
    shard_experts = experts.reshape(model.layers, model.shards, -1)
    work = np.take_along_axis(loads / counts, experts, 1).reshape(shard_experts.shape).sum(axis=2)
    speeds = np.array([shard.speed for shard in shards])
    placement: Placement = {
        layer: [tuple(np.flatnonzero((of_layer == expert).any(axis=1)).tolist()) for expert in range(model.experts)]
        for layer, of_layer in enumerate(shard_experts)
    }
    even = loads.sum(axis=1) / speeds.sum()
    return Outcome(placement, float(((work / speeds).max(axis=1) / even).mean()))


def first_placement(model: Model) -> Placement:
    return contiguous_placement(range(model.layers), model.experts, range(model.shards))


def max_over_mean(placement: Placement, loads: Floats, shards: list[ShardCapacity]) -> float:
    grid = grid_of(placement, shards, dict(enumerate(loads)))
    busiest = np.array([grid.times(layer).max() for layer in range(len(grid.layers))])
    return float((busiest / (loads.sum(axis=1) / grid.speeds.sum())).mean())


def shards_of(model: Model, speeds: tuple[float, float]) -> list[ShardCapacity]:
    slots = model.layers * model.physical // model.shards
    return [ShardCapacity(shard, speeds[shard % 2], slots) for shard in range(model.shards)]


def zipf_loads(popularity: Floats, exponent: float) -> Floats:
    """[layers, experts]: the r-th most popular expert of a layer gets r**-exponent."""
    ranks = np.argsort(np.argsort(-popularity, axis=1, kind="stable"), axis=1, kind="stable")
    return (ranks + 1.0) ** -exponent


def static_rows(model: Model) -> list[dict[str, Any]]:
    """From contiguous, once: every exponent, speeds and strategy."""
    rows = []
    popularity = np.random.default_rng(SEED).standard_normal((model.layers, model.experts))
    for exponent in EXPONENTS:
        loads = zipf_loads(popularity, exponent)
        for speeds_name, speeds in SPEEDS.items():
            for name, strategy in STRATEGIES.items():
                outcome = strategy(model, loads, shards_of(model, speeds), first_placement(model))
                adds = change_between(first_placement(model), outcome.placement).num_adds
                row = {"model": model.name, "exponent": exponent, "speeds": speeds_name, "strategy": name}
                rows.append({**row, "max_over_mean": round(outcome.max_over_mean, 3), "adds": adds})
                print(" ".join(f"{value}" for value in rows[-1].values()), flush=True)
    return rows


def drift_rows(model: Model) -> list[dict[str, Any]]:
    """Rebalanced again and again while the popularity of experts drifts; the first rebalance is not counted."""
    rows = []
    for name, strategy in STRATEGIES.items():
        random = np.random.default_rng(SEED)
        popularity = random.standard_normal((model.layers, model.experts))
        placement, shards = first_placement(model), shards_of(model, SPEEDS["equal"])
        figures, adds = [], []
        for _ in range(DRIFT_STEPS + 1):
            outcome = strategy(model, zipf_loads(popularity, DRIFT_EXPONENT), shards, placement)
            figures.append(outcome.max_over_mean)
            adds.append(change_between(placement, outcome.placement).num_adds)
            placement = outcome.placement
            noise = random.standard_normal(popularity.shape)
            popularity = DRIFT_MEMORY * popularity + (1 - DRIFT_MEMORY**2) ** 0.5 * noise
        mean = round(float(np.mean(figures[1:])), 3)
        rows.append({"model": model.name, "strategy": name, "max_over_mean": mean, "adds": adds[1:]})
        print("drift", " ".join(f"{value}" for value in rows[-1].values()), flush=True)
    return rows


def plot(rows: list[dict[str, Any]], drift: list[dict[str, Any]], path: Path) -> None:
    """Left: the busiest shard by exponent. Right: replicas loaded per rebalance while the load drifts."""
    model = MODELS[-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in STRATEGIES:
        chosen = [row for row in rows if (row["model"], row["speeds"], row["strategy"]) == (model.name, "equal", name)]
        left.plot([row["exponent"] for row in chosen], [row["max_over_mean"] for row in chosen], "o-", label=name)
    left.set(xlabel="Zipf exponent of the loads", ylabel="busiest shard / mean", yscale="log", xticks=EXPONENTS)
    left.set_yticks((1, 2, 4, 8), ("1", "2", "4", "8"))
    left.minorticks_off()
    left.legend(frameon=False)
    of_model = [row for row in drift if row["model"] == model.name and row["strategy"] != "contiguous"]
    bars = right.barh([row["strategy"] for row in of_model], [float(np.mean(row["adds"])) for row in of_model])
    for bar, name in zip(bars, list(STRATEGIES)[1:], strict=True):
        bar.set_color(f"C{list(STRATEGIES).index(name)}")
    right.bar_label(bars, fmt="%.0f", padding=3)
    right.set(xlabel="replicas loaded per rebalance, drifting load", xlim=(0, 1.1 * model.layers * model.physical))
    right.locator_params(axis="x", nbins=5)
    right.invert_yaxis()
    figure.suptitle(f"{model.name}: {model.layers} layers of {model.experts} experts on {model.shards} shards")
    figure.savefig(path, dpi=110)


def main() -> None:
    rows = [row for model in MODELS for row in static_rows(model)]
    drift = [row for model in MODELS for row in drift_rows(model)]
    result = {
        "question": "time of the busiest shard over the mean (mean of layers), and replicas loaded, by placement",
        "seed": SEED,
        "models": [{**asdict(model), "physical": model.physical} for model in MODELS],
        "drift": {"exponent": DRIFT_EXPONENT, "rebalances": DRIFT_STEPS, "correlation": DRIFT_MEMORY, "rows": drift},
        "rows": rows,
    }
    path = write_results("placement", result)
    plot(rows, drift, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
