"""Generation with attention, experts or both on a CUDA device, against the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_ray.llm import LLM
from deepseek_ray.messages import SamplingParams

pytestmark = pytest.mark.gpu

PROMPTS = ["import os\n", "def __init__(self, ", "for line in", "class Error(Exception):"]
PARAMS = SamplingParams(temperature=0, max_tokens=24, logprobs=0, ignore_eos=True)


def generate(model: Path, **options: Any) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities."""
    with LLM(model, dtype="float32", deterministic=False, **options) as llm:
        outputs = [output.outputs[0] for output in llm.generate(PROMPTS, PARAMS)]
    found = []
    for output in outputs:
        entries = zip(output.token_ids, output.logprobs or [], strict=True)
        found.append((output.token_ids, [entry[token].logprob for token, entry in entries]))
    return found


@pytest.mark.parametrize("attention", ["cpu", "cuda"])
@pytest.mark.parametrize("experts", ["cpu", "cuda"])
def test_each_half_on_either_device(trained_model: Path, attention: str, experts: str) -> None:
    expected = generate(trained_model)
    found = generate(trained_model, attention_device=attention, expert_device=experts)
    for (tokens, logprobs), (wanted, wanted_logprobs) in zip(found, expected, strict=True):
        assert tokens == wanted, "greedy choices of a trained model are no near-ties"
        assert logprobs == pytest.approx(wanted_logprobs, abs=1e-3)


@pytest.mark.cluster
def test_attention_on_the_gpu_and_experts_on_cpus_in_processes_of_their_own(trained_model: Path) -> None:
    expected = generate(trained_model)
    found = generate(trained_model, backend="actors", attention_device="cuda")
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]


@pytest.mark.cluster
@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="an attention worker and two shards have a CUDA device each")
def test_activations_that_go_from_gpu_to_gpu(trained_model: Path) -> None:
    expected = generate(trained_model)
    found = generate(trained_model, backend="actors", attention_device="cuda", expert_device="cuda")
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
