"""The C++ operators of training against torch's own, results and gradients, in sizes that divide nothing evenly."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_ray.kernels import training
from deepseek_ray.kernels.training import load_training_library, serves
from deepseek_ray.nn import fused
from deepseek_ray.nn.experts import grouped_linear
from deepseek_ray.nn.mla import document_mask
from deepseek_ray.nn.rope import apply_rope
from deepseek_ray.nn.slots import SlotOrder, combine_slots

pytestmark = pytest.mark.skipif(load_training_library() is None, reason="the operators did not build")


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result, and the gradient of each input for a gradient of the result that differs from place to place."""
    own = [given.clone().requires_grad_() for given in inputs]
    out = function(*own)
    grads = torch.autograd.grad((out * random(*out.shape, seed=99)).sum(), own)
    return [out.detach(), *grads]


def assert_equal(fast: list[Tensor], slow: list[Tensor]) -> None:
    for ours, expected in zip(fast, slow, strict=True):
        largest = float(expected.abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * max(1.0, largest))


EXPERTS = {
    "uneven": ([3, 0, 17, 1, 50], 24, 10),
    "wide": ([40, 7, 90], 70, 300),
    "many rows of one": ([0, 600, 0], 33, 18),
    "panels": ([12, 36, 6], 512, 256),
    "no rows": ([0, 0], 8, 4),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name: str, threads: int) -> None:
    sizes, hidden, width = EXPERTS[name]
    inputs = (
        random(sum(sizes), hidden),
        random(len(sizes), 2 * width, hidden, seed=1, scale=hidden**-0.5),
        random(len(sizes), hidden, width, seed=2, scale=width**-0.5),
    )

    def slow(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = grouped_linear(rows, gate_up, sizes).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, down, sizes)

    fast = with_gradients(lambda *given: fused.run_experts(*given, torch.tensor(sizes)), *inputs)
    assert_equal(fast, with_gradients(slow, *inputs))


def test_the_number_of_threads_changes_no_bit_of_the_experts() -> None:
    sizes = torch.tensor([30, 2, 0, 500])
    inputs = (random(532, 64), random(4, 96, 64, seed=1), random(4, 64, 48, seed=2))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(with_gradients(lambda *given: fused.run_experts(*given, sizes), *inputs))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_frozen_experts_get_no_gradient() -> None:
    inputs = [random(5, 8), random(2, 6, 8, seed=1), random(2, 8, 3, seed=2)]
    for frozen in range(3):
        own = [given.clone().requires_grad_(index != frozen) for index, given in enumerate(inputs)]
        fused.run_experts(*own, torch.tensor([2, 3])).sum().backward()
        assert [given.grad is None for given in own] == [index == frozen for index in range(3)]


def test_weighted_slots(threads: int) -> None:
    expert_ids = torch.randint(0, 5, (13, 3), generator=torch.Generator().manual_seed(3))
    slots = SlotOrder(expert_ids)
    rows, weights = random(39, 37), random(13, 3, seed=1)

    def slow(rows: Tensor, weights: Tensor) -> Tensor:
        return combine_slots(rows[slots._place].view(13, 3, 37), weights)

    assert_equal(with_gradients(slots.combine, rows, weights), with_gradients(slow, rows, weights))
    back = with_gradients(slots.to_experts, random(13, 37, seed=2))
    assert_equal(back, with_gradients(lambda hidden: hidden[slots._order // 3], random(13, 37, seed=2)))


@pytest.mark.parametrize("shape", [(70, 48), (2, 5, 33), (4,), (3, 0, 16)], ids=str)
def test_rms_norm(shape: tuple[int, ...], threads: int) -> None:
    def slow(x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))

    inputs = (random(*shape), random(shape[-1], seed=1))
    assert_equal(with_gradients(lambda *given: fused.rms_norm(*given, 1e-6), *inputs), with_gradients(slow, *inputs))


def test_rms_norm_of_a_part_of_wider_rows() -> None:
    inputs = (random(9, 40), random(24, seed=1))
    fast = with_gradients(lambda x, weight: fused.rms_norm(x[:, 3:27], weight, 1e-6), *inputs)
    slow = with_gradients(lambda x, weight: F.rms_norm(x[:, 3:27], (24,), weight, 1e-6), *inputs)
    assert_equal(fast, slow)


def test_swiglu(threads: int) -> None:
    inputs = (random(3, 7001, scale=3.0), random(3, 7001, seed=1))
    assert_equal(with_gradients(fused.swiglu, *inputs), with_gradients(lambda a, b: F.silu(a) * b, *inputs))


def test_cross_entropy(threads: int) -> None:
    logits, targets = random(21, 53, scale=20.0), torch.arange(21)
    targets[::4] = -100
    fast = with_gradients(lambda given: fused.cross_entropy_sum(given, targets), logits)
    assert_equal(fast, with_gradients(lambda given: F.cross_entropy(given, targets, reduction="sum"), logits))


def test_cross_entropy_of_a_target_that_is_no_token() -> None:
    with pytest.raises(IndexError, match="target 9 is out of bounds of 9 logits"):
        fused.cross_entropy_sum(random(2, 9), torch.tensor([0, 9]))


def test_what_is_not_finite_stays_so() -> None:
    logits = random(2, 40)
    logits[1, 7] = float("nan")
    assert fused.cross_entropy_sum(logits, torch.tensor([0, 1])).isnan()


ATTENTION = {
    "one block": (2, 11, 3, 8, 4, 8, True, 1),
    "several blocks": (1, 200, 2, 24, 16, 40, True, 1),
    "own positions, halves": (3, 70, 1, 5, 6, 3, False, 3),
    "one token": (2, 1, 2, 16, 8, 16, True, 1),
}


def documents_of(sequences: int, length: int, joined: bool) -> Tensor | None:
    """Each sequence is some documents one after the other, and the last one goes on with the first."""
    if not joined:
        return None
    edges = torch.arange(1, 4)[:, None] * length // 4 + torch.arange(sequences)
    documents = (torch.arange(length) >= edges.T[:, :, None]).sum(1)
    documents[-1, -1] = documents[-1, 0]
    return documents.int()


@pytest.mark.parametrize("joined", [False, True], ids=["one document", "several"])
@pytest.mark.parametrize("name", ATTENTION)
def test_causal_attention(name: str, joined: bool, threads: int) -> None:
    sequences, length, heads, nope, rope, value, interleaved, rotations = ATTENTION[name]
    angles = random(rotations, length, rope // 2, seed=7, scale=3.0)
    rotation = (angles.cos() * 1.1, angles.sin() * 1.1)
    documents = documents_of(sequences, length, joined)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril() if documents is None else document_mask(documents)
    inputs = (
        random(sequences, length, heads, nope + rope),
        random(sequences, length, heads, nope + value, seed=1),
        random(sequences, length, rope, seed=2),
    )

    def slow(queries: Tensor, expanded: Tensor, k_rope: Tensor) -> Tensor:
        cos, sin = (table.unsqueeze(2) for table in rotation)
        keys, values = expanded.split((nope, value), dim=-1)
        turned = apply_rope(k_rope.unsqueeze(2), cos, sin, interleaved).expand(-1, -1, heads, -1)
        queries = torch.cat((queries[..., :nope], apply_rope(queries[..., nope:], cos, sin, interleaved)), dim=-1)
        by_head = (part.transpose(1, 2) for part in (queries, torch.cat((keys, turned), dim=-1), values))
        return F.scaled_dot_product_attention(*by_head, attn_mask=mask, scale=0.3).transpose(1, 2)

    fast = with_gradients(lambda *given: fused.causal_attention(*given, rotation, interleaved, 0.3, documents), *inputs)
    assert_equal(fast, with_gradients(slow, *inputs))


def test_what_they_leave_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serves(torch.zeros(2), torch.nn.Parameter(torch.zeros(2)))
    assert not serves(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not serves(torch.zeros(2, device="meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not serves(torch.zeros(2))
    monkeypatch.setenv("DEEPSEEK_RAY_KERNELS", "reference")
    monkeypatch.setattr(training, "load_training_library", load_training_library.__wrapped__)
    assert not serves(torch.zeros(2))
