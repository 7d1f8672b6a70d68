"""The mixture-of-experts layer against a loop over tokens, its gradients, its counts and its combination of slots."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checkpoints import tiny_config
from torch import Tensor

from deepseek_ray.nn.experts import Experts
from deepseek_ray.nn.moe import MoE
from deepseek_ray.nn.recompute import checkpointed
from deepseek_ray.nn.slots import combine_slots


def random_layer(**changes: object) -> MoE:
    layer = MoE(tiny_config(**changes))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return layer


def random_hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(6))


def obvious_experts(experts: Experts, hidden: Tensor, expert_ids: Tensor) -> Tensor:
    """One token and slot after the other."""
    rows = []
    for token, chosen in enumerate(expert_ids.tolist()):
        for expert in chosen:
            gate, up = (experts.gate_up[expert] @ hidden[token]).chunk(2)
            rows.append(experts.down[expert] @ (F.silu(gate) * up))
    return torch.stack(rows).view(*expert_ids.shape, -1)


def test_experts_equal_the_obvious_loop_with_gradients() -> None:
    experts = random_layer().experts
    ids = torch.tensor([[3, 1], [1, 0], [7, 3], [3, 7], [0, 1]])  # experts 2, 4, 5, 6 have no token
    counts = ids.flatten().bincount(minlength=8)
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(1))
    results = []
    for run in (
        lambda x: experts(x, ids, weights, counts),
        lambda x: combine_slots(obvious_experts(experts, x, ids), weights),
    ):
        hidden = random_hidden(5).requires_grad_()
        experts.zero_grad()
        rows = run(hidden)
        (rows * torch.arange(rows.numel()).view_as(rows).cos()).sum().backward()
        assert experts.gate_up.grad is not None
        assert experts.down.grad is not None
        results.append((rows.detach(), hidden.grad, experts.gate_up.grad.clone(), experts.down.grad.clone()))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    assert results[0][2][2].abs().sum() == 0, "an expert without tokens gets a zero gradient, not none"


def test_layer_is_routed_plus_shared_experts() -> None:
    layer = random_layer(n_shared_experts=2)
    hidden = random_hidden(2, 3)
    output, chosen = layer(hidden)
    assert chosen.scores.shape == (2, 3, 8)
    assert chosen.expert_ids.shape == chosen.weights.shape == (2, 3, 2)
    rows = obvious_experts(layer.experts, hidden.flatten(0, 1), chosen.expert_ids.flatten(0, 1))
    routed = (rows * chosen.weights.flatten(0, 1).unsqueeze(-1)).sum(1).view_as(hidden)
    assert layer.shared_experts is not None
    torch.testing.assert_close(output, routed + layer.shared_experts(hidden), rtol=1e-4, atol=1e-5)


def test_no_shared_experts() -> None:
    layer = random_layer(n_shared_experts=0)
    assert layer.shared_experts is None
    assert layer(random_hidden(1, 4))[0].shape == (1, 4, 32)


def test_counts_are_summed_over_training_forwards_and_taken_once() -> None:
    layer = random_layer()
    assert layer.take_counts().tolist() == [0] * 8
    ids = torch.cat([layer(random_hidden(n, 3))[1].expert_ids.flatten() for n in (1, 4)])
    assert torch.equal(layer.take_counts(), ids.bincount(minlength=8))
    assert layer.take_counts().sum() == 0
    layer.eval()
    layer(random_hidden(4, 3))
    assert layer.take_counts().sum() == 0


def test_recomputation_is_not_counted() -> None:
    """Activation checkpointing runs the forward twice; the balancer must see each token once."""
    layer = random_layer()
    hidden = random_hidden(2, 5).requires_grad_()
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpointed(layer, hidden)[0].sum().backward()
    assert len(calls) == 2
    assert layer.take_counts().sum() == 2 * 5 * 2


def test_combine_slots_by_hand() -> None:
    """0.5 * [1, 2] + 2 * [10, 20] = [20.5, 41]."""
    rows = torch.tensor([[[1.0, 2.0], [10.0, 20.0]]])
    assert combine_slots(rows, torch.tensor([[0.5, 2.0]])).tolist() == [[20.5, 41.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_slots_rows_are_independent_and_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 6, 33, generator=generator).to(dtype)
    weights = torch.rand(300, 6, generator=generator)
    together = combine_slots(rows, weights)
    assert together.dtype == torch.float32
    for start, length in ((0, 1), (7, 3), (250, 50)):
        some = slice(start, start + length)
        assert torch.equal(combine_slots(rows[some], weights[some]), together[some])
    by_hand = torch.zeros(33)
    for slot in range(6):
        by_hand = by_hand + rows[11, slot].float() * weights[11, slot]
    assert torch.equal(by_hand, together[11])


def test_under_autocast_the_layer_keeps_the_hidden_dtype() -> None:
    layer = random_layer()
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = layer(random_hidden(1, 4).requires_grad_())
    assert output.dtype == torch.float32
    output.sum().backward()
    assert layer.experts.gate_up.grad is not None
    assert layer.experts.gate_up.grad.dtype == torch.float32
