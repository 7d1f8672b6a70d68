"""What fine-tuning adds to the training loop: a start from a checkpoint, and adapters trained instead of weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepseek_ray.config.finetune import FinetuneConfig
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.data.prepare import PreparedData
from deepseek_ray.data.prepare_conversations import ConversationData, prepare_conversations
from deepseek_ray.errors import CheckpointError
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.decoder import DeepSeekForCausalLM
from deepseek_ray.models.load import load_model
from deepseek_ray.training.adapter_division import check_adapter_division
from deepseek_ray.training.lora import add_adapters

logger = logging.getLogger(__name__)


def with_base_model(config: FinetuneConfig) -> FinetuneConfig:
    """The run's configuration when the base model's files are taken into account. CheckpointError when they are wrong.

    Multi-token-prediction layers that config.json promises and the files lack are not trained.
    """
    reader = CheckpointReader(config.base_model)
    reader.validate()
    if reader.has_mtp or not config.model.num_nextn_predict_layers:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"num_nextn_predict_layers": 0})})


def require_adapters_fit(config: FinetuneConfig) -> None:
    """ConfigError for adapters that reach nothing, or that the run's strategy cannot spread; no weight is allocated."""
    if config.lora is not None:
        with torch.device("meta"):
            model = DeepSeekForCausalLM(config.model)
        add_adapters(model, config.lora)
        check_adapter_division(model, config.distributed)


def prepare_finetune_data(config: FinetuneConfig) -> ConversationData:
    """The run's conversations in the words of its base model; see `prepare_conversations`."""
    return prepare_conversations(config.data, Path(config.base_model))


def load_base_model(config: FinetuneConfig, special_ids: dict[str, Any]) -> DeepSeekForCausalLM:
    """The checkpoint to start from, in float32. `special_ids`: what its config does not say about its tokenizer."""
    model = load_model(config.base_model)
    if model.config.num_nextn_predict_layers != config.model.num_nextn_predict_layers:
        raise CheckpointError(
            f"{config.base_model} holds {model.config.num_nextn_predict_layers} multi-token-prediction layers, the run "
            f"was started with {config.model.num_nextn_predict_layers}; give the checkpoint that it was started with"
        )
    model.config = model.config.model_copy(update=special_ids)
    return model


def train_adapters_only(model: DeepSeekForCausalLM, config: PretrainConfig) -> None:
    """Put the run's adapters, if it has any, in place; everything else is frozen."""
    if isinstance(config, FinetuneConfig) and config.lora is not None:
        logger.info("%s", add_adapters(model, config.lora).describe())


def require_same_start(config: PretrainConfig, saved: Mapping[str, Any]) -> None:
    """CheckpointError when a run with adapters would go on with another base model or other settings of theirs.

    `saved`: the configuration in the checkpoint.
    """
    if not isinstance(config, FinetuneConfig) or config.lora is None:
        return
    now = {"base_model": config.base_model, "lora": config.lora.model_dump(mode="json")}
    changed = [name for name, value in now.items() if saved.get(name) != value]
    if changed:
        raise CheckpointError(
            f"{changed[0]} was {saved.get(changed[0])!r} and is {now[changed[0]]!r}; resume with what the run was "
            "started with, or start a new run under another name"
        )


def describe_start(config: FinetuneConfig, data: PreparedData) -> str:
    """A line for the person who started the run: from what, from how much, how often over it."""
    assert isinstance(data, ConversationData)
    samples = data.train.num_samples(config.data.sequence_length)
    epochs = config.total_steps * config.training.global_batch_size / samples
    return (
        f"from {config.base_model}; {data.counts.describe()}; {data.train.num_targets:,} tokens of answers in "
        f"{samples:,} samples, each seen {epochs:.1f} times"
    )
