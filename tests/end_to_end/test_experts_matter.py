"""A control of the exactness tests: on the trained model they would see a single wrong expert."""

from __future__ import annotations

from pathlib import Path

import torch

from deepseek_ray.config.engine import EngineConfig
from deepseek_ray.engine.engine import Engine
from deepseek_ray.engine.offline import run_engine, tokenizer_beside
from deepseek_ray.messages import GenerateRequest, SamplingParams
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore, LocalExperts
from deepseek_ray.models.paged_decoder import PagedDecoder
from tests.end_to_end.test_failover import NUM_TOKENS, PROMPTS


def test_zeroing_any_one_routed_expert_changes_the_output(trained_model: Path) -> None:
    reader = CheckpointReader(trained_model)
    held = {layer: range(reader.config.n_routed_experts) for layer in reader.config.moe_layers}
    store = ExpertStore(reader, held, torch.float32)
    decoder = PagedDecoder(reader, torch.float32, LocalExperts(store))
    whole = greedy(decoder, trained_model)
    assert len({token for tokens in whole.values() for token in tokens}) > 20, "the model has collapsed"
    unnoticed = []
    for layer in reader.config.moe_layers:
        for expert in held[layer]:
            weights = store.weights_of(layer, expert)
            saved = weights.clone()
            weights.zero_()
            if greedy(decoder, trained_model) == whole:
                unnoticed.append((layer, expert))
            weights.copy_(saved)
    assert not unnoticed
    assert greedy(decoder, trained_model) == whole


def greedy(decoder: PagedDecoder, model: Path) -> dict[str, list[int]]:
    tokenizer = tokenizer_beside(str(model))
    assert tokenizer is not None
    engine = Engine(decoder, tokenizer, EngineConfig())
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    requests = [
        GenerateRequest(request_id=text, prompt_token_ids=tokenizer.encode(text), params=params) for text in PROMPTS
    ]
    tokens: dict[str, list[int]] = {text: [] for text in PROMPTS}
    for event in run_engine(engine, requests):
        tokens[event.request_id] += event.token_ids
    return tokens
