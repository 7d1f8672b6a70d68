"""Absorbed MLA over a paged latent cache, with the norms and the residual around it.

Letters: T tokens of the step, H hidden size, R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.kernels.base import AttentionWeights, Step
from deepseek_ray.models.decoder_weights import DecoderWeights, biased
from deepseek_ray.nn.norm import LATENT_NORM_EPS
from deepseek_ray.nn.rope import apply_rope


class LatentAttention:
    """MLA in its absorbed form: W_uk is folded into the query, W_uv applied after the weighted sum of latents."""

    def __init__(self, config: ModelConfig, prefix: str, weights: DecoderWeights) -> None:
        """`prefix`: of a decoder layer's tensors."""
        self._config = config
        self._kernels = weights.kernels
        self._weights = _read(config, prefix, weights)
        self._whole = weights.kernels.attention(self._weights)

    def forward(self, hidden: Tensor, step: Step, latents: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [T, H] -> hidden + attention(norm(hidden)) and its norm, both [T, H]; writes the tokens' latents into
        `latents` [slots, R + P] first."""
        if self._whole is not None:
            return self._whole(hidden, step, latents)
        own, kernels = self._weights, self._kernels
        normed = kernels.rms_norm(hidden, own.input_norm, own.eps)
        self._write_latents(normed, step, latents)
        hidden = hidden + self._attend(normed, step, latents)
        return hidden, kernels.rms_norm(hidden, own.post_norm, own.eps)

    def _attend(self, normed: Tensor, step: Step, latents: Tensor) -> Tensor:
        config, kernels, own = self._config, self._kernels, self._weights
        query = kernels.linear(self._query_input(normed), own.q)
        query = query.view(normed.shape[0], config.num_attention_heads, config.qk_head_dim)
        nope, rope = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        absorbed = kernels.per_head_linear(nope, own.w_uk)
        turned = kernels.turn_query(absorbed, query, step.rotation)
        if turned is None:
            cos, sin, interleaved = step.rotation
            rope = apply_rope(rope.float(), cos[:, None], sin[:, None], interleaved)
            turned = torch.cat([absorbed, rope.to(absorbed.dtype)], dim=-1)
        mixed = kernels.latent_attention(
            turned,
            latents,
            step.block_tables,
            step.sequence_rows,
            step.positions,
            step.block_size,
            config.kv_lora_rank,
            own.softmax_scale,
        )
        values = kernels.per_head_linear(mixed, own.w_uv)
        return biased(kernels, values.flatten(1), own.o, own.o_bias)

    def _query_input(self, normed: Tensor) -> Tensor:
        own = self._weights
        if own.q_a is None:
            return normed
        assert own.q_norm is not None
        return self._kernels.rms_norm(biased(self._kernels, normed, own.q_a, own.q_a_bias), own.q_norm, own.latent_eps)

    def _write_latents(self, normed: Tensor, step: Step, latents: Tensor) -> None:
        """`(RMSNorm(c), RoPE(k_rope))` of the step's tokens, `[T, R + P]`, into the cache."""
        config, kernels, own = self._config, self._kernels, self._weights
        kv = biased(kernels, normed, own.kv_a, own.kv_a_bias)
        if kernels.write_latents(kv, own.kv_norm, own.latent_eps, step.rotation, step.slots, latents):
            return
        compressed, rope = kv.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        compressed = kernels.rms_norm(compressed, own.kv_norm, own.latent_eps)
        rope = apply_rope(rope.float(), *step.rotation)
        latents[step.slots] = torch.cat([compressed, rope.to(compressed.dtype)], dim=-1)


def _read(config: ModelConfig, prefix: str, weights: DecoderWeights) -> AttentionWeights:
    own = f"{prefix}.self_attn"
    has_narrow_queries = bool(config.q_lora_rank)
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    kv_b = weights.plain(f"{own}.kv_b_proj.weight").view(heads, nope + value, config.kv_lora_rank)
    return AttentionWeights(
        input_norm=weights.norm(f"{prefix}.input_layernorm.weight"),
        q_a=weights.linear(f"{own}.q_a_proj.weight") if has_narrow_queries else None,
        q_a_bias=weights.bias(f"{own}.q_a_proj.bias"),
        q_norm=weights.norm(f"{own}.q_a_layernorm.weight") if has_narrow_queries else None,
        q=weights.linear(f"{own}.{'q_b_proj' if has_narrow_queries else 'q_proj'}.weight"),
        kv_a=weights.linear(f"{own}.kv_a_proj_with_mqa.weight"),
        kv_a_bias=weights.bias(f"{own}.kv_a_proj_with_mqa.bias"),
        kv_norm=weights.norm(f"{own}.kv_a_layernorm.weight"),
        w_uk=weights.heads([head[:nope].T.contiguous() for head in kv_b]),
        w_uv=weights.heads([head[nope:].contiguous() for head in kv_b]),
        o=weights.linear(f"{own}.o_proj.weight"),
        o_bias=weights.bias(f"{own}.o_proj.bias"),
        post_norm=weights.norm(f"{prefix}.post_attention_layernorm.weight"),
        eps=config.rms_norm_eps,
        latent_eps=LATENT_NORM_EPS,
        softmax_scale=config.softmax_scale,
    )
