"""What a fine-tuning run is: a pre-training run that starts from a checkpoint and learns from conversations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from deepseek_ray.config.base import FrozenConfig
from deepseek_ray.config.data import DataConfig
from deepseek_ray.config.model import ModelConfig
from deepseek_ray.config.run import BalanceConfig, PretrainConfig
from deepseek_ray.errors import ConfigError

ALL_LINEAR = "all-linear"
_NOT_FOR_CONVERSATIONS = ("text_field", "document_bytes", "include_tests", "tokenizer", "vocab_size",
                          "tokenizer_training_bytes")  # fmt: skip
_FROM_BASE_MODEL_BUT_FOR = frozenset({"num_nextn_predict_layers", "quantization_config"})


class LoraConfig(FrozenConfig):
    """Low-rank adapters (arXiv 2106.09685): W + lora_alpha / r * B A, with W frozen. Names and meanings are PEFT's."""

    r: int = Field(default=16, ge=1)
    """Rank: A is [r, in], B is [out, r]."""
    lora_alpha: float = Field(default=32, gt=0, allow_inf_nan=False)
    """The adapter's output is scaled by lora_alpha / r."""
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    """Which matrices, by the names of the Hugging Face layout. A list: ends of names (`o_proj`), in which `*` stands
    for anything (`experts.*.down_proj`). A string: a regular expression for whole names, or `all-linear`: every linear
    layer and routed expert but the output head."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs set to zero in training."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.target_modules or not all(self.target_modules):
            raise ConfigError(
                f"target_modules is {self.target_modules!r}; name at least one kind of matrix, for example "
                "['q_a_proj', 'o_proj', 'down_proj']"
            )
        return self

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.r


class ConversationsConfig(DataConfig):
    """Conversations to learn from: one JSON object a line."""

    source: Literal["jsonl"] = "jsonl"
    """Every line is `{"messages": [{"role", "content"}, ...]}`, or a pair of a prompt and its answer."""
    messages_field: str = Field(default="messages", min_length=1)
    """Field with the messages; lines that lack it are pairs."""
    prompt_field: str = Field(default="prompt", min_length=1)
    """Field of a pair that holds what the user says."""
    completion_field: str = Field(default="completion", min_length=1)
    """Field of a pair that holds what the assistant answers."""
    system_prompt: str | None = None
    """Put before conversations that do not start with a system message."""
    validation_paths: tuple[str, ...] = ()
    """Files of held-out conversations; without any, `validation_fraction` of the conversations is held out."""
    chat_template: str | None = None
    """File of a Jinja template to use, and to save with the model, instead of the checkpoint's own."""

    @model_validator(mode="after")
    def _only_what_counts(self) -> Self:
        fields = DataConfig.model_fields
        unused = [name for name in _NOT_FOR_CONVERSATIONS if getattr(self, name) != fields[name].default]
        if unused:
            raise ConfigError(
                f"data.{unused[0]} is {getattr(self, unused[0])!r}, which has no meaning for conversations (tokenizer "
                "and vocabulary are those of base_model); remove it"
            )
        return self


class FinetuneConfig(PretrainConfig):
    """A whole fine-tuning run, full or with adapters."""

    base_model: str = Field(min_length=1)
    """Directory of the checkpoint to start from, in the Hugging Face layout, readable on every node."""
    model: ModelConfig
    """The base model's own; leave it out."""
    data: ConversationsConfig
    lora: LoraConfig | None = None
    """Adapters to train instead of the model's own weights; None trains all of them."""
    balance: BalanceConfig = BalanceConfig(bias_update_speed=0)
    """As in pre-training, but the correction biases stay as they are unless `bias_update_speed` is given."""

    @model_validator(mode="before")
    @classmethod
    def _take_model_from_the_checkpoint(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("base_model"), str):
            return values
        directory = Path(values["base_model"]).expanduser().absolute()
        if not directory.is_dir():
            raise ConfigError(
                f"base_model is {values['base_model']!r}, which is no directory; give the path of a checkpoint in the "
                "Hugging Face layout (config.json and *.safetensors)"
            )
        base = ModelConfig.from_dir(directory).model_dump(exclude_unset=True) | {"quantization_config": None}
        given = values.get("model") or {}
        return {
            **values,
            "base_model": str(directory),
            "model": {**base, **given} if isinstance(given, dict) else given,
        }

    @model_validator(mode="after")
    def _check_against_base_model(self) -> Self:
        base = ModelConfig.from_dir(Path(self.base_model)).model_dump()
        own = self.model.model_dump()
        changed = [name for name in own if own[name] != base[name] and name not in _FROM_BASE_MODEL_BUT_FOR]
        if changed:
            raise ConfigError(
                f"model.{changed[0]} is {own[changed[0]]!r}, but that of base_model is {base[changed[0]]!r}; leave the "
                "model section out: it is read from the checkpoint"
            )
        if self.lora is not None and self.lora.lora_dropout > 0 and self.distributed.strategy == "tensor":
            raise ConfigError(
                f"lora.lora_dropout is {self.lora.lora_dropout} with strategy 'tensor', whose workers must compute "
                "equal hidden states and would each drop other inputs; set it to 0, or distributed.strategy to fsdp"
            )
        if self.lora is not None and self.balance.bias_update_speed > 0:
            raise ConfigError(
                f"balance.bias_update_speed is {self.balance.bias_update_speed} together with lora; adapters leave the "
                "gate as it is, correction biases included: set it to 0"
            )
        return self

    def _check_model_against_data(self) -> None:
        limit = self.model.max_position_embeddings
        if self.data.sequence_length > limit:
            raise ConfigError(
                f"data.sequence_length is {self.data.sequence_length}, above max_position_embeddings {limit} of "
                "base_model; lower it"
            )
