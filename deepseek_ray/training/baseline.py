"""What a run has to beat: an interpolated Kneser-Ney bigram model of the very tokens the run was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.data.cursor import DataCursor
from deepseek_ray.data.kneser_ney import KneserNeyBigram
from deepseek_ray.data.prepare import PreparedData


@dataclass(frozen=True)
class Baseline:
    nats_per_token: float
    bits_per_byte: float


def bigram_baseline(config: PretrainConfig, data: PreparedData) -> Baseline:
    """The bigram model's loss on the samples that the run's last validation reads."""
    length = config.data.sequence_length
    cursor = DataCursor(config.data.seed, data.train.num_samples(length))
    # Once each: a second epoch would make every count even and take the discounts, estimated from them, to nothing.
    trained_on = np.unique(cursor.samples_at(np.arange(config.total_steps * config.training.global_batch_size)))
    model = KneserNeyBigram.fit(*data.train.samples(trained_on, length), vocab_size=data.vocab_size)
    num_samples = data.validation.num_samples(length)
    limit = config.training.final_validation_samples
    held_out = np.arange(num_samples if limit is None else min(limit, num_samples))
    nats = model.nats_per_token(*data.validation.samples(held_out, length))
    return Baseline(nats, nats / (math.log(2) * data.validation.bytes_per_token))
