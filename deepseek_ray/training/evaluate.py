"""Validation: loss over the validation split, and how its tokens spread over the experts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.data.blocks import TokenBlocks
from deepseek_ray.data.loader import validation_batches
from deepseek_ray.errors import TrainingError
from deepseek_ray.models.decoder import DeepSeekForCausalLM
from deepseek_ray.training.loss import IGNORED_TARGET, cross_entropy_sum, next_tokens
from deepseek_ray.training.ranks import Ranks
from deepseek_ray.training.step import autocast, documents_to_mask


@dataclass(frozen=True)
class Validation:
    """What a validation measured; equal on every worker."""

    loss: float
    """Cross-entropy per predicted token, nats."""
    bits_per_byte: float
    expert_counts: list[list[int]]
    """One list per layer with experts: tokens sent to each expert."""


@torch.no_grad()
def validate(
    model: DeepSeekForCausalLM, blocks: TokenBlocks, config: PretrainConfig, ranks: Ranks, max_samples: int | None
) -> Validation:
    """Loss over the first `max_samples` samples of the split (None: all), shared among the workers.

    Changes nothing of the model, its expert counts and its random number generators included.
    """
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    load = _empty_load(model)
    length, size = config.data.sequence_length, config.training.micro_batch_size
    for batch in validation_batches(blocks, length, size, ranks.rank, ranks.world_size, max_samples):
        targets = next_tokens(batch["tokens"], batch["document_ids"])
        mask_ids = documents_to_mask(batch["document_ids"][:, :-1])
        with autocast(config, ranks.device):
            output = model(
                batch["tokens"][:, :-1].to(ranks.device), None if mask_ids is None else mask_ids.to(ranks.device)
            )
        totals[0] += cross_entropy_sum(output.logits, targets.to(ranks.device))
        totals[1] += (targets != IGNORED_TARGET).sum()
        for layer, gate in enumerate(output.gates):
            load[layer] += gate.expert_ids.flatten().bincount(minlength=load.shape[1]).cpu()
    nats, count = ranks.sum(totals).tolist()
    if not count:
        raise TrainingError(
            f"the validation split has {blocks.num_tokens} tokens, too few for one sample of data.sequence_length "
            f"{length}; raise data.validation_fraction or shorten the sequences"
        )
    loss = nats / count
    return Validation(loss, loss / (math.log(2) * blocks.bytes_per_token), ranks.sum(load).cpu().tolist())


def _empty_load(model: DeepSeekForCausalLM) -> Tensor:
    return torch.zeros(len(model.config.moe_layers), model.config.n_routed_experts, dtype=torch.int64)
