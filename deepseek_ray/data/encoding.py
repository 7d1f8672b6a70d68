"""Documents to token ids for training, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import tokenizers

from deepseek_ray.data.packing import PackedDocuments
from deepseek_ray.data.readers import Document
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import DataError


@dataclass(frozen=True)
class DocumentEncoder:
    """Writes a document as BOS (if the tokenizer has one), its text's tokens, EOS. Travels between processes.

    Special tokens spelt out in a text stay text: a corpus cannot forge a document's end or a user's turn.
    """

    tokenizer_json: str
    vocab_size: int
    bos_id: int | None
    eos_id: int

    @classmethod
    def from_dir(cls, directory: Path) -> DocumentEncoder:
        """From tokenizer files. DataError when they name no end-of-sequence token: documents would run together."""
        tokenizer = Tokenizer.from_dir(directory)
        if tokenizer.eos_token_id is None:
            raise DataError(f"{directory}: the tokenizer names no eos_token; add it to tokenizer_config.json")
        text = (directory / "tokenizer.json").read_text(encoding="utf-8")
        return cls(text, tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id)

    def encode(self, documents: Sequence[Document]) -> PackedDocuments:
        """The documents laid end to end, tokens as uint32."""
        head = [] if self.bos_id is None else [self.bos_id]
        texts = [document.text for document in documents]
        encodings = _backend(self.tokenizer_json).encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array([*head, *encoding.ids, self.eos_id], dtype=np.uint32) for encoding in encodings]
        return PackedDocuments(
            tokens=np.concatenate(ids) if ids else np.empty(0, dtype=np.uint32),
            lengths=np.array([len(document) for document in ids], dtype=np.int64),
            num_bytes=sum(len(text.encode()) for text in texts),
        )


@lru_cache(maxsize=2)
def _backend(tokenizer_json: str) -> tokenizers.Tokenizer:
    """One per process: building it from a large vocabulary takes longer than encoding a document."""
    backend = tokenizers.Tokenizer.from_str(tokenizer_json)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend
