"""Every tensor of a checkpoint and its shape, by the names of the public DeepSeek checkpoints."""

from __future__ import annotations

from deepseek_ray.config.model import ModelConfig

Shapes = dict[str, tuple[int, ...]]

CORRECTION_BIAS = "mlp.gate.e_score_correction_bias"
_MTP_COPIES = (".embed_tokens.weight", ".shared_head.head.weight")


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Name -> shape of every tensor of a checkpoint of `config`, its multi-token-prediction layers included.

    `lm_head.weight` is left out when it is tied to the embedding.
    """
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        shapes.update(_with_prefix(layer, _decoder_layer(config, config.is_moe_layer(layer))))
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for depth in range(config.num_nextn_predict_layers):
        shapes.update(mtp_shapes(config, config.num_hidden_layers + depth))
    return shapes


def repeats_main_model(name: str) -> bool:
    """Whether a tensor is a multi-token-prediction layer's copy of the embedding or head, which may be left out."""
    return name.startswith("model.layers.") and name.endswith(_MTP_COPIES)


def mtp_shapes(config: ModelConfig, layer: int) -> Shapes:
    """Name -> shape of the multi-token-prediction layer stored as `model.layers.{layer}`."""
    hidden = config.hidden_size
    own: Shapes = {
        "embed_tokens.weight": (config.vocab_size, hidden),
        "enorm.weight": (hidden,),
        "hnorm.weight": (hidden,),
        "eh_proj.weight": (hidden, 2 * hidden),
        "shared_head.norm.weight": (hidden,),
        "shared_head.head.weight": (config.vocab_size, hidden),
    }
    return _with_prefix(layer, own | _decoder_layer(config, moe=True))


def _with_prefix(layer: int, shapes: Shapes) -> Shapes:
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def _decoder_layer(config: ModelConfig, moe: bool) -> Shapes:
    norms: Shapes = {
        "input_layernorm.weight": (config.hidden_size,),
        "post_attention_layernorm.weight": (config.hidden_size,),
    }
    mlp = _moe(config) if moe else _mlp("mlp", config.hidden_size, config.intermediate_size)
    return norms | _attention(config) | mlp


def _attention(config: ModelConfig) -> Shapes:
    heads, hidden, latent = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
    shapes: Shapes = {}
    if config.q_lora_rank is None:
        shapes["q_proj.weight"] = (heads * config.qk_head_dim, hidden)
    else:
        shapes["q_a_proj.weight"] = (config.q_lora_rank, hidden)
        shapes["q_a_layernorm.weight"] = (config.q_lora_rank,)
        shapes["q_b_proj.weight"] = (heads * config.qk_head_dim, config.q_lora_rank)
    shapes["kv_a_proj_with_mqa.weight"] = (config.latent_width, hidden)
    shapes["kv_a_layernorm.weight"] = (latent,)
    shapes["kv_b_proj.weight"] = (heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
    shapes["o_proj.weight"] = (hidden, heads * config.v_head_dim)
    if config.attention_bias:
        for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
            if f"{name}.weight" in shapes:
                shapes[f"{name}.bias"] = shapes[f"{name}.weight"][:1]
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _moe(config: ModelConfig) -> Shapes:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    shapes: Shapes = {"mlp.gate.weight": (config.n_routed_experts, hidden)}
    if config.topk_method == "noaux_tc":
        shapes[CORRECTION_BIAS] = (config.n_routed_experts,)
    for expert in range(config.n_routed_experts):
        shapes.update(_mlp(f"mlp.experts.{expert}", hidden, width))
    if config.n_shared_experts:
        shapes.update(_mlp("mlp.shared_experts", hidden, width * config.n_shared_experts))
    return shapes


def _mlp(prefix: str, hidden: int, width: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }
