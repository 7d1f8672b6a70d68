"""`deepseek-ray experts`: where the experts are, and how much each has to do."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from deepseek_ray.cli.running import Address, AsJson, Name, running_deployment


def experts(name: Name = None, address: Address = None, as_json: AsJson = False) -> None:
    """Show the load of every expert in the last minute, and which shards hold it.

    [bold]Examples[/bold]

      deepseek-ray experts\n
      deepseek-ray experts --json | jq '.layers["1"][0]'
    """
    with running_deployment(name, address) as found:
        from deepseek_ray.actors.deployment import deployment_experts

        shown = deployment_experts(found)
    print(json.dumps(shown) if as_json else _picture(shown))


def _picture(shown: dict[str, Any]) -> str:
    from deepseek_ray.cli.terminal_plots import heat_map

    layers = {int(layer): experts for layer, experts in shown["layers"].items()}
    rows = []
    for experts in layers.values():
        tokens = [expert["tokens"] for expert in experts]
        mean = sum(tokens) / len(tokens)
        rows.append([count / mean if mean else 0.0 for count in tokens])
    held, replicated = Counter[int](), 0
    for experts in layers.values():
        for expert in experts:
            held.update(expert["shards"])
            replicated += len(expert["shards"]) > 1
    total = sum(expert["tokens"] for experts in layers.values() for expert in experts)
    shards = ", ".join(f"shard {shard}: {count}" for shard, count in sorted(held.items()))
    return "\n".join(
        [
            f"epoch {shown['epoch']}; {total:,} expert calls of tokens in the last {shown['window_seconds']:g} s",
            heat_map(rows, list(layers)),
            f"experts held, all layers: {shards}; {replicated} experts have several replicas",
        ]
    )
