"""Small stand-ins that behave like the real thing, for tests of what stands around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_ray.nn.paged import LatentCache, PagedBatch


@dataclass(frozen=True)
class FakeShape:
    vocab_size: int = 261
    num_hidden_layers: int = 2
    latent_width: int = 6
    max_position_embeddings: int = 256


class FakeDecoder:
    """A tiny causal "model" that reads its past only from the paged cache.

    Layer 0 stores features of (token, position); layer 1 stores what layer 0's visible latents sum up to, so a latent
    depends on all tokens before it. A wrong slot, block table, position or chunk border changes the logits. Tokens are
    computed one by one, so a row's bits cannot depend on its batch.
    """

    dtype = torch.float32

    def __init__(self, config: FakeShape | None = None) -> None:
        self.config = config or FakeShape()
        generator = torch.Generator().manual_seed(7)
        width, vocab = self.config.latent_width, self.config.vocab_size
        self._token_features = torch.randn(vocab, width, generator=generator)
        self._position_features = torch.randn(self.config.max_position_embeddings, width, generator=generator)
        # Unit rows: each token is the likeliest somewhere. Sines keep the state moving, so outputs do not settle.
        self._head = torch.nn.functional.normalize(torch.randn(vocab, width, generator=generator)) * 8
        self.num_steps = 0
        self.num_tokens_per_step: list[int] = []
        self.poisoned_tokens: set[int] = set()
        """After one of these tokens the logits are NaN."""
        self.failures: list[Exception] = []
        """Raised by the next calls of `forward`, one each."""

    def new_cache(self, num_blocks: int, block_size: int) -> LatentCache:
        config = self.config
        cache = LatentCache(config.num_hidden_layers, num_blocks, block_size, config.latent_width, self.dtype)
        cache.data.fill_(torch.nan)  # reading a slot that was never written shows
        return cache

    def forward(self, batch: PagedBatch, cache: LatentCache) -> Tensor:
        if self.failures:
            raise self.failures.pop(0)
        self.num_steps += 1
        self.num_tokens_per_step.append(batch.num_tokens)
        logits: dict[int, Tensor] = {}
        for t in range(batch.num_tokens):  # in order: a token's past is written before it is read
            logits[t] = self._token(batch, t, cache)
        rows = [logits[t] for t in batch.logit_rows.tolist()]
        return torch.stack(rows) if rows else torch.empty(0, self.config.vocab_size)

    def _token(self, batch: PagedBatch, t: int, cache: LatentCache) -> Tensor:
        token_id, position, slot = int(batch.token_ids[t]), int(batch.positions[t]), int(batch.slots[t])
        table = batch.block_tables[int(batch.sequence_rows[t])].long()
        places = torch.arange(position + 1)
        visible = table[places // cache.block_size] * cache.block_size + places % cache.block_size
        cache.layer(0)[slot] = self._token_features[token_id] + self._position_features[position]
        cache.layer(1)[slot] = torch.sin(3 * _decayed_sum(cache.layer(0)[visible]))
        logits = self._head @ torch.sin(3 * _decayed_sum(cache.layer(1)[visible]))
        return logits * torch.nan if token_id in self.poisoned_tokens else logits


def _decayed_sum(latents: Tensor) -> Tensor:
    """[visible, width] -> [width]: nearer tokens weigh more, none weighs nothing."""
    distance = torch.arange(latents.shape[0] - 1, -1, -1, dtype=latents.dtype)
    return ((1 / (1 + distance))[:, None] * latents).sum(0)
