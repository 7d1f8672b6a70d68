"""`LLM(backend="actors")` as a user calls it: greedy tokens of transformers, in a batch and alone."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from deepseek_ray import LLM, SamplingParams
from deepseek_ray.actors.deployment import deployment_experts
from deepseek_ray.actors.offline import ActorsBackend
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.live_requests import wait_for
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


@pytest.mark.parametrize("method", ["mtp", "ngram"])
def test_drafting_through_actors_changes_nothing(ray_cluster: None, tmp_path: Path, method: str) -> None:
    """The prompts repeat themselves, and so does, now and then, what random weights say."""
    model = write_random_checkpoint(tmp_path / "model", tiny_config(num_nextn_predict_layers=1))
    prompts = [[(37 * n + 11 * (place % 7)) % 50 for place in range(3 + 9 * n)] for n in range(6)]
    params = [SamplingParams(temperature=0.5 * (n % 2), seed=n, max_tokens=60, ignore_eos=True) for n in range(6)]
    with LLM(model, dtype="float32") as llm:
        expected = [result.outputs[0].token_ids for result in llm.generate(prompts, params)]
    with LLM(model, dtype="float32", backend="actors", speculative=method) as llm:
        assert [result.outputs[0].token_ids for result in llm.generate(prompts, params)] == expected
        assert isinstance(llm._backend, ActorsBackend)
        deployment = llm._backend.deployment
        wait_for(lambda: deployment.stats()["attention_worker/0"]["num_draft_tokens"] > 0, 10)
        layers = deployment_experts(deployment.name)["layers"]
    assert (3 in layers) == (method == "mtp"), "the layer after the model's three has experts on the shards, too"
