"""The decoder for inference: flat tokens of many sequences, absorbed MLA over a paged latent cache.

Prefill, decode and recompute take the same road with the same row-invariant operators, so a token's logits have the
same bits whichever of them computed it and whoever shared the batch. Weights are read once, packed, and never trained;
the trainable twin is `models/decoder.py`.

Letters: T tokens of the step, H heads, R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.kernels.base import Kernels, PackedWeight, Place, Rotation
from deepseek_ray.kernels.quantize import Quantization
from deepseek_ray.kernels.select import default_kernels
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.decoder_weights import DecoderWeights, biased
from deepseek_ray.nn.gate import choice_of, choose_experts
from deepseek_ray.nn.moe import ExpertBackend
from deepseek_ray.nn.norm import LATENT_NORM_EPS
from deepseek_ray.nn.paged import LatentCache, PagedBatch
from deepseek_ray.nn.rope import apply_rope, rope_tables
from deepseek_ray.nn.slots import combine_slots
from deepseek_ray.nn.transfer import moved


class PagedDecoder:
    """Embedding, layers and head of a DeepSeek checkpoint; the routed experts are behind `experts`."""

    def __init__(
        self,
        reader: CheckpointReader,
        dtype: torch.dtype,
        experts: ExpertBackend,
        kernels: Kernels | None = None,
        max_positions: int | None = None,
        on_layer: Callable[[int], None] | None = None,
        device: torch.device | str = "cpu",
        quantization: Quantization | None = None,
        with_mtp: bool = False,
        micro_batches: int = 1,
    ) -> None:
        """`kernels` must be able to compute on `device`. `quantization`: linear layers of fewer bits than `dtype`, but
        for the gates and the two parts of kv_b_proj, which are small and decide much. `with_mtp`: the checkpoint's
        first multi-token-prediction layer, too, for `draft`. `micro_batches`: parts of a step, of which one is with the
        experts while another one is here."""
        self.config: ModelConfig = reader.config
        self.dtype = dtype
        self.device = torch.device(device)
        weights = DecoderWeights(reader, dtype, kernels or default_kernels(), self.device, quantization)
        self._micro_batches = micro_batches
        self._kernels = weights.kernels
        self._embedding = weights.plain("model.embed_tokens.weight")
        self._layers = []
        for layer in range(self.config.num_hidden_layers):
            self._layers.append(_Layer(self.config, layer, weights, experts))
            if on_layer:
                on_layer(layer)
        self._final_norm = weights.norm("model.norm.weight")
        tied = self.config.tie_word_embeddings
        head_name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        self._head = weights.linear(head_name)
        self._mtp = (
            _MtpLayer(self.config, weights, experts, self._embedding, self._head, head_name) if with_mtp else None
        )
        # One table for all positions: cos of a short tensor and of a long one differ in the last bit.
        positions = torch.arange(max_positions or self.config.max_position_embeddings)
        self._cos, self._sin = (table.to(self.device) for table in rope_tables(self.config, positions))

    def new_cache(self, num_blocks: int, block_size: int) -> LatentCache:
        config = self.config
        num_layers = config.num_hidden_layers + (self._mtp is not None)
        return LatentCache(num_layers, num_blocks, block_size, config.latent_width, self.dtype, self.device)

    def draw(self, logits: NDArray[np.float32], rows: Sequence[int], places: Sequence[Place]) -> list[int] | None:
        """See `Kernels.draw`."""
        return self._kernels.draw(logits, rows, places)

    def forward(self, batch: PagedBatch, cache: LatentCache) -> Tensor:
        """Logits of the tokens `batch.logit_rows`, `[n, vocab_size]` float32. Writes the step's latents to `cache`."""
        return self.forward_with_hidden(batch, cache)[0]

    def forward_with_hidden(self, batch: PagedBatch, cache: LatentCache) -> tuple[Tensor, Tensor]:
        """The same logits, and the last layer's output of every token, `[T, H]`."""
        with self._kernels.computing():
            batch = batch.to(self.device)
            hidden = self._decode(batch, cache)
            return self._logits(hidden[batch.logit_rows], self._final_norm, self._head), hidden

    def draft(self, batch: PagedBatch, hidden: Tensor, cache: LatentCache) -> Tensor:
        """The likeliest token, [n] int64, after each of `batch.logit_rows` as the multi-token-prediction layer sees it.

        `batch` has places that were computed, and as its `token_ids` the tokens that came after them; hidden [T, H] is
        the last layer's output there. Writes the layer's latents to `cache`.
        """
        assert self._mtp is not None, "the multi-token-prediction layer was not loaded"
        with self._kernels.computing():
            batch = batch.to(self.device)
            normed = self._kernels.rms_norm(hidden, self._final_norm, self.config.rms_norm_eps)
            mixed = self._mtp.mix(batch.token_ids, normed)
            own = cache.layer(self.config.num_hidden_layers)
            mixed = self._mtp.layer.begin(mixed, *self._rotation(batch), batch, own, cache.block_size).end()
            return self._logits(mixed[batch.logit_rows], self._mtp.norm, self._mtp.head).argmax(dim=1)

    def _decode(self, batch: PagedBatch, cache: LatentCache) -> Tensor:
        """The last layer's output. Micro-batches take turns (MegaScale-Infer, arXiv 2504.02263, section 4.1): each goes
        on to the next layer when its experts have answered, while those of the others are computed.

        The first ones come first in every layer, so a token finds the latents of those before it in its sequence.
        """
        parts = self._parts(batch)
        rotations = [self._rotation(part) for _, part in parts]
        hidden = [self._embedding[part.token_ids] for _, part in parts]
        begun: list[_Begun] = []
        for index, layer in enumerate(self._layers):
            latents = cache.layer(index)
            for place, (first_row, part) in enumerate(parts):
                if index:
                    hidden[place] = begun.pop(0).end()
                begun.append(layer.begin(hidden[place], *rotations[place], part, latents, cache.block_size, first_row))
        return torch.cat([each.end() for each in begun])

    def _parts(self, batch: PagedBatch) -> list[tuple[int, PagedBatch]]:
        """Place of the first row, and the micro-batch."""
        count = max(1, min(self._micro_batches, batch.num_tokens))
        if count == 1:
            return [(0, batch)]
        edges = [batch.num_tokens * place // count for place in range(count + 1)]
        return [(first, batch.part(first, last)) for first, last in itertools.pairwise(edges)]

    def _rotation(self, batch: PagedBatch) -> tuple[Tensor, Tensor]:
        return self._cos[batch.positions], self._sin[batch.positions]

    def _logits(self, hidden: Tensor, norm: Tensor, head: PackedWeight) -> Tensor:
        return self._kernels.linear(self._kernels.rms_norm(hidden, norm, self.config.rms_norm_eps), head, torch.float32)


class _Layer:
    def __init__(self, config: ModelConfig, layer: int, weights: DecoderWeights, experts: ExpertBackend) -> None:
        prefix = f"model.layers.{layer}"
        self._kernels = weights.kernels
        self._eps = config.rms_norm_eps
        self._input_norm = weights.norm(f"{prefix}.input_layernorm.weight")
        self._post_norm = weights.norm(f"{prefix}.post_attention_layernorm.weight")
        self._attention = _LatentAttention(config, f"{prefix}.self_attn", weights)
        self._mlp: _Mlp | _Moe
        if config.is_moe_layer(layer):
            self._mlp = _Moe(config, layer, f"{prefix}.mlp", weights, experts)
        else:
            self._mlp = _Mlp(f"{prefix}.mlp", weights)

    def begin(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: PagedBatch,
        latents: Tensor,
        block_size: int,
        first_row: int = 0,
    ) -> _Begun:
        """Everything up to the routed experts, which are asked; the rest is the result's `end`."""
        normed = self._kernels.rms_norm(hidden, self._input_norm, self._eps)
        hidden = hidden + self._attention.forward(normed, cos, sin, batch, latents, block_size)
        normed = self._kernels.rms_norm(hidden, self._post_norm, self._eps)
        return _Begun(hidden, self._mlp.begin(normed, first_row))


class _Begun(NamedTuple):
    """A layer whose experts are at work."""

    hidden: Tensor
    output: Callable[[], Tensor]
    """Waits for what is to be added to `hidden`."""

    def end(self) -> Tensor:
        return self.hidden + self.output()


class _MtpLayer:
    """The first multi-token-prediction layer (arXiv 2412.19437, section 2.2). Embedding and head are the main model's,
    unless the checkpoint has copies for it that differ."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        experts: ExpertBackend,
        embedding: Tensor,
        head: PackedWeight,
        head_name: str,
    ) -> None:
        prefix = f"model.layers.{config.num_hidden_layers}"
        own_embedding, own_head = f"{prefix}.embed_tokens.weight", f"{prefix}.shared_head.head.weight"
        differs = weights.differ(own_embedding, "model.embed_tokens.weight")
        self._embedding = weights.plain(own_embedding) if differs else embedding
        self.head = weights.linear(own_head) if weights.differ(own_head, head_name) else head
        self._kernels = weights.kernels
        self._eps = config.rms_norm_eps
        self._embedding_norm = weights.norm(f"{prefix}.enorm.weight")
        self._hidden_norm = weights.norm(f"{prefix}.hnorm.weight")
        self._both = weights.linear(f"{prefix}.eh_proj.weight")
        self.layer = _Layer(config, config.num_hidden_layers, weights, experts)
        self.norm = weights.norm(f"{prefix}.shared_head.norm.weight")

    def mix(self, next_ids: Tensor, hidden: Tensor) -> Tensor:
        """The next tokens [T] and the hidden states before them [T, H] -> the layer's input [T, H]."""
        embedded = self._kernels.rms_norm(self._embedding[next_ids], self._embedding_norm, self._eps)
        hidden = self._kernels.rms_norm(hidden, self._hidden_norm, self._eps)
        return self._kernels.linear(torch.cat([embedded, hidden], dim=-1), self._both)


class _LatentAttention:
    """MLA in its absorbed form: W_uk is folded into the query, W_uv applied after the weighted sum of latents."""

    def __init__(self, config: ModelConfig, prefix: str, weights: DecoderWeights) -> None:
        self._config = config
        self._kernels = weights.kernels
        if config.q_lora_rank:
            self._q_a = weights.linear(f"{prefix}.q_a_proj.weight")
            self._q_a_bias = weights.bias(f"{prefix}.q_a_proj.bias")
            self._q_norm = weights.norm(f"{prefix}.q_a_layernorm.weight")
            self._q = weights.linear(f"{prefix}.q_b_proj.weight")
        else:
            self._q = weights.linear(f"{prefix}.q_proj.weight")
        self._kv_a = weights.linear(f"{prefix}.kv_a_proj_with_mqa.weight")
        self._kv_a_bias = weights.bias(f"{prefix}.kv_a_proj_with_mqa.bias")
        self._kv_norm = weights.norm(f"{prefix}.kv_a_layernorm.weight")
        heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
        kv_b = weights.plain(f"{prefix}.kv_b_proj.weight").view(heads, nope + value, config.kv_lora_rank)
        self._w_uk = weights.kernels.pack([head[:nope].T.contiguous() for head in kv_b])
        self._w_uv = weights.kernels.pack([head[nope:].contiguous() for head in kv_b])
        self._o = weights.linear(f"{prefix}.o_proj.weight")
        self._o_bias = weights.bias(f"{prefix}.o_proj.bias")

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: PagedBatch, latents: Tensor, block_size: int
    ) -> Tensor:
        """hidden [T, hidden_size] -> [T, hidden_size]; writes the tokens' latents into `latents` first."""
        config, kernels = self._config, self._kernels
        self._write_latents(hidden, cos, sin, batch.slots, latents)
        wide = hidden.dtype if kernels.rounds_queries else torch.float32
        query = kernels.linear(self._query_input(hidden), self._q, wide)
        query = query.view(hidden.shape[0], config.num_attention_heads, config.qk_head_dim)
        nope, rope = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        absorbed = kernels.per_head_linear(nope, self._w_uk)
        turned = kernels.turn_query(absorbed, query, Rotation(cos, sin, config.rope_interleave))
        if turned is None:
            rope = apply_rope(rope, cos[:, None], sin[:, None], config.rope_interleave)
            turned = torch.cat([absorbed, rope], dim=-1)
        mixed = kernels.latent_attention(
            turned,
            latents,
            batch.block_tables,
            batch.sequence_rows,
            batch.positions,
            block_size,
            config.kv_lora_rank,
            config.softmax_scale,
        )
        values = kernels.per_head_linear(mixed, self._w_uv, hidden.dtype)
        return biased(kernels, values.flatten(1), self._o, self._o_bias)

    def _query_input(self, hidden: Tensor) -> Tensor:
        if not self._config.q_lora_rank:
            return hidden
        compressed = biased(self._kernels, hidden, self._q_a, self._q_a_bias)
        return self._kernels.rms_norm(compressed, self._q_norm, LATENT_NORM_EPS)

    def _write_latents(self, hidden: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, latents: Tensor) -> None:
        """`(RMSNorm(c), RoPE(k_rope))` of the step's tokens, `[T, R + P]`, into the cache."""
        config = self._config
        kv = biased(self._kernels, hidden, self._kv_a, self._kv_a_bias)
        rotation = Rotation(cos, sin, config.rope_interleave)
        if self._kernels.write_latents(kv, self._kv_norm, LATENT_NORM_EPS, rotation, slots, latents):
            return
        compressed, rope = kv.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        compressed = self._kernels.rms_norm(compressed, self._kv_norm, LATENT_NORM_EPS)
        rope = apply_rope(rope.float(), cos, sin, config.rope_interleave)
        latents[slots] = torch.cat([compressed, rope.to(compressed.dtype)], dim=-1)


class _Mlp:
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, prefix: str, weights: DecoderWeights) -> None:
        self._kernels = weights.kernels
        self._gate_up = weights.linear(f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
        self._down = weights.linear(f"{prefix}.down_proj.weight")

    def begin(self, hidden: Tensor, first_row: int) -> Callable[[], Tensor]:
        output = self.forward(hidden)
        return lambda: output

    def begin_aside(self, hidden: Tensor) -> Callable[[], Tensor]:
        """`forward` with the time that the cores have left meanwhile."""
        return self._kernels.mlp_aside(hidden, self._gate_up, self._down) or (lambda: self.forward(hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        gated = self._kernels.silu_mul(self._kernels.linear(hidden, self._gate_up))
        return self._kernels.linear(gated, self._down)


class _Moe:
    """Gate, routed experts behind the backend, shared experts while the routed ones are away (where these are computed
    on the same cores, in the time that they leave)."""

    def __init__(
        self, config: ModelConfig, layer: int, prefix: str, weights: DecoderWeights, experts: ExpertBackend
    ) -> None:
        self._config = config
        self._layer = layer
        self._kernels = weights.kernels
        self._experts = experts
        self._gate = weights.kernels.pack([weights.plain(f"{prefix}.gate.weight", torch.float32)])
        self._bias = weights.bias(f"{prefix}.gate.e_score_correction_bias")
        self._choice = choice_of(config)
        self._shared = _Mlp(f"{prefix}.shared_experts", weights) if config.n_shared_experts else None

    def begin(self, hidden: Tensor, first_row: int) -> Callable[[], Tensor]:
        """Ask the experts; the result waits for them."""
        logits = self._kernels.linear(hidden, self._gate, torch.float32)
        scores = self._kernels.scores(logits, self._config.scoring_func)
        chosen = self._kernels.choose_experts(scores, self._bias, self._choice)
        expert_ids, slot_weights = chosen or choose_experts(scores, self._bias, self._config)
        there = self._experts.device
        ticket = self._experts.dispatch(self._layer, moved(hidden, there), moved(expert_ids, there), first_row)
        if self._shared is None:
            return lambda: self._combine(ticket, slot_weights, hidden)
        if self._experts.uses_our_cores(ticket):
            shared = self._shared.begin_aside(hidden)
            return lambda: self._combine(ticket, slot_weights, hidden) + shared()
        output = self._shared.forward(hidden)
        return lambda: self._combine(ticket, slot_weights, hidden) + output

    def _combine(self, ticket: Any, slot_weights: Tensor, hidden: Tensor) -> Tensor:
        rows = moved(self._experts.combine(ticket), hidden.device)
        combined = self._kernels.combine_slots(rows, slot_weights)
        return combine_slots(rows, slot_weights).to(hidden.dtype) if combined is None else combined
