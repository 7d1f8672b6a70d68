"""What to search before a long pre-training run: learning rate, batch, decay, warm-up, and the optimiser's inside.

deepseek-ray tune configs/tiny.yaml --space tune_spaces.pretraining:space
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.tuning.space import Chooser, Sample, Space


def space(
    lr: tuple[float, float] = (1e-5, 1e-3),
    batch_sizes: Sequence[int] = (16, 32, 64, 128, 256),
    weight_decay: tuple[float, float] = (0.01, 0.1),
    most_warmup: float = 0.2,
) -> Space:
    """Everything that a run's curve depends on besides the model. `batch_sizes`: sequences per optimiser step.

    Warm-up is drawn as a share of the run's steps, at most `most_warmup`: its number of steps depends on the batch.
    """

    def sample(trial: Chooser, config: PretrainConfig) -> Sample:
        batch = trial.suggest_categorical("training.global_batch_size", list(batch_sizes))
        steps = math.ceil(
            (config.training.tokens or config.total_steps * config.tokens_per_step)
            / (batch * config.data.sequence_length)
        )
        warmup = trial.suggest_float("warmup", 0.0, most_warmup)
        return {
            "training.global_batch_size": batch,
            "training.micro_batch_size": _micro_batch(batch, config),
            "schedule.warmup_steps": round(warmup * steps),
            **_optimizer(trial, lr, weight_decay),
        }

    return sample


def changeable(lr: tuple[float, float] = (1e-5, 1e-3), weight_decay: tuple[float, float] = (0.01, 0.1)) -> Space:
    """What may change in mid-run, for population based training (`--scheduler pbt`)."""

    def sample(trial: Chooser, config: PretrainConfig) -> Sample:
        return {
            **_optimizer(trial, lr, weight_decay),
            "balance.bias_update_speed": trial.suggest_float("balance.bias_update_speed", 1e-4, 1e-2, log=True),
        }

    return sample


def _optimizer(trial: Chooser, lr: tuple[float, float], weight_decay: tuple[float, float]) -> dict[str, Any]:
    """AdamW. Its moments are either DeepSeek-V3's or searched: three parameters that exist only then."""
    chosen = {
        "optimizer.lr": trial.suggest_float("optimizer.lr", *lr, log=True),
        "optimizer.weight_decay": trial.suggest_float("optimizer.weight_decay", *weight_decay),
    }
    if trial.suggest_categorical("moments", ["deepseek", "searched"]) == "searched":
        first = trial.suggest_float("beta1", 0.8, 0.95)
        second = trial.suggest_float("beta2", 0.9, 0.999)
        chosen["optimizer.betas"] = [first, second]
        chosen["optimizer.eps"] = trial.suggest_float("eps", 1e-10, 1e-6, log=True)
    return chosen


def _micro_batch(batch: int, config: PretrainConfig) -> int:
    """The run's micro-batch, or the largest one below it that divides a worker's share of the batch."""
    share = max(1, batch // config.num_workers)
    return max(size for size in range(1, min(config.training.micro_batch_size, share) + 1) if share % size == 0)
