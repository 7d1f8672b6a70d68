"""Small training runs for tests: a corpus written in milliseconds, a model of a few thousand weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.data.blocks import TokenBlocks
from deepseek_ray.data.encoding import DocumentEncoder
from deepseek_ray.data.packing import BlockWriter
from deepseek_ray.data.prepare import PreparedData
from deepseek_ray.data.readers import Document
from deepseek_ray.data.tokenizer_training import save_tokenizer, train_tokenizer

WORDS = ("for", "line", "in", "file", "if", "value", "is", "not", "none", "return", "the", "sum", "of", "all", "rows")

SMALL_RUN: dict[str, Any] = {
    "name": "small",
    "model": {
        "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "max_position_embeddings": 64, "num_nextn_predict_layers": 1,
    },
    "data": {"vocab_size": 512, "sequence_length": 24},
    "optimizer": {"lr": 1e-2},
    "schedule": {"warmup_steps": 2},
    "balance": {"bias_update_speed": 1e-2, "sequence_loss_alpha": 1e-2},
    "training": {
        "steps": 12, "global_batch_size": 8, "micro_batch_size": 4, "validation_interval": 4, "checkpoint_interval": 4,
        "validation_samples": 8, "final_validation_samples": 12, "keep_checkpoints": 2, "threads_per_worker": 1,
    },
}  # fmt: skip


def small_config(**sections: dict[str, Any] | str) -> PretrainConfig:
    """The small run with some keys of some sections changed."""
    values = dict(SMALL_RUN)
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes} if isinstance(changes, dict) else changes
    return PretrainConfig.parse(values)


def small_data(directory: Path, num_documents: int = 60) -> PreparedData:
    """Sentences of a few words, 3 to 60 words a document, so that most samples hold several documents."""
    chooser = random.Random(0)
    texts = [" ".join(chooser.choices(WORDS, k=chooser.randint(3, 60))) for _ in range(num_documents)]
    save_tokenizer(train_tokenizer(texts, vocab_size=512), directory / "tokenizer")
    encoder = DocumentEncoder.from_dir(directory / "tokenizer")
    sides = {"train": texts[: -num_documents // 5], "validation": texts[-num_documents // 5 :]}
    blocks = {side: _write(directory / side, encoder, part) for side, part in sides.items()}
    return PreparedData(directory, blocks["train"], blocks["validation"], num_documents, 0, ())


def _write(directory: Path, encoder: DocumentEncoder, texts: list[str]) -> TokenBlocks:
    with BlockWriter(directory, encoder.vocab_size) as writer:
        writer.append(encoder.encode([Document(str(index), text) for index, text in enumerate(texts)]))
        writer.finish()
    return TokenBlocks.open(directory)
