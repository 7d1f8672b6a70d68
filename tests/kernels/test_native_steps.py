"""Operators that stand for several of torch's have the bits of those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_ray.kernels.native import NativeKernels
from deepseek_ray.kernels.reference import ReferenceKernels
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore
from deepseek_ray.nn.gate import choice_of, choose_experts
from deepseek_ray.nn.norm import LATENT_NORM_EPS
from deepseek_ray.nn.rope import apply_rope
from deepseek_ray.nn.slots import combine_slots
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.kernels.cases import DTYPES, GATES, gate_config, random, rotation

NATIVE = NativeKernels()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("tokens", "rank", "turning"), [(1, 512, 64), (7, 20, 6), (700, 64, 16)])
def test_latents_are_written(dtype: torch.dtype, interleaved: bool, tokens: int, rank: int, turning: int) -> None:
    wide = random(tokens, rank + turning + 5, dtype=dtype)
    kv, norm = wide[:, : rank + turning], random(rank, seed=2)  # rows further apart than they are long
    slots = torch.randperm(tokens + 9, generator=torch.Generator().manual_seed(3))[:tokens]
    turned = rotation(tokens, turning // 2, interleaved)
    latents, expected = (torch.full((tokens + 9, rank + turning), 7.0, dtype=dtype) for _ in range(2))
    compressed = NATIVE.rms_norm(kv[:, :rank], norm, LATENT_NORM_EPS)
    rope = apply_rope(kv[:, rank:].float(), *turned)
    expected[slots] = torch.cat([compressed, rope.to(dtype)], dim=-1)
    assert NATIVE.write_latents(kv, norm, LATENT_NORM_EPS, turned, slots, latents)
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_queries_are_turned(interleaved: bool, tokens: int) -> None:
    absorbed, query = random(tokens, 3, 50), random(tokens, 3, 30 + 14, seed=1)
    turned = rotation(tokens, 7, interleaved)
    rope = apply_rope(query[..., 30:], turned.cos[:, None], turned.sin[:, None], interleaved)
    assert torch.equal(NATIVE.turn_query(absorbed, query, turned), torch.cat([absorbed, rope], dim=-1))


@pytest.mark.parametrize("gate", GATES)
def test_experts_are_chosen(gate: dict[str, Any]) -> None:
    config = gate_config(**gate)
    logits = random(200, 32)
    scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(dim=-1)
    bias = random(32, seed=4) * 0.1 if config.topk_method == "noaux_tc" else None
    ids, weights = NATIVE.choose_experts(scores, bias, choice_of(config))
    expected_ids, expected_weights = choose_experts(scores, bias, config)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(weights, expected_weights)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 0.5])
def test_each_token_has_experts_of_its_own_whatever_the_scores(value: float) -> None:
    for gate in GATES:
        scores = torch.full((3, 32), value)
        ids, _ = NATIVE.choose_experts(scores, None, choice_of(gate_config(**gate)))
        assert all(len(set(row)) == 5 and set(row) <= set(range(32)) for row in ids.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 2048), (5, 33), (300, 96)])
def test_slots_are_combined(dtype: torch.dtype, tokens: int, width: int) -> None:
    rows, weights = random(tokens, 6, width, dtype=dtype), random(tokens, 6, seed=1)
    combined = NATIVE.combine_slots(rows, weights)
    assert combined is not None
    assert torch.equal(combined, combine_slots(rows, weights).to(dtype))
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
