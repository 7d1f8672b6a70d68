"""Inputs of the operators, and how near results must be."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.kernels.base import Rotation
from tests.checkpoints import tiny_config

DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}


class Widths(NamedTuple):
    """Of latent attention: heads in one group and in several, rows that are no whole vectors, values to their end."""

    heads: int = 6
    key: int = 40
    value: int = 32


WIDTHS = [Widths(), Widths(16, 48, 48), Widths(13, 37, 35), Widths(1, 7, 7)]


def paged_case(
    dtype: torch.dtype, tokens: int, longest: int = 16, seed: int = 0, widths: Widths = WIDTHS[0]
) -> dict[str, Any]:
    """Two sequences whose blocks are scattered and interleaved in the cache; contexts of 1 to `longest` positions."""
    block_size = 4
    blocks = -(-longest // block_size)
    tables = torch.randperm(2 * blocks, generator=torch.Generator().manual_seed(7)).to(torch.int32).view(2, blocks)
    return {
        "query": random(tokens, widths.heads, widths.key, dtype=dtype, seed=seed),
        "cache": random(2 * blocks * block_size, widths.key, dtype=dtype, seed=3),
        "block_tables": tables,
        "sequence_rows": torch.arange(tokens, dtype=torch.int32) % 2,
        "positions": torch.linspace(0, longest - 1, tokens).long(),
        "block_size": block_size,
        "value_width": widths.value,
        "scale": 0.3,
    }


def rotation(tokens: int, pairs: int, interleaved: bool) -> Rotation:
    angles = random(tokens, pairs, seed=5) * 3
    return Rotation(angles.cos(), angles.sin(), interleaved)


GATES: list[dict[str, Any]] = [
    {"topk_method": "greedy", "scoring_func": "softmax", "routed_scaling_factor": 2.5},
    {"topk_method": "group_limited_greedy", "scoring_func": "softmax", "n_group": 4, "topk_group": 2},
    {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 1, "topk_group": 1},
    {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 1.7},
    {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 2, "topk_group": 1, "norm_topk_prob": False},
]


def gate_config(**changes: Any) -> ModelConfig:
    version = "deepseek_v2" if changes["scoring_func"] == "softmax" else "deepseek_v3"
    return tiny_config(n_routed_experts=32, num_experts_per_tok=5, model_type=version, **changes)
