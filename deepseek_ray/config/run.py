"""What a pre-training run is: one frozen tree, read from a YAML file by `config/load.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from deepseek_ray.config.base import FrozenConfig
from deepseek_ray.config.data import DataConfig
from deepseek_ray.config.distributed import DistributedConfig
from deepseek_ray.config.division import check_division
from deepseek_ray.config.model import ModelConfig
from deepseek_ray.errors import ConfigError


class OptimizerConfig(FrozenConfig):
    """AdamW; the defaults are DeepSeek-V3's (arXiv 2412.19437, section 4.2) but for the learning rate."""

    lr: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    """Peak learning rate, reached at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment per step."""
    eps: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Decoupled decay of matrices; norms and biases are never decayed."""
    decay_embeddings: bool = False
    """Decay the token embedding as well."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas is {list(self.betas)}; both must be at least 0 and below 1")
        return self


class ScheduleConfig(FrozenConfig):
    """Linear warm-up, then a cosine to the last step."""

    warmup_steps: int = Field(default=100, ge=0)
    """Optimiser steps until the peak learning rate."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step as a fraction of the peak."""


class BalanceConfig(FrozenConfig):
    """Even load over the routed experts (arXiv 2408.15664; arXiv 2412.19437, section 2.1.2)."""

    bias_update_speed: float = Field(default=1e-3, ge=0, le=1)
    """gamma: how far a correction bias moves after each step; 0 switches the update off."""
    sequence_loss_alpha: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    """Weight of the sequence-wise balance loss; 0 switches it off."""


class TrainingConfig(FrozenConfig):
    """How long, in what portions, how precise, and how often the run is checked and saved."""

    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of the whole run; give this or `tokens`."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens of the whole run, rounded up to whole steps; give this or `steps`."""
    global_batch_size: int = Field(default=32, ge=1)
    """Sequences per optimiser step, over all workers and micro-batches."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Sequences per forward pass of one worker; the rest of a worker's share is accumulated."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """bf16 computes under autocast; weights, gradients' sums and optimiser state stay float32."""
    clip_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Largest Euclidean norm of the whole gradient; a larger one is scaled down."""
    mtp_loss_weight: float = Field(default=0.3, ge=0, allow_inf_nan=False)
    """lambda of the multi-token-prediction loss; used when the model has such layers."""
    recompute_activations: bool = False
    """Compute each layer's forward again in the backward pass instead of keeping its activations."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the weights and of every random choice in the loop (the data has its own)."""
    validation_interval: int = Field(default=100, ge=0)
    """Steps between validations; 0 validates after the last step only."""
    validation_samples: int = Field(default=256, ge=1)
    """Samples of the validation split that a validation in mid-run reads, from its start."""
    final_validation_samples: int | None = Field(default=None, ge=1)
    """The same for the validation after the last step; None reads the whole split."""
    checkpoint_interval: int = Field(default=100, ge=0)
    """Steps between checkpoints; 0 saves after the last step only."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that stay on disk."""
    max_failures: int = Field(default=3, ge=-1)
    """Times a crashed worker group is started again from the newest checkpoint; -1 never gives up."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs when the cluster has one for every worker."""
    threads_per_worker: int | None = Field(default=None, ge=1)
    """CPU cores of each worker; None divides those of the cluster among the workers (at most 16 each)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ConfigError(
                f"training.steps is {self.steps} and training.tokens is {self.tokens}; set exactly one of them"
            )
        return self


class PretrainConfig(FrozenConfig):
    """A whole pre-training run."""

    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}$")
    """Directory of the run under `storage_path`. Starting the same name there again resumes the run."""
    storage_path: str = "~/deepseek-ray/runs"
    """Directory that every node can write; `~` is the home directory."""
    model: ModelConfig
    """The fields of a `config.json`, or the path of one (relative to the run file). An absent `vocab_size` is that of
    the tokenizer to train."""
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    balance: BalanceConfig = BalanceConfig()
    training: TrainingConfig
    distributed: DistributedConfig = DistributedConfig()

    @property
    def run_dir(self) -> Path:
        """Where everything of the run is: metrics.jsonl, tensorboard/, checkpoints/."""
        return Path(self.storage_path).expanduser() / self.name

    @property
    def num_workers(self) -> int:
        return self.distributed.num_workers

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one worker per optimiser step."""
        return self.training.global_batch_size // (self.training.micro_batch_size * self.distributed.num_readers)

    def with_workers(self, num_workers: int) -> Self:
        """This run on the workers that an elastic one was given: the same batches in another number of portions."""
        if not self.distributed.is_elastic or num_workers not in self.distributed.data_sizes:
            return self
        distributed = self.distributed.model_copy(update={"data_parallel_size": num_workers})
        return self.model_copy(update={"distributed": distributed})

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch_size * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        if self.training.steps is not None:
            return self.training.steps
        assert self.training.tokens is not None
        return math.ceil(self.training.tokens / self.tokens_per_step)

    @model_validator(mode="before")
    @classmethod
    def _take_vocabulary_from_the_tokenizer(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        model, data = values.get("model"), values.get("data")
        if not isinstance(model, Mapping) or "vocab_size" in model or not isinstance(data, Mapping):
            return values
        if data.get("tokenizer") is not None:
            raise ConfigError(
                f"model.vocab_size is missing and data.tokenizer is {data['tokenizer']!r}; give model.vocab_size, at "
                "least the number of that tokenizer's ids"
            )
        vocab_size = data.get("vocab_size", DataConfig.model_fields["vocab_size"].default)
        return {**values, "model": {**model, "vocab_size": vocab_size}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_batches()
        self._check_model_against_data()
        check_division(self.model, self.distributed, self.accumulation_steps)
        if self.schedule.warmup_steps > self.total_steps:
            raise ConfigError(
                f"schedule.warmup_steps is {self.schedule.warmup_steps}, above the {self.total_steps} steps of the "
                "run; lower it or train longer"
            )
        return self

    def _check_batches(self) -> None:
        global_size, micro_size = self.training.global_batch_size, self.training.micro_batch_size
        readers, mesh = self.distributed.num_readers, self.distributed.describe_mesh()
        if self.distributed.is_elastic:
            self._check_elastic_batches(global_size, micro_size)
        elif global_size % (micro_size * readers):
            raise ConfigError(
                f"training.global_batch_size is {global_size}, not a multiple of micro_batch_size {micro_size} times "
                f"{readers}, the number of workers that read different sequences ({mesh}); change one of them"
            )
        wanted = self.distributed.gradient_accumulation_steps
        if wanted is not None and self.distributed.is_elastic:
            raise ConfigError(
                f"distributed.gradient_accumulation_steps is {wanted}, but data_parallel_size is a pair: the steps "
                "follow from the number of workers; leave it out"
            )
        if wanted is not None and wanted != self.accumulation_steps:
            raise ConfigError(
                f"distributed.gradient_accumulation_steps is {wanted}, but global_batch_size {global_size} / "
                f"(micro_batch_size {micro_size} x {readers} readers: {mesh}) is "
                f"{self.accumulation_steps}; leave it out or change the batch sizes"
            )

    def _check_elastic_batches(self, global_size: int, micro_size: int) -> None:
        if impossible := [size for size in self.distributed.data_sizes if global_size % (micro_size * size)]:
            raise ConfigError(
                f"training.global_batch_size is {global_size}, not a multiple of micro_batch_size {micro_size} times "
                f"{', '.join(map(str, impossible))}, which distributed.data_parallel_size "
                f"{self.distributed.data_parallel_size} allows; choose a "
                "batch that every number of workers divides, or a narrower pair"
            )

    def _check_model_against_data(self) -> None:
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ConfigError(
                f"data.sequence_length is {self.data.sequence_length}, above model.max_position_embeddings "
                f"{self.model.max_position_embeddings}; raise the latter or shorten the sequences"
            )
        if self.data.tokenizer is None and self.data.vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"data.vocab_size is {self.data.vocab_size}, above model.vocab_size {self.model.vocab_size}; leave the "
                "latter out, or raise it"
            )
        if self.model.quantization_config is not None:
            raise ConfigError("model.quantization_config is set; training needs unquantised weights: remove it")
