"""AdamW over two parameter groups: with and without weight decay."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from deepseek_ray.config.run import OptimizerConfig


def decays(name: str, parameter: nn.Parameter, decay_embeddings: bool) -> bool:
    """Whether weight decay applies: to matrices (and stacks of them), not to norms, biases or the gate's bias.

    The embedding is a table of vectors; decaying it shrinks rare tokens' rows, so it is left out unless asked for.
    """
    if parameter.ndim < 2 or name.endswith("e_score_correction_bias"):
        return False
    return decay_embeddings or "embed_tokens" not in name


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (decoupled weight decay, arXiv 1711.05101). The step sets each group's `lr` before it is used.

    A group without parameters (adapters are all matrices) is left out: DeepSpeed takes none.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            groups[decays(name, parameter, config.decay_embeddings)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if decayed else 0.0}
            for decayed, parameters in groups.items()
            if parameters
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
