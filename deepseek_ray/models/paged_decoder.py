"""The decoder for inference: flat tokens of many sequences, absorbed MLA over a paged latent cache.

Prefill, decode and recompute take the same road with the same row-invariant operators, so a token's logits have the
same bits whichever of them computed it and whoever shared the batch. Weights are read once, packed, and never trained;
the trainable twin is `models/decoder.py`.

Letters: T tokens of the step, H hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.kernels.base import Kernels, PackedWeight, Place, Rotation, Step
from deepseek_ray.kernels.quantize import Quantization
from deepseek_ray.kernels.select import default_kernels
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.decoder_weights import DecoderWeights
from deepseek_ray.models.paged_layer import Layer, LayerEnd
from deepseek_ray.nn.moe import ExpertBackend
from deepseek_ray.nn.paged import LatentCache, PagedBatch
from deepseek_ray.nn.rope import rope_tables


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
            self._layers.append(Layer(self.config, layer, weights, experts))
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
            mixed = self._mtp.layer.begin(mixed, self._step(batch, cache), own)()
            return self._logits(mixed[batch.logit_rows], self._mtp.norm, self._mtp.head).argmax(dim=1)

    def _decode(self, batch: PagedBatch, cache: LatentCache) -> Tensor:
        """The last layer's output. Micro-batches take turns (MegaScale-Infer, arXiv 2504.02263, section 4.1): each goes
        on to the next layer when its experts have answered, while those of the others are computed.

        The first ones come first in every layer, so a token finds the latents of those before it in its sequence.
        """
        parts = self._parts(batch)
        steps = [self._step(part, cache) for _, part in parts]
        hidden = [self._embedding[part.token_ids] for _, part in parts]
        ends: list[LayerEnd] = []
        for index, layer in enumerate(self._layers):
            latents = cache.layer(index)
            for place, (first_row, _) in enumerate(parts):
                if index:
                    hidden[place] = ends.pop(0)()
                ends.append(layer.begin(hidden[place], steps[place], latents, first_row))
        outputs = [end() for end in ends]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _parts(self, batch: PagedBatch) -> list[tuple[int, PagedBatch]]:
        """Place of the first row, and the micro-batch."""
        count = max(1, min(self._micro_batches, batch.num_tokens))
        if count == 1:
            return [(0, batch)]
        edges = [batch.num_tokens * place // count for place in range(count + 1)]
        return [(first, batch.part(first, last)) for first, last in itertools.pairwise(edges)]

    def _step(self, batch: PagedBatch, cache: LatentCache) -> Step:
        rotation = Rotation(self._cos[batch.positions], self._sin[batch.positions], self.config.rope_interleave)
        places = batch.slots, batch.positions, batch.sequence_rows, batch.block_tables
        return Step(rotation, *places, cache.block_size)

    def _logits(self, hidden: Tensor, norm: Tensor, head: PackedWeight) -> Tensor:
        return self._kernels.linear(self._kernels.rms_norm(hidden, norm, self.config.rms_norm_eps), head, torch.float32)


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
        self.layer = Layer(config, config.num_hidden_layers, weights, experts)
        self.norm = weights.norm(f"{prefix}.shared_head.norm.weight")

    def mix(self, next_ids: Tensor, hidden: Tensor) -> Tensor:
        """The next tokens [T] and the hidden states before them [T, H] -> the layer's input [T, H]."""
        embedded = self._kernels.rms_norm(self._embedding[next_ids], self._embedding_norm, self._eps)
        hidden = self._kernels.rms_norm(hidden, self._hidden_norm, self._eps)
        return self._kernels.linear(torch.cat([embedded, hidden], dim=-1), self._both)
