"""Conversations to masked blocks: exactly the assistant's tokens are learned, after the prompts that serving makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from deepseek_ray.config.finetune import ConversationsConfig
from deepseek_ray.data.chat_encoding import DEFAULT_TEMPLATE, EncodedConversation, encode_conversation, pack_whole
from deepseek_ray.data.conversations import Conversation, read_conversations
from deepseek_ray.data.corpus import find_files
from deepseek_ray.data.loader import read_batch
from deepseek_ray.data.prepare_conversations import prepare_conversations
from deepseek_ray.data.tokenizer_training import CHAT_TEMPLATE, save_tokenizer, train_tokenizer
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import DataError
from deepseek_ray.training.loss import IGNORED_TARGET, next_tokens

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is two and two?"},
    {"role": "assistant", "content": "it is four"},
    {"role": "user", "content": "and three more ünïcode?"},
    {"role": "assistant", "content": " seven ünïts\n"},
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer files with the project's own chat template."""
    directory = tmp_path_factory.mktemp("model")
    texts = [message["content"] for message in TURNS] * 3
    save_tokenizer(train_tokenizer(texts, vocab_size=320), directory)
    return directory


def without_template(model_dir: Path, target: Path, template: str | None = None) -> Path:
    target.mkdir()
    (target / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    values = json.loads((model_dir / "tokenizer_config.json").read_text())
    del values["chat_template"]
    (target / "tokenizer_config.json").write_text(
        json.dumps(values | ({"chat_template": template} if template else {}))
    )
    return target


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def settings(tmp_path: Path, path: Path, **changes: Any) -> ConversationsConfig:
    values = {"paths": [str(path)], "sequence_length": 64, "cache_dir": str(tmp_path / "cache"), **changes}
    return ConversationsConfig.parse(values)


def conversation(*messages: dict[str, str]) -> Conversation:
    return Conversation(messages, "test", 0)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, DEFAULT_TEMPLATE], ids=["deepseek", "default"])
def test_exactly_the_assistants_tokens_are_learned(model_dir: Path, tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer.from_dir(without_template(model_dir, tmp_path / "model", template))
    encoded = encode_conversation(conversation(*TURNS), tokenizer)
    assert tokenizer.decode(encoded.tokens.tolist(), skip_special_tokens=False) == tokenizer.apply_chat_template(
        TURNS, add_generation_prompt=False
    )
    edges = np.flatnonzero(np.diff(encoded.learned.astype(int), prepend=0, append=0))
    spans = [encoded.tokens[start:stop].tolist() for start, stop in edges.reshape(-1, 2)]
    space = "" if template == CHAT_TEMPLATE else " "
    expected = [space + TURNS[2]["content"], space + TURNS[4]["content"]]
    assert [tokenizer.decode(span[:-1], skip_special_tokens=False) for span in spans] == expected
    assert [span[-1] for span in spans] == [tokenizer.eos_token_id] * 2
    assert encoded.num_bytes == sum(len(text.encode()) for text in expected)


def test_the_prompt_is_that_of_serving(model_dir: Path) -> None:
    """What stands before the first answer is, id for id, what a chat request with these messages would send."""
    tokenizer = Tokenizer.from_dir(model_dir)
    encoded = encode_conversation(conversation(*TURNS), tokenizer)
    prompt = tokenizer.encode(tokenizer.apply_chat_template(TURNS[:2]), add_special_tokens=False)
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert encoded.learned.argmax() == len(prompt)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "writes no end of sequence after"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "differently"),
        ("{% for m in messages %}{{ raise_exception('no') }}{% endfor %}", "cannot render these messages: no"),
    ],
    ids=["endless", "rewrites", "refuses"],
)
def test_a_template_that_hides_the_answer_is_refused(
    model_dir: Path, tmp_path: Path, template: str, message: str
) -> None:
    tokenizer = Tokenizer.from_dir(without_template(model_dir, tmp_path / "model", template))
    with pytest.raises(DataError, match=f"test: .*{message}"):
        encode_conversation(conversation(*TURNS[1:3]), tokenizer)


def test_rows_hold_whole_conversations() -> None:
    """Sizes 5, 4, 3, 2, 2 in rows of 8: 5 + 3, 4 + 2 + 2."""
    sizes = [2, 4, 5, 3, 2]
    some = [EncodedConversation(np.full(n, n, np.uint32), np.ones(n, bool), n) for n in sizes]
    packed = pack_whole(some, 8, 0)
    assert packed.tokens.tolist() == [5] * 5 + [3] * 3 + [4] * 4 + [2] * 4
    assert packed.lengths.tolist() == [5, 3, 4, 2, 2]
    padded = pack_whole(some[:2], 8, 7)
    assert padded.tokens.tolist() == [4] * 4 + [2] * 2 + [7] * 2
    assert padded.loss_mask is not None
    assert padded.loss_mask.tolist() == [True] * 6 + [False] * 2


def test_prepared_targets_are_the_answers(model_dir: Path, tmp_path: Path) -> None:
    """Through files, packing and batches: the targets of all samples are the answers with their ends, once each."""
    lines = [{"messages": [*TURNS[:2], {"role": "assistant", "content": f"answer {n}"}]} for n in range(9)]
    path = write_lines(tmp_path / "train.jsonl", lines)
    held_out = write_lines(tmp_path / "held_out.jsonl", lines[:2])
    data = prepare_conversations(settings(tmp_path, path, validation_paths=[str(held_out)]), model_dir)
    assert (data.counts.train, data.counts.validation, data.counts.truncated) == (9, 2, 0)
    tokenizer = Tokenizer.from_dir(data.tokenizer_dir)
    num_samples = data.train.num_samples(64)
    batch = read_batch(data.train, np.arange(num_samples), 64)
    targets = next_tokens(batch["tokens"], batch["document_ids"], loss_mask=batch["loss_mask"])
    learned = targets[targets != IGNORED_TARGET].tolist()
    texts = tokenizer.decode(learned, skip_special_tokens=False).split("<｜end▁of▁sentence｜>")
    assert sorted(texts) == ["", *(f"answer {n}" for n in range(9))]
    assert data.train.num_targets == len(learned)
    assert data.train.bytes_per_token == sum(len(f"answer {n}") for n in range(9)) / len(learned)


def test_long_conversations_are_cut_and_counted(model_dir: Path, tmp_path: Path) -> None:
    long_answer = [TURNS[1], {"role": "assistant", "content": "four " * 100}]
    long_question = [{"role": "user", "content": "what " * 100}, TURNS[2]]
    lines = [{"messages": messages} for messages in (TURNS[:3], long_answer, long_question)]
    path = write_lines(tmp_path / "some.jsonl", lines)
    config = settings(tmp_path, path, validation_paths=[str(write_lines(tmp_path / "held.jsonl", lines[:1]))])
    data = prepare_conversations(config, model_dir)
    assert (data.counts.train, data.counts.truncated, data.counts.dropped) == (2, 1, 1)
    assert "1 truncated to data.sequence_length, 1 dropped" in data.counts.describe()
    assert prepare_conversations(config, model_dir).counts == data.counts  # from the cache


def test_pairs_a_system_prompt_and_the_split(model_dir: Path, tmp_path: Path) -> None:
    lines = [{"question": f"what is {n}?", "answer": f"it is {n}"} for n in range(40)]
    path = write_lines(tmp_path / "pairs.jsonl", lines)
    fields = {"prompt_field": "question", "completion_field": "answer", "system_prompt": "be brief"}
    config = settings(tmp_path, path, validation_fraction=0.3, **fields)
    first = next(read_conversations(find_files(config)[0], config))
    assert [message["content"] for message in first.messages] == ["be brief", "what is 0?", "it is 0"]
    data = prepare_conversations(config, model_dir)
    assert data.counts.train + data.counts.validation == 40
    assert 0 < data.counts.validation < 25


def test_a_model_without_template_gets_the_default_and_keeps_it(model_dir: Path, tmp_path: Path) -> None:
    bare = without_template(model_dir, tmp_path / "bare")
    path = write_lines(tmp_path / "some.jsonl", [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(20)])
    data = prepare_conversations(settings(tmp_path, path, validation_fraction=0.3), bare)
    ours, theirs = Tokenizer.from_dir(data.tokenizer_dir), AutoTokenizer.from_pretrained(data.tokenizer_dir)
    text = ours.apply_chat_template(TURNS[:2])
    assert text == "<｜begin▁of▁sentence｜>system: be brief\n\nuser: what is two and two?\n\nassistant:"
    assert theirs.apply_chat_template(TURNS[:2], tokenize=False, add_generation_prompt=True) == text


def test_a_given_template_wins(model_dir: Path, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    capital = DEFAULT_TEMPLATE.replace("assistant:", "ASSISTANT:").replace(
        "message['role'] }}:", "message['role'] | upper }}:"
    )
    template.write_text(capital)
    path = write_lines(tmp_path / "some.jsonl", [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(20)])
    config = settings(tmp_path, path, validation_fraction=0.3, chat_template=str(template))
    tokenizer = Tokenizer.from_dir(prepare_conversations(config, model_dir).tokenizer_dir)
    assert tokenizer.apply_chat_template(TURNS[:1]).endswith("ASSISTANT:")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', r"bad.jsonl, line 2: not JSON"),
        ('{"messages": []}', r"line 2: no message of the role 'assistant'"),
        ('{"messages": {}}', r"line 2: field 'messages' holds dict, not a list"),
        ('{"messages": [{"role": "user"}]}', r"line 2: message 0 is .*a message is"),
        ('{"question": "x"}', r"neither field 'messages' nor 'prompt' \(fields: question\); set data.messages_field"),
        ('{"prompt": "x", "completion": ""}', r"field 'completion' holds '', not a text"),
        ('{"prompt": "x", "completion": "\\ud800"}', r"line 2: holds a lone surrogate"),
        ("[1]", r"a JSON list, not an object"),
    ],
)
def test_broken_lines_are_named(model_dir: Path, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "x", "completion": "y"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        prepare_conversations(settings(tmp_path, path), model_dir)
    assert not list((tmp_path / "cache").iterdir())
