"""What a DeepSeek model is: the numbers of its `config.json`, checked against each other.

Field names are those of the public DeepSeek configuration files. Sources: DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3
(arXiv 2412.19437), YaRN (arXiv 2309.00071).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from deepseek_ray.config.base import FrozenConfig
from deepseek_ray.config.hf_model import GATES, hf_fields, to_hf_values
from deepseek_ray.config.model_sections import Fp8Quantization, RopeScaling, yarn_mscale
from deepseek_ray.errors import CheckpointError, ConfigError

MAX_CONFIG_BYTES = 4 * 1024 * 1024


class ModelConfig(FrozenConfig):
    """One DeepSeek V2 or V3 model. `deepseek_v3` also stands for R1 and V3.1, whose architecture is the same."""

    model_type: Literal["deepseek_v2", "deepseek_v3"] = "deepseek_v3"
    """Architecture, in transformers' words. R1 and V3.1 are `deepseek_v3`."""
    vocab_size: int = Field(ge=1, le=2**24)
    """Rows of the token embedding and of the output head."""
    hidden_size: int = Field(ge=1, le=2**20)
    """Width of the residual stream."""
    intermediate_size: int = Field(ge=1, le=2**22)
    """Width of the dense layers' MLP."""
    moe_intermediate_size: int = Field(ge=1, le=2**22)
    """Width of one routed expert; the shared experts are one MLP of `n_shared_experts` times this."""
    num_hidden_layers: int = Field(ge=1, le=512)
    """Decoder layers, those with a dense MLP included."""
    num_attention_heads: int = Field(ge=1, le=2**14)
    """Query heads; each has its own keys and values, made from the shared latent."""
    n_shared_experts: int = Field(default=0, ge=0, le=1024)
    """Experts that every token passes; 0 has none."""
    n_routed_experts: int = Field(ge=1, le=2048)
    """Experts of one layer from which the gate chooses."""
    num_experts_per_tok: int = Field(ge=1)
    """Routed experts of one token."""
    n_group: int = Field(default=1, ge=1)
    """Equal groups into which the gate divides the routed experts."""
    topk_group: int = Field(default=1, ge=1)
    """Groups a token may choose experts from."""
    routed_scaling_factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Multiplier of the routed experts' weights."""
    norm_topk_prob: bool = True
    """Divide the chosen experts' scores by their sum. V2's gate has no such step, whatever this says."""
    scoring_func: Literal["softmax", "sigmoid"] = "sigmoid"
    """From the gate's logits to scores."""
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "noaux_tc"
    """How experts are chosen; `noaux_tc` adds correction biases, which balancing moves, to the scores."""
    first_k_dense_replace: int = Field(default=0, ge=0)
    """Number of leading layers with a dense MLP instead of experts."""
    moe_layer_freq: int = Field(default=1, ge=1)
    """Of the layers after the dense ones, those whose index is a multiple of this have experts."""
    kv_lora_rank: int = Field(ge=1, le=2**20)
    """Width of the latent that is cached in place of keys and values."""
    q_lora_rank: int | None = Field(default=None, ge=1, le=2**20)
    """None projects queries from the hidden state directly (V2-Lite)."""
    qk_rope_head_dim: int = Field(ge=2, le=2**16)
    """Width of a head's rotary part; the key's is shared by all heads."""
    qk_nope_head_dim: int = Field(ge=1, le=2**16)
    """Width of a head's part without positions."""
    v_head_dim: int = Field(ge=1, le=2**16)
    """Width of a head's values."""
    max_position_embeddings: int = Field(default=4096, ge=1)
    """Longest context in tokens."""
    rope_theta: float = Field(default=10000.0, gt=1, allow_inf_nan=False)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Extension of the context (YaRN); None has none."""
    rope_interleave: bool = True
    """Rotary pairs are neighbours (2i, 2i + 1), not halves (i, i + d/2)."""
    rms_norm_eps: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    """Added to the mean square in every norm."""
    tie_word_embeddings: bool = False
    """The output head is the token embedding."""
    attention_bias: bool = False
    """Biases on q_a_proj, kv_a_proj_with_mqa and o_proj."""
    num_nextn_predict_layers: int = Field(default=0, ge=0, le=64)
    """Multi-token-prediction layers after the last decoder layer."""
    bos_token_id: int | None = None
    """Id that begins a text; None leaves it to the tokenizer."""
    eos_token_id: int | list[int] | None = None
    """Id, or ids, that end a generation."""
    pad_token_id: int | None = None
    """Id that fills up batches; nothing here needs one."""
    initializer_range: float = Field(default=0.02, gt=0, allow_inf_nan=False)
    """Standard deviation of the weights before training."""
    aux_loss_alpha: float = Field(default=0.001, ge=0, allow_inf_nan=False)
    """Carried in `config.json` for other readers; training takes `balance.sequence_loss_alpha`."""
    seq_aux: bool = True
    """Carried in `config.json` for other readers."""
    quantization_config: Fp8Quantization | None = None
    """How the checkpoint's weights are stored, where they are FP8; None for plain ones."""

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], source: str = "config.json") -> Self:
        """From the content of a Hugging Face `config.json`, as the public repositories or transformers 5 write it.

        Raises ConfigError for remote code (`auto_map`), unknown architectures, missing, impossible or contradicting
        values. Keys nobody knows are named in one logged warning.
        """
        try:
            return cls.parse(hf_fields(values, cls.model_fields, source), source)
        except ConfigError as error:
            raise ConfigError(_with_source(error.message, source)) from None

    @classmethod
    def from_dir(cls, directory: str | Path) -> Self:
        """From `directory/config.json`. Raises CheckpointError when it is not there, ConfigError when it is wrong."""
        return cls.from_hf(_read_json(Path(directory)), str(Path(directory) / "config.json"))

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers (4 and 5), vLLM and SGLang read."""
        return to_hf_values(self)

    @model_validator(mode="before")
    @classmethod
    def _fill_gate(cls, values: Any) -> Any:
        """The gate's kind follows from the model type unless it is given."""
        if not isinstance(values, Mapping):
            return values
        defaults = GATES.get(values.get("model_type", "deepseek_v3"))
        return {**defaults, **values} if defaults else values

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_layers()
        self._check_gate()
        return self

    def _check_layers(self) -> None:
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ConfigError(
                f"first_k_dense_replace is {self.first_k_dense_replace}, above num_hidden_layers "
                f"{self.num_hidden_layers}; lower it"
            )
        if self.qk_rope_head_dim % 2:
            raise ConfigError(
                f"qk_rope_head_dim is {self.qk_rope_head_dim}; rotary embedding turns pairs, so it must be even"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ConfigError(
                f"pad_token_id is {self.pad_token_id}, outside the vocabulary of {self.vocab_size}; use null or an id "
                f"between 0 and {self.vocab_size - 1}"
            )
        if self.model_type == "deepseek_v2" and not self.rope_interleave:
            raise ConfigError("rope_interleave is false; deepseek_v2 rotates neighbouring pairs: set it to true")
        if self.model_type == "deepseek_v2" and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size is {self.hidden_size}, not a multiple of num_attention_heads {self.num_attention_heads}, "
                "which other readers of deepseek_v2 demand; change one of them"
            )

    def _check_gate(self) -> None:
        allowed = _ALLOWED_GATES[self.model_type]
        if (self.scoring_func, self.topk_method) not in allowed:
            pairs = " or ".join(f"{scoring} with {method}" for scoring, method in allowed)
            raise ConfigError(
                f"scoring_func {self.scoring_func!r} with topk_method {self.topk_method!r} is not a gate of "
                f"{self.model_type}; it has {pairs}"
            )
        if self.n_routed_experts % self.n_group:
            raise ConfigError(
                f"n_routed_experts is {self.n_routed_experts}, not a multiple of n_group {self.n_group}; change one"
            )
        if self.topk_group > self.n_group:
            raise ConfigError(f"topk_group is {self.topk_group}, above n_group {self.n_group}; lower it")
        experts_per_group = self.n_routed_experts // self.n_group
        if self.topk_method == "noaux_tc" and experts_per_group < 2:
            raise ConfigError(
                f"n_group is {self.n_group} for n_routed_experts {self.n_routed_experts}: noaux_tc scores a group by "
                "its two best experts, so a group needs at least 2; lower n_group"
            )
        grouped = self.topk_method != "greedy"
        reachable = experts_per_group * self.topk_group if grouped else self.n_routed_experts
        if self.num_experts_per_tok > reachable:
            reason = (
                f"{self.topk_group} allowed groups of {experts_per_group}" if grouped else "all of n_routed_experts"
            )
            raise ConfigError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, above the {reachable} experts a token can reach "
                f"({reason}); lower it or raise topk_group"
            )

    @property
    def architecture(self) -> str:
        """Class name in `architectures` of a config.json."""
        return {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}[self.model_type]

    @property
    def latent_width(self) -> int:
        """Values per token and layer in the KV cache: the compressed latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Multiplier of attention scores: qk_head_dim^-0.5, times YaRN's mscale for all dimensions, squared."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None and self.rope_scaling.mscale_all_dim:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` has routed experts. Multi-token-prediction layers, from num_hidden_layers on, always do."""
        if layer >= self.num_hidden_layers:
            return True
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers with routed experts, ascending; without multi-token-prediction layers."""
        return tuple(layer for layer in range(self.num_hidden_layers) if self.is_moe_layer(layer))

    @property
    def num_parameters(self) -> int:
        """Parameters of the model without multi-token-prediction layers; tied embeddings count once."""
        return self._num_parameters(self.n_routed_experts)

    @property
    def num_expert_parameters(self) -> int:
        """Of one routed expert: gate, up and down projection."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def num_active_parameters(self) -> int:
        """Parameters one token uses: all but the routed experts its gates do not pick."""
        return self._num_parameters(self.num_experts_per_tok)

    def _num_parameters(self, experts: int) -> int:
        hidden = self.hidden_size
        correction = self.n_routed_experts if self.topk_method == "noaux_tc" else 0
        moe = (
            (experts + self.n_shared_experts) * self.num_expert_parameters + self.n_routed_experts * hidden + correction
        )
        dense = 3 * hidden * self.intermediate_size
        num_moe = len(self.moe_layers)
        layers = num_moe * moe + (self.num_hidden_layers - num_moe) * dense
        layers += self.num_hidden_layers * (self._num_attention_parameters() + 2 * hidden)
        return layers + hidden + self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)

    def _num_attention_parameters(self) -> int:
        queries = self.num_attention_heads * self.qk_head_dim
        values = self.num_attention_heads * self.v_head_dim
        rank = self.q_lora_rank
        query = self.hidden_size * queries if rank is None else rank * (self.hidden_size + 1 + queries)
        key_value = self.hidden_size * self.latent_width + self.kv_lora_rank
        key_value += self.kv_lora_rank * self.num_attention_heads * (self.qk_nope_head_dim + self.v_head_dim)
        bias = (rank or 0) + self.latent_width + self.hidden_size if self.attention_bias else 0
        return query + key_value + values * self.hidden_size + bias


_ALLOWED_GATES = {
    "deepseek_v2": (("softmax", "greedy"), ("softmax", "group_limited_greedy")),
    "deepseek_v3": (("sigmoid", "noaux_tc"),),
}


def _with_source(message: str, source: str) -> str:
    return message if message.startswith(source) else f"{source}: {message}"


def _read_json(directory: Path) -> Mapping[str, Any]:
    path = directory / "config.json"
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory; give the path of a downloaded checkpoint in the Hugging Face layout"
        )
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json; a checkpoint needs it beside its safetensors files")
    if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} has {size} bytes, above the limit of {MAX_CONFIG_BYTES}; it is no model config")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); write it again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a JSON {type(values).__name__}; it must be an object")
    return values
