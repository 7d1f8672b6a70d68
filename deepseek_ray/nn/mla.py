"""Multi-head latent attention (arXiv 2405.04434, section 2.1) over whole sequences, with gradients.

Keys and values of all heads come from one latent per token. The naive form expands it to keys and values per head; the
absorbed form moves the expansion to the query and the output, so that heads attend to the latents themselves. Both are
the same function. Letters: B sequences, S tokens, N heads (those whose weights the module holds), R kv_lora_rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.kernels.training import serves
from deepseek_ray.nn import fused
from deepseek_ray.nn.norm import LATENT_NORM_EPS, RMSNorm
from deepseek_ray.nn.rope import apply_rope

Rotation = tuple[Tensor, Tensor]
"""cos and sin of the tokens' positions: each [B or 1, S, qk_rope_head_dim / 2] float32."""


class MLA(nn.Module):
    """Causal self-attention of one layer. `absorbed` chooses the form; training uses the naive one, which is faster."""

    def __init__(self, config: ModelConfig, absorbed: bool = False) -> None:
        super().__init__()
        self.config = config
        self.absorbed = absorbed
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.latent_width, bias=bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, expanded, bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=bias)

    def forward(self, hidden: Tensor, rotation: Rotation, documents: Tensor | None = None) -> Tensor:
        """hidden: [B, S, hidden_size] -> the same shape.

        documents: [B, S] integers, see `document_mask`; None is plainly causal.
        """
        queries = self._queries(hidden)
        latent, k_rope = self._latents(hidden)
        if not self.absorbed and serves(queries, latent, k_rope):
            return self.o_proj(self._attend_fused(queries, latent, k_rope, rotation, documents).flatten(2))
        mask = None if documents is None else document_mask(documents)
        nope, rope = queries.transpose(1, 2).split((self.config.qk_nope_head_dim, self.config.qk_rope_head_dim), dim=-1)
        attend = self._attend_absorbed if self.absorbed else self._attend_naive
        q_rope, k_rope = self._rotated(rope, rotation), self._rotated(k_rope.unsqueeze(1), rotation)
        return self.o_proj(attend(nope, q_rope, latent.unsqueeze(1), k_rope, mask).transpose(1, 2).flatten(2))

    def _queries(self, hidden: Tensor) -> Tensor:
        """[B, S, N, qk_nope_head_dim + qk_rope_head_dim], not rotated yet."""
        if self.config.q_lora_rank is None:
            queries = self.q_proj(hidden)
        else:
            queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        return queries.unflatten(-1, (-1, self.config.qk_head_dim))

    def _latents(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised latents [B, S, R], as a KV cache would hold them, and keys [B, S, qk_rope_head_dim], not rotated
        yet."""
        config = self.config
        latent, rope = self.kv_a_proj_with_mqa(hidden).split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        return self.kv_a_layernorm(latent), rope

    def _expanded(self, latent: Tensor) -> Tensor:
        """[B, S, R] -> keys before values of each head, [B, S, N, qk_nope_head_dim + v_head_dim]."""
        return self.kv_b_proj(latent).unflatten(-1, (-1, self.config.qk_nope_head_dim + self.config.v_head_dim))

    def _rotated(self, x: Tensor, rotation: Rotation) -> Tensor:
        cos, sin = rotation
        return apply_rope(x, cos.unsqueeze(1), sin.unsqueeze(1), self.config.rope_interleave)

    def _attend_fused(
        self, queries: Tensor, latent: Tensor, k_rope: Tensor, rotation: Rotation, documents: Tensor | None
    ) -> Tensor:
        """[B, S, N, v_head_dim]: the naive form in one operator, from what is not rotated yet."""
        config = self.config
        expanded = self._expanded(latent)
        interleaved, scale = config.rope_interleave, config.softmax_scale
        return fused.causal_attention(queries, expanded, k_rope, rotation, interleaved, scale, documents)

    def _attend_naive(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> Tensor:
        """[B, N, S, v_head_dim], from keys and values expanded per head."""
        config = self.config
        expanded = self._expanded(latent.squeeze(1)).transpose(1, 2)
        k_nope, values = expanded.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        queries = torch.cat((q_nope, q_rope), dim=-1)
        keys = torch.cat((k_nope, k_rope.to(k_nope.dtype).expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
        # torch's fast kernels want one width for all three; zeros change neither scores nor values.
        width = max(config.qk_head_dim, config.v_head_dim)
        queries, keys, values = (F.pad(x, (0, width - x.shape[-1])) for x in (queries, keys, values))
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=config.softmax_scale
        )
        return attended[..., : config.v_head_dim]

    def _attend_absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> Tensor:
        """[B, N, S, v_head_dim], from scores against the latents: (W_uk^T q) . c + q_rope . k_rope."""
        config = self.config
        weight = self.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
        expand_keys, expand_values = weight.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)  # [N, d, R]
        scores = (q_nope @ expand_keys) @ latent.mT + q_rope @ k_rope.mT
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = (scores.float() * config.softmax_scale).masked_fill(~mask, float("-inf"))
        return (scores.softmax(dim=-1).to(latent.dtype) @ latent) @ expand_values.mT


def document_mask(document_ids: Tensor) -> Tensor:
    """[B, S] integers -> [B, 1, S, S] bool: a query (row) sees keys at or before it in its own document."""
    same = document_ids.unsqueeze(-1) == document_ids.unsqueeze(-2)
    return same.tril().unsqueeze(1)
