"""`LLM(backend="actors")` as a user calls it: greedy tokens of transformers, in a batch and alone."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from deepseek_ray import LLM
from tests.test_llm import GREEDY, transformers_tokens

pytestmark = pytest.mark.cluster


def test_greedy_tokens_through_actors_are_those_of_transformers(ray_cluster: None, trained_model: Path) -> None:
    source = Path(argparse.__file__).read_text()[2000:]
    texts = [source[300 * n : 300 * n + 5 + 30 * n] for n in range(8)]
    with LLM(trained_model, dtype="float32", backend="actors", expert_shards=3) as llm:
        results = llm.generate(texts, GREEDY)
        alone = [llm.generate(text, GREEDY)[0].outputs[0].token_ids for text in texts]
    together = [result.outputs[0].token_ids for result in results]
    expected = transformers_tokens(trained_model, [result.prompt_token_ids for result in results])
    assert together == expected
    assert alone == expected
    assert all(len(tokens) == 64 for tokens in together)


def test_int8_through_actors_is_int8_in_one_process(ray_cluster: None, trained_model: Path) -> None:
    texts = [Path(argparse.__file__).read_text()[300 * n : 300 * n + 50] for n in range(4)]
    tokens = {}
    for backend in ("local", "actors"):
        with LLM(trained_model, backend=backend, quantization="int8") as llm:
            tokens[backend] = [result.outputs[0].token_ids for result in llm.generate(texts, GREEDY)]
    assert tokens["actors"] == tokens["local"]
