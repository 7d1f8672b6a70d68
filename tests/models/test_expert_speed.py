"""A shard's own measure of its speed."""

from __future__ import annotations

from pathlib import Path

import torch

from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_speed import seconds_per_expert
from deepseek_ray.models.expert_store import ExpertStore
from tests.checkpoints import tiny_config, write_random_checkpoint


def test_it_computes_held_experts_and_no_others(tmp_path: Path) -> None:
    config = tiny_config()
    write_random_checkpoint(tmp_path, config)
    reader = CheckpointReader(tmp_path)
    layer = config.moe_layers[-1]
    store = ExpertStore(reader, {layer: [1, 3]}, torch.float32)
    asked: list[list[int]] = []
    run = store.run

    def remember(layer: int, hidden: torch.Tensor, rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor | None:
        asked.append(experts.unique().tolist())
        return run(layer, hidden, rows, experts)

    store.run = remember  # type: ignore[method-assign]
    assert seconds_per_expert(store, config.hidden_size, torch.float32) > 0
    assert asked == [[1], [3]] * 2
    assert seconds_per_expert(ExpertStore(reader, {}, torch.float32), config.hidden_size, torch.float32) == 0.0
