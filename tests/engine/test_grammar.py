"""Structured outputs in an engine: every output has its shape, whatever the model would rather say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from fakes import BYTE_EOS, Collected, FakeDecoder, FakeShape, byte_tokenizer, run_to_end

from deepseek_ray.config.engine import EngineConfig
from deepseek_ray.engine.engine import Engine
from deepseek_ray.engine.grammar import Grammars
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import RequestError
from deepseek_ray.messages import GenerateRequest, SamplingParams, StructuredOutputsParams

CAT = {"const": {"kind": "cat", "näme": "Möhre ✓"}}
SCHEMAS: dict[str, Any] = {
    "enums": {
        "type": "object",
        "properties": {"color": {"enum": ["red", "grün", 7, None]}, "fixed": {"const": "ok"}},
        "required": ["color", "fixed"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "a": {
                "type": "object",
                "properties": {
                    "b": {
                        "type": "object",
                        "properties": {"c": {"type": "boolean"}},
                        "required": ["c"],
                        "additionalProperties": False,
                    }
                },
                "required": ["b"],
                "additionalProperties": False,
            }
        },
        "required": ["a"],
        "additionalProperties": False,
    },
    "array": {
        "type": "array",
        "items": {"type": "integer", "minimum": -3, "maximum": 12},
        "minItems": 2,
        "maxItems": 4,
    },
    "numbers": {
        "type": "object",
        "properties": {
            "x": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            "n": {"type": "integer", "minimum": 5, "maximum": 5},
        },
        "required": ["x", "n"],
        "additionalProperties": False,
    },
    "ref": {
        "$defs": {"leaf": {"type": "string", "pattern": "^[a-c]{2,4}$"}, "cat": CAT},
        "type": "object",
        "properties": {"l": {"$ref": "#/$defs/leaf"}, "c": {"$ref": "#/$defs/cat"}},
        "required": ["l", "c"],
        "additionalProperties": False,
    },
    "text": {"type": "string", "minLength": 3, "maxLength": 12},
    "either": {
        "anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 2}]
    },
}


def request(request_id: str, structure: StructuredOutputsParams | None, **params: Any) -> GenerateRequest:
    settings = {"max_tokens": 200, "temperature": 0.9, "seed": 3, **params}
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=[*b"say"],
        params=SamplingParams(structured_outputs=structure, **settings),
    )


def new_engine(tokenizer: Tokenizer | None = None, **config: Any) -> Engine:
    settings = {"max_num_seqs": 8, "kv_cache_bytes": 2**20, **config}
    return Engine(FakeDecoder(FakeShape()), tokenizer or byte_tokenizer(), EngineConfig(**settings))


def run(*requests: GenerateRequest, **config: Any) -> dict[str, Collected]:
    return run_to_end(new_engine(**config), requests)


def one(structure: StructuredOutputsParams | None, **params: Any) -> Collected:
    return run(request("r", structure, **params))["r"]


def shape(**fields: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**fields)


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_outputs_satisfy_their_schema(name: str, temperature: float) -> None:
    structure = shape(json=SCHEMAS[name], disable_any_whitespace=True)
    seeds = range(4) if temperature else range(1)
    jobs = [request(str(seed), structure, temperature=temperature, seed=seed, max_tokens=120) for seed in seeds]
    finished = [output for output in run(*jobs).values() if output.finish_reason == "stop"]
    assert finished or name == "numbers", "greedily, this model fills a fraction with digits for ever"
    for output in finished:
        jsonschema.validate(json.loads(output.text), SCHEMAS[name])
    assert temperature == 0 or len(finished) == len(jobs) or name == "numbers"


@pytest.mark.parametrize(
    ("pattern", "seeds"),
    [(r"[a-f]{3}-\d{2,4}", 4), ("(ja|nein|vielleicht)", 4), ("ä+€{2}🙂", 4), (r"\p{Greek}{2,3}|x", 4), ("", 1)],
)
def test_outputs_match_their_regex(pattern: str, seeds: int) -> None:
    outputs = run(*[request(str(seed), shape(regex=pattern), seed=seed) for seed in range(seeds)])
    for output in outputs.values():
        assert output.finish_reason == "stop"
        expression = pattern.replace(r"\p{Greek}", "[Ͱ-Ͽἀ-῿ᴀ-ᶿℂ-ℿꭥ𐅀-𐆠𝈀-𝉅]")
        assert re.fullmatch(expression, output.text), output.text


def test_choices_and_grammars() -> None:
    choices = ['say "hi"\n', "ß", "both", "both of them"]
    outputs = run(*[request(str(seed), shape(choice=choices), seed=seed, temperature=20.0) for seed in range(8)])
    assert {output.text for output in outputs.values()} <= set(choices)
    assert len({output.text for output in outputs.values()}) > 1
    sums = shape(grammar='start: n ("+" n){1,3}\nn: /[0-9]{1,2}/')
    outputs = run(*[request(str(seed), sums, seed=seed) for seed in range(4)])
    assert all(re.fullmatch(r"\d{1,2}(\+\d{1,2}){1,3}", output.text) for output in outputs.values())


def test_any_json_object() -> None:
    outputs = run(*[request(str(seed), shape(json_object=True), seed=seed) for seed in range(6)])
    finished = [output for output in outputs.values() if output.finish_reason == "stop"]
    assert finished
    assert all(isinstance(json.loads(output.text), dict) for output in finished)
    assert all(output.text.startswith("{") for output in outputs.values())


def test_whitespace_is_bounded() -> None:
    padding = {ord(character): 100.0 for character in " \n\t"}
    output = one(shape(json={"type": "array", "items": {"const": 1}, "minItems": 1}), logit_bias=padding)
    assert output.finish_reason == "stop"
    assert re.search(r"\n[ \t]{32}", output.text)
    assert not re.search(r"\n[ \t]{33}|\n\n", output.text)


def test_max_tokens_cuts() -> None:
    output = one(shape(json=SCHEMAS["ref"]), max_tokens=5)
    assert (output.finish_reason, len(output.token_ids)) == ("length", 5)
    exact = one(shape(regex="abcd"), max_tokens=4)
    assert (exact.text, exact.finish_reason) == ("abcd", "stop")


def test_min_tokens_holds_the_end_back_while_something_else_can_follow() -> None:
    biased = {BYTE_EOS: 100.0}
    assert one(shape(regex="a*"), logit_bias=biased).token_ids == [BYTE_EOS]
    longer = one(shape(regex="a*"), logit_bias=biased, min_tokens=7)
    assert longer.text == "a" * 7
    assert longer.token_ids == [*b"a" * 7, BYTE_EOS]
    # Two letters are all there can be: an output that is complete ends, though it is shorter than was asked for.
    full = one(shape(regex="a{0,2}"), logit_bias=biased, min_tokens=7)
    assert (full.text, full.finish_reason, len(full.token_ids)) == ("aa", "stop", 2)


def test_ignore_eos_goes_on_as_long_as_the_shape_does() -> None:
    output = one(shape(regex="a{1,5}"), logit_bias={BYTE_EOS: 100.0}, ignore_eos=True)
    assert (output.text, output.finish_reason) == ("aaaaa", "stop")
    assert BYTE_EOS not in output.token_ids
    nothing = one(shape(regex=""), ignore_eos=True)  # nothing else can come
    assert (nothing.text, nothing.finish_reason, nothing.token_ids) == ("", "stop", [BYTE_EOS])


def test_stop_tokens_end_what_is_complete_and_nothing_else() -> None:
    stop = {"stop_token_ids": [ord("!")], "logit_bias": {ord("!"): 100.0}}
    output = one(shape(regex="(ab)+"), **stop)
    assert (output.text, output.stop_reason, output.token_ids) == ("ab", ord("!"), [*b"ab!"])
    held = one(shape(regex="(ab)+"), min_tokens=4, **stop)
    assert held.text == "abab"


def test_stop_strings_cut_as_ever() -> None:
    output = one(shape(regex="abcabc"), stop=["ca"])
    assert (output.text, output.finish_reason, output.stop_reason) == ("ab", "stop", "ca")


def test_no_bias_or_penalty_lifts_the_mask() -> None:
    params = {
        "logit_bias": {ord("z"): 100.0, ord("a"): -100.0},
        "repetition_penalty": 1.7,
        "presence_penalty": 2.0,
        "frequency_penalty": -2.0,
        "min_p": 0.2,
        "top_k": 3,
        "top_p": 0.5,
    }
    output = one(shape(regex="[ab]{20}"), **params)
    assert re.fullmatch("[ab]{20}", output.text)


def test_special_tokens_are_no_text() -> None:
    marks = [token_id for token_id in range(256, 261) if token_id != BYTE_EOS]
    output = one(shape(regex="(?s:.{4})"), logit_bias=dict.fromkeys(marks, 100.0))
    assert not set(marks) & set(output.token_ids)


def test_the_batch_changes_nothing() -> None:
    jobs = [request(name, shape(json=schema), seed=9) for name, schema in SCHEMAS.items()]
    free = request("free", None)
    together = run(*jobs, free)
    for job in (*jobs, free):
        assert run(job)[job.request_id].token_ids == together[job.request_id].token_ids


def test_preemption_changes_nothing() -> None:
    jobs = [
        request(name, shape(json=schema, disable_any_whitespace=True), seed=9, max_tokens=60)
        for name, schema in SCHEMAS.items()
    ]
    roomy = run(*jobs)
    engine = new_engine(block_size=4, kv_cache_bytes=16 * 2 * 4 * 6 * 4)  # 2 layers of 4 tokens of 6 floats a block
    assert engine.stats().num_kv_blocks_total == 16
    tight = run_to_end(engine, jobs)
    assert engine.stats().num_preemptions > 0
    assert {name: o.token_ids for name, o in tight.items()} == {name: o.token_ids for name, o in roomy.items()}


@pytest.mark.parametrize(
    "structure", [shape(json=SCHEMAS["enums"]), shape(regex="(ä|bc)+🙂"), shape(choice=["both", "bo"])]
)
def test_a_sequence_goes_on_anywhere(structure: StructuredOutputsParams) -> None:
    whole = one(structure)
    assert whole.finish_reason == "stop"
    for cut in range(0, len(whole.token_ids), 3):
        resumed = GenerateRequest(
            request_id="r",
            prompt_token_ids=[*b"say"],
            output_token_ids=whole.token_ids[:cut],
            params=request("r", structure).params,
        )
        rest = run(resumed)["r"]
        assert whole.token_ids[:cut] + rest.token_ids == whole.token_ids
        assert rest.finish_reason == "stop"


def test_tokens_that_break_the_shape_are_refused() -> None:
    resumed = GenerateRequest(
        request_id="r",
        prompt_token_ids=[1],
        output_token_ids=[*b"ax"],
        params=SamplingParams(structured_outputs=shape(regex="ab+")),
    )
    with pytest.raises(RequestError, match="token 120 is not allowed there"):
        new_engine().add_request(resumed)


@pytest.mark.parametrize(
    ("structure", "field", "words"),
    [
        (shape(), "structured_outputs", "exactly one of json, regex, choice, grammar, json_object; it has none"),
        (shape(regex="a", json_object=True), "structured_outputs", "it has regex, json_object"),
        (shape(json="{"), "structured_outputs.json", "cannot be read"),
        (shape(json={"type": "strnig"}), "structured_outputs.json", "Invalid type: strnig"),
        (shape(json={"not": {}}), "structured_outputs.json", "Unimplemented keys"),
        (shape(json={"$ref": "#"}), "structured_outputs.json", "no text satisfies it"),
        (shape(json={"$ref": "http://example.com/x"}), "structured_outputs.json", "not present in a registry"),
        (shape(regex="(a"), "structured_outputs.regex", "unclosed group"),
        (shape(regex=r"(a)\1"), "structured_outputs.regex", "backreferences are not supported"),
        (shape(regex="a" * 8193), "structured_outputs.regex", "has 8193 characters; at most 8192"),
        (shape(grammar="begin: /a/"), "structured_outputs.grammar", "start"),
        (shape(choice=[]), "structured_outputs.choice", "list 1 to 1024"),
        (shape(choice=["a", ""]), "structured_outputs.choice", "a choice is empty"),
        (shape(json="[" * 5000), "structured_outputs.json", "recursion limit"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_what_cannot_be_used_is_refused_by_name(structure: StructuredOutputsParams, field: str, words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)) as caught:
        new_engine().add_request(request("r", structure))
    assert caught.value.param == field


def test_a_schema_that_is_no_json_value() -> None:
    with pytest.raises(RequestError, match="cannot be written as JSON"):
        shape(json={"enum": [object()]})


def test_it_needs_a_tokenizer_with_an_end() -> None:
    engine = Engine(FakeDecoder(FakeShape()), None, EngineConfig(kv_cache_bytes=2**20))
    with pytest.raises(RequestError, match="need a tokenizer"):
        engine.add_request(request("r", shape(regex="a")))
    endless = Grammars(byte_tokenizer(), 261, [])
    with pytest.raises(RequestError, match="need an end-of-sequence token"):
        endless.start(shape(regex="a"))


def test_llguidance_and_the_detokenizer_agree_on_every_token(trained_model: Path) -> None:
    tokenizer = Tokenizer.from_dir(trained_model)
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 7, tokenizer.eos_token_ids)  # logits are often padded
    vocabulary = grammars.load()
    for token_id in range(tokenizer.vocab_size):
        # Byte 0xFF is in no UTF-8 text; llguidance writes special tokens with it.
        if token_id not in tokenizer.special_ids and b"\xff" not in tokenizer.token_bytes(token_id):
            assert vocabulary.decode_bytes([token_id]) == tokenizer.token_bytes(token_id)
    allowed = grammars.start(shape(regex="(?s:.*)")).allowed(tokenizer.eos_token_ids, frozenset())
    assert not allowed[tokenizer.vocab_size :].any()
    assert np.count_nonzero(allowed) > tokenizer.vocab_size // 2
