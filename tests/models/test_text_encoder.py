"""Texts to vectors: equal to transformers by hand, alone and in batches, and as the directory's files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import MAX_LENGTH, WORDS, write_encoder
from transformers import AutoModel, AutoTokenizer

from deepseek_ray.errors import CheckpointError, RequestError
from deepseek_ray.models.pooling import Pooling
from deepseek_ray.models.text_encoder import TextEncoder, check_encoder_dir

TEXTS = ["abc", "the quick brown fox", "z", "jumps over the lazy dog again"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def vectors(encoder: TextEncoder, texts: list[str]) -> torch.Tensor:
    return encoder.encode(encoder.tokenize(texts))


def test_a_batch_gives_the_vectors_of_each_text_alone(directory: Path) -> None:
    encoder = TextEncoder(directory)
    alone = torch.cat([vectors(encoder, [text]) for text in TEXTS])
    assert (vectors(encoder, TEXTS) - alone).abs().max() < 1e-5
    assert (alone[0] - alone[1]).abs().max() > 1e-2


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False), ("max", True), (None, False)])
def test_vectors_are_those_of_transformers_pooled_by_hand(pooling: str | None, normalize: bool, tmp_path: Path) -> None:
    directory = write_encoder(tmp_path, pooling, normalize)
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    for text in TEXTS:
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        wanted = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0)}[pooling or "mean"]
        if normalize:
            wanted = wanted / wanted.norm()
        assert torch.allclose(vectors(TextEncoder(directory), [text])[0], wanted, atol=1e-6)


def test_inputs_that_the_model_cannot_take_are_refused(directory: Path) -> None:
    encoder = TextEncoder(directory)
    assert (encoder.max_length, encoder.vocab_size) == (MAX_LENGTH, len(WORDS))
    encoder.check_ids([2] * MAX_LENGTH)
    with pytest.raises(RequestError, match=f"{MAX_LENGTH + 1} tokens; this model takes 1 to {MAX_LENGTH}") as caught:
        encoder.check_ids([2] * (MAX_LENGTH + 1))
    assert caught.value.code == "context_length_exceeded"
    for ids in ([], [-1], [len(WORDS)], [2**63]):
        with pytest.raises(RequestError):
            encoder.check_ids(ids)


def test_the_shorter_limit_of_sentence_transformers_counts(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path)
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8, "do_lower_case": True}))
    encoder = TextEncoder(directory)
    assert encoder.max_length == 8
    assert encoder.tokenize(["ABC"]) == encoder.tokenize(["abc"])


def test_what_is_missing_or_forbidden_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        check_encoder_dir(tmp_path / "none")
    directory = write_encoder(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(CheckpointError, match="auto_map"):
        TextEncoder(directory)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "config_sentence_transformers.json").write_text(json.dumps({"default_prompt_name": "query"}))
    with pytest.raises(CheckpointError, match="default_prompt_name"):
        check_encoder_dir(directory)
    (directory / "config_sentence_transformers.json").unlink()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \*.safetensors"):
        check_encoder_dir(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        check_encoder_dir(directory)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}], "the step 'Dense'"),
        ([{"type": "sentence_transformers.models.Pooling", "path": "gone"}], "cannot be read"),
    ],
)
def test_steps_that_cannot_be_honoured_are_refused(modules: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=message):
        Pooling.from_dir(tmp_path)


def test_other_ways_of_pooling_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="mean_sqrt_len"):
        Pooling.from_dir(write_encoder(tmp_path, "sqrt"))


def test_the_newer_way_to_write_a_mode(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path, "cls")
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "max"}))
    assert Pooling.from_dir(directory) == Pooling("max", normalize=True)
