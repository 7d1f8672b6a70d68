"""A Hugging Face encoder on one device: texts to vectors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_ray.errors import CheckpointError, RequestError
from deepseek_ray.models.pooling import Pooling


def check_encoder_dir(model_dir: Path) -> None:
    """CheckpointError naming what a directory lacks, or holds that must not be loaded. Reads no weights."""
    if not model_dir.is_dir():
        raise CheckpointError(
            f"{model_dir} is not a directory; give the path of an encoder in the Hugging Face layout (config.json, "
            "tokenizer.json and *.safetensors)"
        )
    for name in ("config.json", "tokenizer.json"):
        if not (model_dir / name).is_file():
            raise CheckpointError(f"{model_dir} holds no {name}; copy the whole directory of the model")
    if not any(model_dir.glob("*.safetensors")):
        raise CheckpointError(f"{model_dir} holds no *.safetensors; put the weights there (no other format is read)")
    if "auto_map" in _settings(model_dir, "config.json"):
        raise CheckpointError(f"{model_dir / 'config.json'} asks for code of its own (auto_map), which is never run")
    if _settings(model_dir, "config_sentence_transformers.json").get("default_prompt_name"):
        raise CheckpointError(
            f"{model_dir / 'config_sentence_transformers.json'} puts a prompt before every text; remove "
            "default_prompt_name and let clients send the prompt"
        )
    Pooling.from_dir(model_dir)


class TextEncoder:
    """Texts -> token ids -> vectors. `width` is the length of a vector, `max_length` the longest input in tokens."""

    def __init__(self, model_dir: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Load from a local directory; nothing is downloaded and no code of the model is run. CheckpointError."""
        from transformers import AutoModel, AutoTokenizer

        directory = Path(model_dir)
        check_encoder_dir(directory)
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, **local)
            self._model = AutoModel.from_pretrained(directory, dtype=dtype, use_safetensors=True, **local).eval()
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{directory} cannot be loaded: {error}") from None
        self._pooling = Pooling.from_dir(directory)
        self._lower = _settings(directory, "sentence_bert_config.json").get("do_lower_case", False)
        self.width: int = self._model.config.hidden_size
        self.vocab_size: int = self._model.config.vocab_size
        self.max_length = _max_length(directory, self._tokenizer, self._model.config)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with the special tokens of the model; not cut."""
        wanted = [text.lower() for text in texts] if self._lower else list(texts)
        return self._tokenizer(wanted, add_special_tokens=True, verbose=False)["input_ids"]

    def check_ids(self, ids: Sequence[int]) -> None:
        """RequestError for an input that the model cannot take."""
        if not 0 < len(ids) <= self.max_length:
            raise RequestError(
                f"an input has {len(ids)} tokens; this model takes 1 to {self.max_length}: split it",
                param="input",
                code="context_length_exceeded" if ids else None,
            )
        wrong = next((id for id in ids if not 0 <= id < self.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"input holds the token id {wrong}; ids are 0 to {self.vocab_size - 1}", param="input")

    @torch.inference_mode()
    def encode(self, batch: Sequence[Sequence[int]]) -> Tensor:
        """batch: token ids per text -> float32 [texts, width] on the CPU. Padding changes a vector by rounding only."""
        longest = max(map(len, batch))
        ids = torch.tensor([[*row, *[self._padding] * (longest - len(row))] for row in batch])
        lengths = torch.tensor([len(row) for row in batch])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        return self._pooling(hidden.float(), mask)

    @property
    def _padding(self) -> int:
        return self._tokenizer.pad_token_id or 0


def _max_length(directory: Path, tokenizer: Any, config: Any) -> int:
    """The smallest of what the model's files name; RoBERTa's positions start behind the padding id."""
    limits = [tokenizer.model_max_length, _settings(directory, "sentence_bert_config.json").get("max_seq_length")]
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        limits.append(positions - (config.pad_token_id + 1 if "roberta" in config.model_type else 0))
    known = [limit for limit in limits if limit]
    return int(min(known))


def _settings(directory: Path, name: str) -> dict[str, Any]:
    """An object of settings; empty for a file that is not there."""
    file = directory / name
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); copy the model's directory again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds a {type(values).__name__}; it must be a JSON object")
    return values
