"""Validation: loss over the validation split, and how its tokens spread over the experts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepseek_ray.data.blocks import TokenBlocks
from deepseek_ray.data.loader import read_batch, validation_batches
from deepseek_ray.errors import TrainingError
from deepseek_ray.training.objective import MicroBatch
from deepseek_ray.training.parallel import Parallelism


@dataclass(frozen=True)
class Validation:
    """What a validation measured; equal on every worker."""

    loss: float
    """Cross-entropy per predicted token, nats."""
    bits_per_byte: float
    expert_counts: list[list[int]]
    """One list per layer with experts: tokens sent to each expert."""


def validate(parallelism: Parallelism, blocks: TokenBlocks, max_samples: int | None) -> Validation:
    """Loss over the first `max_samples` samples of the split (None: all), shared among the workers.

    Every worker makes equally many forward passes, because sharded models exchange in them; who has read all its
    samples repeats the first ones without counting them. Changes nothing of the model, its expert counts and its
    random number generators included.
    """
    config, data = parallelism.config, parallelism.data
    length, size = config.data.sequence_length, config.training.micro_batch_size
    num_samples = blocks.num_samples(length)
    if max_samples is not None:
        num_samples = min(max_samples, num_samples)
    totals = torch.zeros(2, dtype=torch.float64, device=data.device)
    load: Tensor | None = None
    own = validation_batches(blocks, length, size, data.rank, data.world_size, num_samples)
    for _ in range(math.ceil(num_samples / (data.world_size * size))):
        batch = next(own, None)
        part = MicroBatch.of(batch or read_batch(blocks, np.arange(1), length), 1, data.device)
        nats, counts = parallelism.validation_sums(part)
        load = torch.zeros_like(counts) if load is None else load
        if batch is not None:
            totals += torch.stack([nats.double(), part.counts[0].to(data.device).double()])
            load += counts
    nats_sum, count = data.sum(totals).tolist()
    if not count or load is None:
        raise TrainingError(
            f"the validation split has {blocks.num_tokens} tokens, too few for one sample of data.sequence_length "
            f"{length}; raise data.validation_fraction or shorten the sequences"
        )
    loss = nats_sum / count
    every_layer = parallelism.counts_of_every_layer(data.sum(load))
    return Validation(loss, loss / (math.log(2) * blocks.bytes_per_token), every_layer.cpu().tolist())
