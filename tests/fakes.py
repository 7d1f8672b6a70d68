"""Small stand-ins that behave like the real thing, for tests of what stands around it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from deepseek_ray.engine.engine import Engine
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.kernels.base import Place
from deepseek_ray.messages import GenerateRequest, TokenEvent
from deepseek_ray.nn.paged import LatentCache, PagedBatch


@dataclass(frozen=True)
class FakeShape:
    vocab_size: int = 261
    num_hidden_layers: int = 2
    latent_width: int = 6
    max_position_embeddings: int = 256
    eos_token_id: int | None = None


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

    def draw(self, logits: np.ndarray, rows: Sequence[int], places: Sequence[Place]) -> list[int] | None:
        return None

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


BYTE_EOS = 256


def byte_tokenizer() -> Tokenizer:
    """One token per byte (id = byte), `<eos>` 256 and four more special tokens: as many ids as `FakeShape` has."""
    return Tokenizer(_byte_backend(), {"eos_token": "<eos>"}, [BYTE_EOS], None, "byte tokenizer of the tests")


def write_byte_tokenizer(directory: Path) -> None:
    """The files of `byte_tokenizer`, beside a checkpoint."""
    _byte_backend().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))


def _byte_backend() -> tokenizers.Tokenizer:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<a>", "<b>", "<c>", "<d>"])
    return backend


@dataclass
class Collected:
    """All events of one request, joined."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    error_kind: str | None = None
    events: list[TokenEvent] = field(default_factory=list)

    def add(self, event: TokenEvent) -> None:
        assert self.finish_reason is None, "an event after the last one"
        self.events.append(event)
        self.token_ids += event.token_ids
        self.text += event.text
        self.logprobs += event.logprobs or []
        self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
        self.error, self.error_kind = event.error, event.error_kind


def run_to_end(engine: Engine, requests: Iterable[GenerateRequest]) -> dict[str, Collected]:
    """Add all requests, step until nothing is left, and check that nothing is left behind."""
    collected = {}
    for request in requests:
        collected[request.request_id] = Collected()
        engine.add_request(request)
    while engine.has_work:
        for event in engine.step():
            collected[event.request_id].add(event)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_kv_blocks_used) == (0, 0, 0)
    return collected
