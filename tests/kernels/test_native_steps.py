"""Operators that stand for several of torch's have the bits of those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_ray.kernels.base import AttentionWeights, Kernels, Step
from deepseek_ray.kernels.native import NativeKernels
from deepseek_ray.kernels.reference import ReferenceKernels
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.decoder_weights import DecoderWeights
from deepseek_ray.models.expert_store import ExpertStore
from deepseek_ray.models.paged_attention import LatentAttention
from deepseek_ray.nn.gate import choice_of, choose_experts
from deepseek_ray.nn.slots import combine_slots
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.kernels.cases import DTYPES, GATES, gate_config, random, rotation

NATIVE = NativeKernels()


class Composed(NativeKernels):
    """Without the operators that are made of others."""

    def attention(self, weights: AttentionWeights) -> None:
        return None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_interleave": True},
        {"rope_interleave": False, "q_lora_rank": None},
        {"attention_bias": True, "hidden_size": 72, "kv_lora_rank": 20, "qk_rope_head_dim": 6},
    ],
)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_attention_is_what_it_is_composed_of(
    tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any], quantization: Any
) -> None:
    config = tiny_config(**changes)
    reader = CheckpointReader(write_random_checkpoint(tmp_path / "model", config))
    whole, composed = (
        LatentAttention(
            config, "model.layers.0", DecoderWeights(reader, dtype, kernels, torch.device("cpu"), quantization)
        )
        for kernels in (NATIVE, Composed())
    )
    for tokens in (1, 7, 300):
        step = Step(
            rotation(tokens, config.qk_rope_head_dim // 2, config.rope_interleave),
            torch.randperm(tokens + 3, generator=torch.Generator().manual_seed(3))[:tokens],
            torch.arange(tokens) % 5,
            torch.arange(tokens, dtype=torch.int32) % 2,
            torch.tensor([[0, 1], [1, 0]], dtype=torch.int32),
            4,
        )
        hidden = random(tokens, config.hidden_size + 5, dtype=dtype)[:, :-5]  # rows further apart than they are long
        latents = [random(max(8, tokens + 3), config.latent_width, dtype=dtype, seed=1) for _ in range(2)]
        found = whole.forward(hidden, step, latents[0])
        expected = composed.forward(hidden, step, latents[1])
        assert torch.equal(latents[0], latents[1])
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", [None, "int4"])
@pytest.mark.parametrize("tokens", [0, 1, 200])
def test_an_mlp_is_what_it_is_composed_of(dtype: torch.dtype, quantization: Any, tokens: int) -> None:
    x = random(tokens, 40, dtype=dtype)
    gate_up = NATIVE.pack([random(96, 40, dtype=dtype, seed=1)], quantization)
    down = NATIVE.pack([random(33, 48, dtype=dtype, seed=2)], quantization)
    assert torch.equal(NATIVE.mlp(x, gate_up, down), Kernels.mlp(NATIVE, x, gate_up, down))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
def test_experts_are_chosen(gate: dict[str, Any], dtype: torch.dtype) -> None:
    config = gate_config(**gate)
    x, weight = random(200, 24, dtype=dtype), NATIVE.pack([random(32, 24, seed=1)])
    bias = random(32, seed=4) * 0.1 if config.topk_method == "noaux_tc" else None
    ids, weights = NATIVE.route(x, weight, config.scoring_func, bias, choice_of(config))
    scores = NATIVE.scores(NATIVE.linear(x, weight, torch.float32), config.scoring_func)
    expected_ids, expected_weights = choose_experts(scores, bias, config)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(weights, expected_weights)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 0.5])
def test_each_token_has_experts_of_its_own_whatever_the_scores(value: float) -> None:
    for gate in GATES:
        config = gate_config(**gate)
        x, weight = torch.full((3, 8), value), NATIVE.pack([torch.ones(32, 8)])
        ids, _ = NATIVE.route(x, weight, config.scoring_func, None, choice_of(config))
        assert all(len(set(row)) == 5 and set(row) <= set(range(32)) for row in ids.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 2048), (5, 33), (300, 96)])
def test_slots_are_combined(dtype: torch.dtype, tokens: int, width: int) -> None:
    rows, weights = random(tokens, 6, width, dtype=dtype), random(tokens, 6, seed=1)
    more = [random(tokens, width, dtype=dtype, seed=seed) for seed in (2, 3)]
    combined = NATIVE.combine_slots(rows, weights, more)
    expected = combine_slots(rows, weights).to(dtype)
    assert combined is not None
    assert torch.equal(combined, expected + more[0] + more[1])
    alone = NATIVE.combine_slots(rows, weights)
    assert alone is not None and torch.equal(alone, expected)
    assert NATIVE.combine_slots(rows[..., ::2], weights) is None, "torch does what is not in one piece"


@pytest.fixture
def reader(tmp_path: Path) -> CheckpointReader:
    return CheckpointReader(write_random_checkpoint(tmp_path / "model", tiny_config()))


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8"), (torch.float32, "int4")],
)
@pytest.mark.parametrize("pairs", [1, 12, 500])
def test_experts_compute_what_their_products_do(
    reader: CheckpointReader, dtype: torch.dtype, quantization: Any, pairs: int
) -> None:
    store = ExpertStore(reader, {1: [0, 2, 3, 7]}, dtype, NATIVE, quantization=quantization)
    generator = torch.Generator().manual_seed(0)
    hidden = random(40, reader.config.hidden_size + 3, dtype=dtype)[:, :-3]
    token_rows = torch.randint(40, (pairs,), generator=generator)
    ids = torch.tensor([0, 2, 3, 7])[torch.randint(4, (pairs,), generator=generator)]
    rows = store.run(1, hidden, token_rows, ids)
    expected = store._run_in_groups(store._layers[1].experts, hidden, token_rows, ids)
    assert rows is not None and expected is not None
    assert torch.equal(rows, expected)
    plain = ExpertStore(reader, {1: [0, 2, 3, 7]}, torch.float32, ReferenceKernels())
    if quantization is None:
        wanted = plain.run(1, hidden.float(), token_rows, ids)
        torch.testing.assert_close(rows.float(), wanted, rtol=1e-3, atol=1e-3 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("missing", [1, 9_999, -1])
def test_an_expert_that_is_not_here_is_not_computed(reader: CheckpointReader, missing: int) -> None:
    store = ExpertStore(reader, {1: [0]}, torch.float32, NATIVE)
    hidden, rows = random(2, reader.config.hidden_size), torch.tensor([0, 1])
    assert store.run(1, hidden, rows, torch.tensor([0, missing])) is None
    assert store.run(2, hidden, rows, torch.tensor([0, 0])) is None, "no expert of the layer"
    assert store.run(1, hidden, rows, torch.tensor([0, 0])) is not None


def test_an_expert_that_came_later_is_found(reader: CheckpointReader) -> None:
    store = ExpertStore(reader, {1: [0]}, torch.float32, NATIVE)
    hidden, rows, ids = random(1, reader.config.hidden_size), torch.tensor([0]), torch.tensor([5])
    assert store.run(1, hidden, rows, ids) is None
    store.load(1, 5)
    assert store.run(1, hidden, rows, ids) is not None
    store.drop(1, 5)
    assert store.run(1, hidden, rows, ids) is None
