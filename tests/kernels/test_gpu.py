"""The Triton operators against torch row by row: on a CUDA device, else interpreted on the CPU where Triton is there.

Triton comes with torch for CUDA; `pip install --no-deps triton` brings it beside torch for CPUs (700 MB).
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from deepseek_ray.kernels.base import PackedWeight, Rotation
from deepseek_ray.kernels.reference import ReferenceKernels
from deepseek_ray.nn.gate import choice_of, choose_experts
from deepseek_ray.nn.rope import apply_rope
from deepseek_ray.nn.slots import combine_slots
from tests.kernels.cases import DTYPES, GATES, gate_config, paged_case, random, rotation, tolerance

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
operators = pytest.importorskip("deepseek_ray.kernels.gpu.operators", reason="no Triton", exc_type=ImportError)
experts = pytest.importorskip("deepseek_ray.kernels.gpu.experts")

pytestmark = [pytest.mark.gpu] if ON_GPU else []
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
GPU, SLOW = operators.GpuKernels(), ReferenceKernels()


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as integers of 16 bits, and multiplies these."""
    if not ON_GPU:
        from triton.runtime import interpreter

        multiply = interpreter.InterpreterBuilder.create_dot

        def multiply_numbers(self: object, a: object, b: object, *others: object) -> object:
            return multiply(self, _as_float32(a), _as_float32(b), *others)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiply_numbers)


def _as_float32(handle):  # type: ignore[no-untyped-def]
    from triton import language as tl
    from triton.runtime import interpreter

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found.cpu(), expected, **tolerance(dtype))


class Expert(NamedTuple):
    gate_up: PackedWeight
    down: PackedWeight


def layer_of_experts(dtype: torch.dtype, quantization: Any = None, num_experts: int = 7) -> dict[int, Expert]:
    """Of a layer of `num_experts` all but expert 4; hidden size 72, width 40."""
    found = {}
    for id in range(num_experts):
        if id != 4:
            weights = random(80, 72, dtype=dtype, seed=id), random(72, 40, dtype=dtype, seed=100 + id)
            found[id] = Expert(*(GPU.pack([weight], quantization).to(DEVICE) for weight in weights))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs", [1, 12, 200, 2500])
def test_experts_compute_what_the_slow_ones_do(dtype: torch.dtype, pairs: int) -> None:
    held = layer_of_experts(dtype)
    generator = torch.Generator().manual_seed(0)
    hidden = random(40, 72 + 3, dtype=dtype)[:, :-3]  # rows further apart than they are long
    token_rows = torch.randint(40, (pairs,), generator=generator)
    ids = torch.tensor(list(held))[torch.randint(len(held) - 1, (pairs,), generator=generator)]  # one has no row
    table = GPU.expert_table(held, 7)
    rows = GPU.run_experts(table, hidden.to(DEVICE), token_rows.to(DEVICE), ids.to(DEVICE))
    expected = torch.empty(pairs, 72)
    for pair, (row, id) in enumerate(zip(token_rows.tolist(), ids.tolist(), strict=True)):
        x, own = hidden[row].float(), held[id]
        gate, up = (own.gate_up.data[0].cpu().float() @ x).chunk(2)
        expected[pair] = own.down.data[0].cpu().float() @ (torch.nn.functional.silu(gate) * up).to(dtype).float()
    assert rows is not None and rows.dtype == dtype
    error = (rows.cpu().float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < (1e-5 if dtype == torch.float32 else 2e-2)  # interpreted, bfloat16 is cut off


@pytest.mark.parametrize("missing", [4, 7, 9_999, -1])
def test_an_expert_that_is_not_here_is_not_computed(missing: int) -> None:
    held = layer_of_experts(torch.float32)
    table = GPU.expert_table(held, 7)
    hidden, rows = random(2, 72).to(DEVICE), torch.tensor([0, 1]).to(DEVICE)
    assert GPU.run_experts(table, hidden, rows, torch.tensor([0, missing]).to(DEVICE)) is None
    assert GPU.run_experts(table, hidden, rows, torch.tensor([0, 6]).to(DEVICE)) is not None


@pytest.mark.parametrize("pairs", [1, 33, 700, 17_000])
def test_pairs_are_sorted_by_expert(pairs: int) -> None:
    ids = torch.randint(20, (pairs,), generator=torch.Generator().manual_seed(1)) // 2 * 2
    order, starts = experts.order_pairs(ids.to(DEVICE), 20)
    assert order.tolist() == ids.argsort(stable=True).tolist()
    assert starts.tolist() == [int((ids < expert).sum()) for expert in range(21)]


def test_integers_take_torchs_way() -> None:
    assert GPU.expert_table(layer_of_experts(torch.float32, "int8"), 7) is None
    assert GPU.expert_table({}, 7) is None


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("num_experts", [32, 40])
def test_experts_are_chosen(gate: dict[str, Any], num_experts: int) -> None:
    config = gate_config(**gate).model_copy(update={"n_routed_experts": num_experts})
    logits = random(200, num_experts)
    scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(dim=-1)
    bias = random(num_experts, seed=4) * 0.1 if config.topk_method == "noaux_tc" else None
    ids, weights = GPU.choose_experts(scores.to(DEVICE), None if bias is None else bias.to(DEVICE), choice_of(config))
    expected_ids, expected_weights = choose_experts(scores, bias, config)
    assert torch.equal(ids.cpu(), expected_ids)
    torch.testing.assert_close(weights.cpu(), expected_weights)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 0.5])
def test_each_token_has_experts_of_its_own_whatever_the_scores(value: float) -> None:
    for gate in GATES:
        scores = torch.full((3, 32), value, device=DEVICE)
        ids, _ = GPU.choose_experts(scores, None, choice_of(gate_config(**gate)))
        assert all(len(set(row)) == 5 and set(row) <= set(range(32)) for row in ids.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 2048), (5, 33), (30, 96)])
def test_rows(dtype: torch.dtype, tokens: int, width: int) -> None:
    x, weight = random(tokens, width + 5, dtype=dtype)[:, :width], random(width, seed=1)
    assert_near(GPU.rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-6), SLOW.rms_norm(x, weight, 1e-6), dtype)
    gate_up = random(tokens, 2 * width, dtype=dtype, seed=2)
    assert_near(GPU.silu_mul(gate_up.to(DEVICE)), SLOW.silu_mul(gate_up), dtype)
    slots, weights = random(tokens, 6, width, dtype=dtype, seed=3), random(tokens, 6, seed=4)
    combined = GPU.combine_slots(slots.to(DEVICE), weights.to(DEVICE))
    assert_near(combined, combine_slots(slots, weights).to(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("tokens", "rank", "turning"), [(1, 512, 64), (7, 20, 6)])
def test_latents_and_queries(dtype: torch.dtype, interleaved: bool, tokens: int, rank: int, turning: int) -> None:
    kv, norm = random(tokens, rank + turning + 5, dtype=dtype)[:, : rank + turning], random(rank, seed=2)
    slots = torch.randperm(tokens + 9, generator=torch.Generator().manual_seed(3))[:tokens]
    turned = rotation(tokens, turning // 2, interleaved)
    there = Rotation(turned.cos.to(DEVICE), turned.sin.to(DEVICE), interleaved)
    expected = torch.full((tokens + 9, rank + turning), 7.0, dtype=dtype)
    latents = expected.clone().to(DEVICE)
    rope = apply_rope(kv[:, rank:].float(), *turned)
    expected[slots] = torch.cat([SLOW.rms_norm(kv[:, :rank], norm, 1e-6), rope.to(dtype)], dim=-1)
    assert GPU.write_latents(kv.to(DEVICE), norm.to(DEVICE), 1e-6, there, slots.to(DEVICE), latents)
    assert_near(latents, expected, dtype)

    absorbed, query = random(3, tokens, rank).transpose(0, 1), random(tokens, 3, 30 + turning, seed=1)
    rope = apply_rope(query[..., 30:], turned.cos[:, None], turned.sin[:, None], interleaved)
    found = GPU.turn_query(absorbed.to(DEVICE), query.to(DEVICE), there)
    assert_near(found, torch.cat([absorbed, rope], dim=-1), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "longest"), [(1, 1), (1, 16), (9, 16), (2, 128), (2, 129), (3, 330)])
def test_attention_over_paged_latents(dtype: torch.dtype, tokens: int, longest: int) -> None:
    case = paged_case(dtype, tokens, longest)
    expected = SLOW.latent_attention(**case)
    there = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    assert_near(GPU.latent_attention(**there), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_over_paged_latents(dtype: torch.dtype) -> None:
    """Neighbours of two sequences, and a last program that is not full."""
    case = paged_case(dtype, 41, 70)
    there = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    expected = SLOW.latent_attention(**case)
    assert_near(GPU.latent_attention(**there), expected, dtype)
    in_order = case["sequence_rows"].argsort(stable=True)
    for name in ("query", "sequence_rows", "positions"):
        there[name] = there[name][in_order.to(DEVICE)]
    assert_near(GPU.latent_attention(**there), expected[in_order], dtype)
