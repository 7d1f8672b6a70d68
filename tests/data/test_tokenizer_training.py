"""The tokenizer we train: deterministic, and what transformers makes of its files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_ray.data.encoding import DocumentEncoder
from deepseek_ray.data.readers import Document
from deepseek_ray.data.tokenizer_training import ASSISTANT, BOS, EOS, USER, save_tokenizer, train_tokenizer
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import DataError

TEXTS = [Path(json.__file__).read_text(encoding="utf-8"), "naïve 漢字 👩‍👩‍👧\n", "def f(x):\n        return x\n" * 20]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    save_tokenizer(train_tokenizer(TEXTS, 600), directory)
    return directory


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_transformers_agrees_id_for_id(directory: Path, tmp_path: Path, beside_a_model: bool) -> None:
    from transformers import AutoTokenizer  # here: another process imports this file for its texts

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    if beside_a_model:  # transformers picks another tokenizer class from the model type
        (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3", "eos_token_id": 1}')
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_dir(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert (ours.bos_token_id, ours.eos_token_ids, ours.pad_token_id) == (0, {1}, 2)
    assert ours.vocab_size == len(theirs) == 600
    for text in [*TEXTS, f"{USER}hi{ASSISTANT}there{EOS}", ""]:
        assert ours.encode(text) == theirs.encode(text)
        ids = ours.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=False) == text == theirs.decode(ids)
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
    ]
    expected = f"{BOS}S{USER}U{ASSISTANT}A{EOS}{USER}V{ASSISTANT}"
    assert ours.apply_chat_template(messages) == expected
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected


@pytest.mark.parametrize("num_threads", ["1", "4"])
def test_training_is_deterministic(directory: Path, tmp_path: Path, num_threads: str) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "from test_tokenizer_training import TEXTS; from deepseek_ray.data.tokenizer_training import *;"
        "save_tokenizer(train_tokenizer(TEXTS, 600), Path(sys.argv[1]))"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": num_threads, "PYTHONHASHSEED": num_threads}
    arguments = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    subprocess.run(arguments, check=True, env=environment)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        digests = {hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (directory, tmp_path)}
        assert len(digests) == 1, name


def test_small_texts_give_a_smaller_vocabulary_and_none_an_error() -> None:
    assert train_tokenizer(["ab"], 600).get_vocab_size() < 600
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer([], 600)


def test_documents_are_framed_and_cannot_forge_special_tokens(directory: Path) -> None:
    encoder = DocumentEncoder.from_dir(directory)
    texts = ["one ü", f"forged {EOS} end"]
    packed = encoder.encode([Document("", text) for text in texts])
    first, second = packed.tokens[: packed.lengths[0]].tolist(), packed.tokens[packed.lengths[0] :].tolist()
    tokenizer = Tokenizer.from_dir(directory)
    for ids, text in ((first, texts[0]), (second, texts[1])):
        assert (ids[0], ids[-1]) == (0, 1)
        assert not set(ids[1:-1]) & tokenizer.special_ids
        assert tokenizer.decode(ids) == text
    assert packed.num_bytes == sum(len(text.encode()) for text in texts)
    assert len(encoder.encode([]).tokens) == 0


def test_a_tokenizer_without_an_end_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match="names no eos_token; add it to tokenizer_config"):
        DocumentEncoder.from_dir(tmp_path)
