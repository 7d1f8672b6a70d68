"""`LLM` over real checkpoints: the same tokens as transformers, in a batch and alone; errors before any work."""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import tiny_config, write_random_checkpoint
from fakes import BYTE_EOS, write_byte_tokenizer

from deepseek_ray import LLM, SamplingParams
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import CheckpointError, ConfigError, RequestError, UnavailableError

NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
# Byte values, so that one model serves prompts of ids and of text; longer than the block size and some than one chunk.
PROMPTS = [[(37 * n + 11 * place + place * place) % 256 for place in range(1 + 9 * n)] for n in range(8)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llm") / "model"
    write_random_checkpoint(directory, tiny_config(vocab_size=264, eos_token_id=BYTE_EOS))
    write_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> Iterator[LLM]:
    with LLM(model_dir, dtype="float32") as llm:
        yield llm


def token_ids(llm: LLM, prompts: list, params: SamplingParams | list[SamplingParams] = GREEDY) -> list[list[int]]:
    return [result.outputs[0].token_ids for result in llm.generate(prompts, params, use_tqdm=False)]


def transformers_tokens(directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    outputs = []
    for prompt in prompts:
        inputs = torch.tensor([prompt])
        result = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        outputs.append(result[0, len(prompt) :].tolist())
    return outputs


def test_greedy_tokens_are_those_of_transformers(llm: LLM, model_dir: Path) -> None:
    expected = transformers_tokens(model_dir, PROMPTS)
    assert all(len(set(output)) > 15 for output in expected), "a model that repeats itself shows nothing"
    assert token_ids(llm, PROMPTS) == expected


def test_greedy_text_of_a_trained_model_is_that_of_transformers(trained_model: Path) -> None:
    source = Path(argparse.__file__).read_text()[2000:]
    texts = [source[300 * n : 300 * n + 5 + 30 * n] for n in range(8)]
    with LLM(trained_model, dtype="float32") as llm:
        results = llm.generate(texts, GREEDY)
        alone = [llm.generate(text, GREEDY)[0].outputs[0].token_ids for text in texts]
    outputs = [result.outputs[0].token_ids for result in results]
    assert outputs == alone == transformers_tokens(trained_model, [result.prompt_token_ids for result in results])
    assert len({tuple(output) for output in outputs}) == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_together_equals_alone(model_dir: Path, dtype: str) -> None:
    sampled = SamplingParams(temperature=1.0, top_p=0.9, seed=3, max_tokens=NUM_TOKENS, ignore_eos=True)
    params = [GREEDY if n % 2 else sampled for n in range(len(PROMPTS))]
    with LLM(model_dir, dtype=dtype) as llm:
        together = token_ids(llm, PROMPTS, params)
        alone = [token_ids(llm, [prompt], entry)[0] for prompt, entry in zip(PROMPTS, params, strict=True)]
    assert together == alone
    # Room for 200 tokens: sequences are preempted and computed again.
    config = tiny_config()
    per_token = config.num_hidden_layers * config.latent_width * getattr(torch, dtype).itemsize
    with LLM(model_dir, dtype=dtype, max_model_len=160, kv_cache_bytes=208 * per_token) as llm:
        assert token_ids(llm, PROMPTS, params) == alone


def test_text_in_text_out(llm: LLM, model_dir: Path) -> None:
    (result,) = llm.generate("Hello é", SamplingParams(temperature=0, max_tokens=30))
    assert (result.prompt, result.prompt_token_ids) == ("Hello é", list("Hello é".encode()))
    output = result.outputs[0]
    assert (result.finished, output.index, output.logprobs, output.stop_reason) == (True, 0, None, None)
    assert output.text == Tokenizer.from_dir(model_dir).decode(output.token_ids)
    assert output.finish_reason == ("stop" if output.token_ids[-1] == BYTE_EOS else "length")
    by_ids = llm.generate(result.prompt_token_ids, SamplingParams(temperature=0, max_tokens=30))
    assert len(by_ids) == 1
    assert (by_ids[0].prompt, by_ids[0].outputs[0].text) == (None, output.text)


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n) for n in (9, 1, 5)]
    results = llm.generate(["a", [98], "c"], params)
    assert [result.prompt_token_ids for result in results] == [[97], [98], [99]]
    assert [len(result.outputs[0].token_ids) for result in results] == [9, 1, 5]
    assert llm.generate([]) == []


def test_several_outputs_per_prompt(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=7, max_tokens=12, ignore_eos=True)
    results = llm.generate(["a", "b"], params)
    outputs = [[output.token_ids for output in result.outputs] for result in results]
    assert [[output.index for output in result.outputs] for result in results] == [[0, 1, 2]] * 2
    assert len({tuple(output) for both in outputs for output in both}) == 6
    one = SamplingParams(seed=8, max_tokens=12, ignore_eos=True)
    assert token_ids(llm, ["a"], one)[0] == outputs[0][1]


def test_more_prompts_than_an_engine_holds(model_dir: Path) -> None:
    with LLM(model_dir, dtype="float32", max_model_len=32) as llm:
        prompts = [[n % 256] for n in range(400)]
        assert len(token_ids(llm, prompts, SamplingParams(temperature=0, max_tokens=2))) == 400


def test_the_seed_decides_what_requests_without_one_sample(model_dir: Path, llm: LLM) -> None:
    free = SamplingParams(max_tokens=20, ignore_eos=True)
    runs = {}
    for seed in (0, 0, 1):
        with LLM(model_dir, dtype="float32", seed=seed) as fresh:
            tokens = token_ids(fresh, ["x", "x"], free)
        assert tokens[0] != tokens[1]
        assert runs.setdefault(seed, tokens) == tokens
    assert runs[0] != runs[1]


def test_logprobs(llm: LLM, model_dir: Path) -> None:
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=8, logprobs=3, ignore_eos=True)
    output = llm.generate("a", params)[0].outputs[0]
    assert output.logprobs is not None
    assert len(output.logprobs) == 8
    for token_id, entries in zip(output.token_ids, output.logprobs, strict=True):
        assert len(entries) in (3, 4)
        assert sorted(entry.rank for entry in entries.values())[:3] == [1, 2, 3]
        ordered = sorted(entries.values(), key=lambda entry: entry.rank)
        assert all(a.logprob >= b.logprob for a, b in itertools.pairwise(ordered))
        assert token_id in entries
    tokenizer = Tokenizer.from_dir(model_dir)
    first = output.logprobs[0]
    assert all(entry.decoded_token == tokenizer.token_text(token_id) for token_id, entry in first.items())
    assert np.exp([entry.logprob for entry in first.values()]).sum() < 1


def test_stop_strings(llm: LLM) -> None:
    plain = llm.generate("go", GREEDY)[0].outputs[0]
    stop = next(plain.text[n : n + 2] for n in range(3, 60) if plain.text[n : n + 2].isascii())
    stopped = llm.generate("go", SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, stop=[stop]))
    output = stopped[0].outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.text == plain.text[: plain.text.index(stop)]


def test_a_model_without_tokenizer_takes_and_gives_ids(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "model", tiny_config())
    with LLM(tmp_path / "model", dtype="float32") as llm:
        output = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4))[0].outputs[0]
        assert (len(output.token_ids), output.text) == (4, "")
        with pytest.raises(RequestError, match=r"text prompts need a tokenizer .*tokenizer\.json"):
            llm.generate("text")
        with pytest.raises(RequestError, match="stop strings need a tokenizer"):
            llm.generate([1], SamplingParams(stop="x"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "float16"}, ("float16", "float32", "bfloat16")),
        ({"backend": "gpu"}, ("'gpu'", "local")),
        ({"threads": 0}, ("threads", "0")),
        ({"expert_shards": 0}, ("expert_shards",)),
        ({"max_model_len": 257}, ("257", "256", "max_position_embeddings")),
        ({"kv_cache_bytes": 10}, ("kv_cache_bytes is 10", "raise")),
        ({"max_model_len": "long"}, ("max_model_len", "long")),
    ],
)
def test_bad_arguments(model_dir: Path, arguments: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(model_dir, **arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_directories_that_hold_no_model(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.*is not a directory"):
        LLM(tmp_path / "nowhere")
    (tmp_path / "no_weights").mkdir()
    (tmp_path / "no_weights" / "config.json").write_text((model_dir / "config.json").read_text())
    with pytest.raises(CheckpointError, match="safetensors"):
        LLM(tmp_path / "no_weights")


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        (7, None, "prompts is of type int"),
        (["a", 7], None, "prompt 1 is of type int"),
        ([[1.5]], None, "prompt 0 is of type list"),
        (["a", []], None, "prompt 1: the prompt is empty"),
        (["a", "b" * 256], None, "prompt 1: the prompt has 256 tokens; the context holds 256 .*shorten"),
        ([[264]], None, "token id 264; the vocabulary has ids 0 to 263"),
        (["a"], [SamplingParams()] * 2, "2 sampling_params for 1 prompts"),
        (["a"], {"temperature": 1}, "must be a SamplingParams"),
        (["a"], SamplingParams(temperature="hot"), r"Expected `float`, got `str` - at `\$\.temperature`"),
        (["a"], SamplingParams(max_tokens=0), "max_tokens is 0"),
        (["a"], SamplingParams(n=17), "n is 17"),
        (["\ud800"], None, "surrogate"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(llm: LLM, prompts: object, params: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        llm.generate(prompts, params)  # type: ignore[arg-type]
    assert len(token_ids(llm, ["still works"], SamplingParams(max_tokens=1))) == 1


def test_progress_is_shown_on_a_terminal_only(llm: LLM, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    llm.generate("a", SamplingParams(max_tokens=2))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    llm.generate("a", SamplingParams(max_tokens=2, ignore_eos=True))
    assert "2 tokens" in capsys.readouterr().err
    llm.generate("a", SamplingParams(max_tokens=2), use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_large_models_are_mapped_from_packed_files(
    model_dir: Path, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_RAY_CACHE", str(tmp_path))
    expected = token_ids(llm, PROMPTS)
    for worth, written in ((1e18, False), (0, True), (0, True)):
        monkeypatch.setattr("deepseek_ray.engine.offline._WORTH_FILES", worth)
        with LLM(model_dir, dtype="float32") as other:
            assert token_ids(other, PROMPTS) == expected
        assert any(tmp_path.rglob("1-0")) == written


def test_threads_sets_how_many_are_used(model_dir: Path) -> None:
    before = torch.get_num_threads()
    try:
        LLM(model_dir, dtype="float32", threads=before + 1).shutdown()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_after_shutdown(model_dir: Path) -> None:
    llm = LLM(model_dir, dtype="float32")
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(UnavailableError, match="shut down"):
        llm.generate("a")


def test_arguments_are_checked_before_torch_is_loaded() -> None:
    code = (
        "import sys\n"
        "from deepseek_ray import LLM\n"
        "from deepseek_ray.errors import CheckpointError\n"
        "try:\n    LLM('/does/not/exist')\n"
        "except CheckpointError:\n    print('torch' in sys.modules, 'ray' in sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False", "False"]
