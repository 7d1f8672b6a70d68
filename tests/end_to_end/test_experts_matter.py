"""A control of the exactness tests: on the trained model they would see a single wrong expert."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from deepseek_ray.config.engine import EngineConfig
from deepseek_ray.engine.engine import Engine
from deepseek_ray.engine.offline import run_engine, tokenizer_beside
from deepseek_ray.messages import GenerateRequest, TokenEvent
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore, LocalExperts
from deepseek_ray.models.paged_decoder import PagedDecoder
from tests.live_requests import WORK


def test_zeroing_any_one_routed_expert_changes_the_output(trained_model: Path) -> None:
    reader = CheckpointReader(trained_model)
    held = {layer: range(reader.config.n_routed_experts) for layer in reader.config.moe_layers}
    store = ExpertStore(reader, held, torch.float32)
    decoder = PagedDecoder(reader, torch.float32, LocalExperts(store))
    whole = tokens_of(decoder, trained_model)
    assert len({token for tokens in whole.values() for token in tokens}) > 20, "the model has collapsed"
    unnoticed = []
    for layer in reader.config.moe_layers:
        for expert in held[layer]:
            weights = store.weights_of(layer, expert)
            saved = weights.clone()
            weights.zero_()
            if not differs(decoder, trained_model, whole):
                unnoticed.append((layer, expert))
            weights.copy_(saved)
    assert not unnoticed
    assert not differs(decoder, trained_model, whole)


def tokens_of(decoder: PagedDecoder, model: Path) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = defaultdict(list)
    for event in events(decoder, model):
        tokens[event.request_id] += event.token_ids
    return tokens


def differs(decoder: PagedDecoder, model: Path, whole: dict[str, list[int]]) -> bool:
    """Whether any token is another one; what comes after the first such token is not generated."""
    return any(
        event.token_ids != whole[event.request_id][event.index : event.index + len(event.token_ids)]
        for event in events(decoder, model)
    )


def events(decoder: PagedDecoder, model: Path) -> Iterator[TokenEvent]:
    """The work that the exactness tests compare."""
    tokenizer = tokenizer_beside(str(model))
    assert tokenizer is not None
    requests = [
        GenerateRequest(request_id=str(index), prompt_token_ids=tokenizer.encode(text), params=params)
        for index, (text, params) in enumerate(WORK)
    ]
    return run_engine(Engine(decoder, tokenizer, EngineConfig()), requests)
