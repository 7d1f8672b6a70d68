"""Small checkpoints for tests: random weights in the Hugging Face layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.models.save import save_checkpoint
from deepseek_ray.models.shapes import parameter_shapes

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "max_position_embeddings": 256,
}


def tiny_config(**changes: Any) -> ModelConfig:
    return ModelConfig.parse({**TINY, **changes})


def write_random_checkpoint(directory: Path, config: ModelConfig, seed: int = 0, std: float = 0.3) -> Path:
    """Weights N(0, std), norms near one; the correction bias takes both signs."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for name, shape in parameter_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        tensors.append((name, 1 + 0.1 * noise if name.endswith("norm.weight") else std * noise))
    save_checkpoint(directory, config, tensors)
    return directory
