"""A Hugging Face `config.json` of a DeepSeek model, turned into ModelConfig's fields and back.

Two dialects are read: the public repositories' (`rope_theta` beside `rope_scaling`) and transformers 5's
(`rope_parameters`). The first is written, which every reader understands.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from deepseek_ray.errors import ConfigError

if TYPE_CHECKING:
    from deepseek_ray.config.model import ModelConfig

logger = logging.getLogger(__name__)

ARCHITECTURES = {"DeepseekV2ForCausalLM": "deepseek_v2", "DeepseekV3ForCausalLM": "deepseek_v3"}

GATES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
}

# What a key that a file leaves out means: the default of transformers' configuration class. Sizes have no default.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"n_shared_experts": 2, "q_lora_rank": 1536, "max_position_embeddings": 2048, "bos_token_id": 1,
                    "eos_token_id": 2},
    "deepseek_v3": {"n_shared_experts": 1, "q_lora_rank": 1536, "max_position_embeddings": 4096, "bos_token_id": 0,
                    "eos_token_id": 1, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
                    "first_k_dense_replace": 3},
}  # fmt: skip

# null in a file means these values.
_NULLS: dict[str, Any] = {"n_shared_experts": 0, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}

# Keys that say nothing about the computation, repeat what other keys say, or are checked by name below.
_HARMLESS = frozenset(
    {
        *("architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "attention_dropout", "ep_size"),
        *("pretraining_tp", "num_key_value_heads", "hidden_act", "mlp_bias", "head_dim", "qk_head_dim", "num_experts"),
        *("num_local_experts", "num_mtp_layers", "rope_parameters", "output_router_logits", "output_hidden_states"),
        *(
            "output_attentions",
            "return_dict",
            "chunk_size_feed_forward",
            "is_encoder_decoder",
            "is_decoder",
            "id2label",
        ),
        *("label2id", "problem_type", "add_cross_attention", "tie_encoder_decoder", "torchscript", "auto_map"),
    }
)

_YARN_KEYS = (
    *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    *("attention_factor", "truncate"),
)
_FP8_KEYS = ("quant_method", "fmt", "weight_block_size", "activation_scheme")


def hf_fields(values: Mapping[str, Any], known: Collection[str], source: str) -> dict[str, Any]:
    """ModelConfig's fields from the content of a config.json; `known` are the names of those fields.

    Raises ConfigError for what cannot be honoured, warns about keys nobody knows.
    """
    model_type = _model_type(values)
    _refuse_variants(values)
    fields = {**_HF_DEFAULTS[model_type], **{key: values[key] for key in values if key in known}}
    fields["model_type"] = model_type
    for key, meaning in _NULLS.items():
        if key in fields and fields[key] is None:
            fields[key] = meaning
    fields.setdefault("num_nextn_predict_layers", values.get("num_mtp_layers") or 0)
    fields.pop("rope_scaling", None)
    fields.update(_rope_fields(values, fields["max_position_embeddings"]))
    if fields.get("quantization_config") is not None:
        fields["quantization_config"] = _fp8_fields(values["quantization_config"])
    if model_type == "deepseek_v2" and fields.get("norm_topk_prob"):
        logger.warning("%s: norm_topk_prob is true; like in transformers, the gate of deepseek_v2 ignores it", source)
    unknown = sorted(key for key in values if key not in known and key not in _HARMLESS and not key.startswith("_"))
    if unknown:
        logger.warning("%s: keys that mean nothing here are ignored: %s", source, ", ".join(unknown))
    return fields


def to_hf_values(config: ModelConfig) -> dict[str, Any]:
    """The content of a config.json. FP8 is left out: what is written is never quantised."""
    values = config.model_dump(exclude={"rope_scaling", "quantization_config"})
    scaling = config.rope_scaling
    return {
        "architectures": [config.architecture],
        **values,
        "rope_scaling": None if scaling is None else scaling.model_dump(exclude_none=True),
        "num_key_value_heads": config.num_attention_heads,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def _model_type(values: Mapping[str, Any]) -> str:
    if values.get("auto_map"):
        raise ConfigError(
            f"auto_map asks to run code that comes with the checkpoint ({values['auto_map']}), which is never done "
            "because it could do anything on this machine; remove the auto_map key: deepseek_ray's own implementation "
            "of DeepSeek V2 and V3 is used and needs no remote code"
        )
    known = ", ".join(f"{name} ({kind})" for name, kind in ARCHITECTURES.items())
    architectures = values.get("architectures") or []
    for name in [architectures] if isinstance(architectures, str) else architectures:
        if name not in ARCHITECTURES:
            raise ConfigError(f"architectures names {name!r}, which is not known; known are {known}")
    named = {ARCHITECTURES[name] for name in architectures}
    model_type = values.get("model_type") or (named.pop() if len(named) == 1 else None)
    if model_type not in ARCHITECTURES.values():
        raise ConfigError(f"model_type is {model_type!r}, which is not known; known are {known}")
    if named and model_type not in named:
        raise ConfigError(f"model_type is {model_type!r} but architectures is {architectures}; make them agree")
    return str(model_type)


def _refuse_variants(values: Mapping[str, Any]) -> None:
    """Settings that would change the computation and that DeepSeek models do not use."""
    heads = values.get("num_attention_heads")
    for key, only, why in (
        ("hidden_act", "silu", "DeepSeek's MLPs are SwiGLU"),
        ("mlp_bias", False, "DeepSeek's MLPs have no biases"),
        ("num_key_value_heads", heads, "in MLA every attention head has its own keys and values"),
    ):
        found = values.get(key)
        if found is not None and found != only:
            raise ConfigError(f"{key} is {found!r}; only {only!r} is supported, because {why}")


def _rope_fields(values: Mapping[str, Any], max_position_embeddings: Any) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from either dialect."""
    scaling = values.get("rope_scaling") or values.get("rope_parameters")
    if not scaling:
        return {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"rope_scaling is {scaling!r}; it must be an object or null")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = {"rope_theta": scaling["rope_theta"]} if scaling.get("rope_theta") is not None else {}
    if kind == "default":
        return theta
    if kind != "yarn":
        raise ConfigError(f"rope_scaling has type {kind!r}; known are 'default' and 'yarn', which DeepSeek models use")
    yarn = {key: scaling[key] for key in _YARN_KEYS if scaling.get(key) is not None}
    yarn.setdefault("original_max_position_embeddings", max_position_embeddings)
    return {**theta, "rope_scaling": yarn}


def _fp8_fields(values: Any) -> dict[str, Any]:
    method = values.get("quant_method") if isinstance(values, Mapping) else values
    if method != "fp8":
        raise ConfigError(
            f"quantization_config has quant_method {method!r}; only 'fp8' (e4m3 blocks with weight_scale_inv) is read. "
            "Use the bf16 or FP8 checkpoint of this model"
        )
    return {key: values[key] for key in _FP8_KEYS if values.get(key) is not None}
