"""Our tokenizer against transformers on the same files, and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from deepseek_ray.engine.chat_template import PLAIN_TEMPLATE
from deepseek_ray.engine.detokenizer import Detokenizer
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import CheckpointError, RequestError

BOS, EOS, USER, ASSISTANT = "<｜begin｜>", "<｜end｜>", "<｜User｜>", "<｜Assistant｜>"
TEXT = [
    "def f(x):\n    return x + 1\n" * 3,
    "naïve café — 漢字かな, Ελληνικά, 👩‍👩‍👧 emoji, \x00 control\r\n\ttabs",
    f"a special {EOS} written out, then{USER}more",
    "",
]
# What the public DeepSeek templates use: namespaces, loop conditions, tojson, a refusal, generation marks.
CHAT_TEMPLATE = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(system='') %}
{{ bos_token }}{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% set ns.system = ns.system + message['content'] %}
{{ ns.system }}{% if message['name'] is defined %} named {{ message['name'] }}{% endif %}
    {%- elif message['role'] == 'user' %}<｜User｜>{{ message['content'] | trim }}
    {%- elif message['role'] == 'assistant' %}
        {%- generation %}<｜Assistant｜>{{ message['content'] }}{{ eos_token }}{% endgeneration %}
    {%- elif message['role'] == 'tool' %}{{ message['content'] | tojson }}{% continue %}
    {%- else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}<｜Assistant｜>{% if thinking %}<think>{% endif %}{% endif %}"""
MESSAGES = [
    {"role": "system", "content": "Be <brief> & 'exact'.", "name": None},
    {"role": "user", "content": " hello\n"},
    {"role": "assistant", "content": "hi"},
    {"role": "tool", "content": {"ü": [1, "<b>"]}},
    {"role": "user", "content": "你好"},
]


def byte_level_backend(extra: int = 120) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 4 + extra,
        special_tokens=[BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return backend


def write_files(directory: Path, config: dict[str, Any] | None = None) -> Path:
    byte_level_backend().save(str(directory / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": {"__type": "AddedToken", "content": EOS},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(values | (config or {})), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("tokenizer"), {"chat_template": CHAT_TEMPLATE})


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(model_dir)


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("special", [True, False])
def test_ids_and_text_equal_transformers(model_dir: Path, tokenizer: Tokenizer, text: str, special: bool) -> None:
    theirs = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer.encode(text, add_special_tokens=special)
    assert ids == theirs.encode(text, add_special_tokens=special)
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_special_ids_and_sizes(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_ids == {1}
    assert tokenizer.special_ids == {0, 1, 2, 3}
    assert tokenizer.vocab_size > 260
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("variables", [{}, {"thinking": True}])
def test_chat_template_equals_transformers(
    model_dir: Path, tokenizer: Tokenizer, add_generation_prompt: bool, variables: dict[str, Any]
) -> None:
    theirs = AutoTokenizer.from_pretrained(model_dir).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
    )
    ours = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=add_generation_prompt, **variables)
    assert ours == theirs
    assert ours.startswith(BOS)


def test_template_file_wins_and_named_templates_are_read(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "named {{ messages | length }}"}]
    write_files(tmp_path, {"chat_template": named})
    assert Tokenizer.from_dir(tmp_path).apply_chat_template(MESSAGES) == "named 5"
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert Tokenizer.from_dir(tmp_path).apply_chat_template(MESSAGES) == "file"


def test_plain_template_when_the_model_has_none(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write_files(tmp_path))
    assert not tokenizer.has_chat_template
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == f"{BOS}user: hi\n\nassistant:"
    assert "{{ bos_token }}" in PLAIN_TEMPLATE


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    template = "{{ messages.append({}) }}{{ ''.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = Tokenizer.from_dir(write_files(tmp_path, {"chat_template": template}))
    with pytest.raises(RequestError, match="cannot render"):
        tokenizer.apply_chat_template(MESSAGES)


def test_refused_messages(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="unknown role robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "x"}])
    with pytest.raises(RequestError, match="cannot render"):
        tokenizer.apply_chat_template([{"role": "system", "content": 3}])
    with pytest.raises(RequestError, match="at least one message"):
        tokenizer.apply_chat_template([])


@pytest.mark.parametrize(
    ("file", "value", "expected"),
    [
        ("generation_config.json", {"eos_token_id": [1, 7]}, {1, 7}),
        ("generation_config.json", {"eos_token_id": 9}, {1, 9}),
        ("config.json", {"eos_token_id": 5}, {1, 5}),
        ("config.json", {}, {1}),
    ],
)
def test_eos_ids(tmp_path: Path, file: str, value: dict[str, Any], expected: set[int]) -> None:
    write_files(tmp_path)
    (tmp_path / file).write_text(json.dumps(value))
    assert Tokenizer.from_dir(tmp_path).eos_token_ids == expected


def test_generation_config_goes_before_config(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 6}')
    assert Tokenizer.from_dir(tmp_path).eos_token_ids == {1, 6}


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json; copy"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer file"):
        Tokenizer.from_dir(tmp_path)
    write_files(tmp_path, {"chat_template": "{% if %}"})
    with pytest.raises(CheckpointError, match="does not compile"):
        Tokenizer.from_dir(tmp_path)
    write_files(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(CheckpointError, match="eos_token_id is 'x'"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds list, not an object"):
        Tokenizer.from_dir(tmp_path)


def test_lone_surrogate_is_a_request_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"U\+D83D at character 3"):
        tokenizer.encode("abc\ud83d")


def test_a_stored_length_limit_never_cuts_a_prompt(tmp_path: Path) -> None:
    write_files(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_dir(tmp_path).encode("a b c d e f")) > 2


def test_token_text_and_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(1) == EOS
    assert tokenizer.token_bytes(1) == EOS.encode()
    (first, *_) = tokenizer.encode("\x00", add_special_tokens=False)
    assert tokenizer.token_bytes(first) == b"\x00"
    assert tokenizer.token_bytes(10**6) == tokenizer.token_bytes(-1) == b""
    assert sum(tokenizer.token_bytes(i) == bytes([b]) for i in range(tokenizer.vocab_size) for b in range(256)) == 256


def test_import_is_light() -> None:
    code = "import sys, deepseek_ray.engine.tokenizer; print({'torch', 'transformers', 'ray'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# --- incremental detokenisation -------------------------------------------------------------------------------------

fast = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def stream(detokenizer: Detokenizer, ids: list[int], chunk: int) -> list[str]:
    return [detokenizer.push(ids[i : i + chunk]) for i in range(0, len(ids), chunk)] + [detokenizer.flush()]


@fast
@given(text=st.text(max_size=60), chunk=st.integers(1, 5))
def test_streamed_text_is_the_text(tokenizer: Tokenizer, text: str, chunk: int) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = stream(Detokenizer(tokenizer, skip_special_tokens=False), ids, chunk)
    assert "".join(parts) == text == tokenizer.decode(ids, skip_special_tokens=False)
    if "\ufffd" not in text:
        assert all("\ufffd" not in part for part in parts)


@fast
@given(ids=st.lists(st.integers(0, 400), max_size=60), chunk=st.integers(1, 5), skip=st.booleans())
def test_streamed_random_ids_equal_decode(tokenizer: Tokenizer, ids: list[int], chunk: int, skip: bool) -> None:
    parts = stream(Detokenizer(tokenizer, skip_special_tokens=skip), ids, chunk)
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_half_a_character_is_held_back(tokenizer: Tokenizer) -> None:
    ids = [next(i for i in range(400) if tokenizer.token_bytes(i) == bytes([b])) for b in "漢".encode()]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in ids] == ["", "", "漢"]
    assert detokenizer.push(ids[:2]) == ""
    assert detokenizer.flush() == "\ufffd"


def sentencepiece_like() -> Tokenizer:
    """The decoder of Llama-style tokenizers: word marks, byte fallback, a leading space that is stripped."""
    words = ["<unk>", "▁hello", "▁world", "!", "▁", "a", "ß"] + [f"<0x{b:02X}>" for b in range(256)]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend, {"bos_token": "<s>"}, (), None, "sentencepiece-like")


def test_tokenizers_that_are_not_byte_level_stream_too() -> None:
    tokenizer = sentencepiece_like()
    fire = [7 + byte for byte in "🔥".encode()]
    ids = [0, 1, 2, 3, 4, 5, *fire, 263, 2, *fire[:2]] * 8
    parts = stream(Detokenizer(tokenizer), ids, 1)
    assert "".join(parts) == tokenizer.decode(ids)
    assert sum("🔥" in part for part in parts) == 8


def test_the_prompt_decides_about_a_leading_space() -> None:
    tokenizer = sentencepiece_like()
    assert "".join(stream(Detokenizer(tokenizer), [2, 3], 1)) == "world!"
    assert "".join(stream(Detokenizer(tokenizer, prompt_ids_tail=[1]), [2, 3], 1)) == " world!"
