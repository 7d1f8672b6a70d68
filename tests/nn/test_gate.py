"""The three gates against an obvious loop over tokens, and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import tiny_config
from torch import Tensor

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.nn.gate import Gate, choose_experts, gate_scores, select_experts

V2 = {"model_type": "deepseek_v2", "q_lora_rank": None, "num_experts_per_tok": 3}
GATES: dict[str, dict[str, Any]] = {
    "greedy": {**V2, "n_group": 1, "routed_scaling_factor": 1.0},
    "group_limited": {
        **V2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
    },
    "noaux": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5},
    "noaux_unnormalised": {"n_group": 2, "topk_group": 1, "norm_topk_prob": False},
}


def obvious_gate(scores: list[float], bias: list[float] | None, config: ModelConfig) -> dict[int, float]:
    """Expert -> weight of one token, in plain Python."""
    wanted = [score + (bias[expert] if bias else 0.0) for expert, score in enumerate(scores)]
    size = config.n_routed_experts // config.n_group
    allowed = set(range(config.n_routed_experts))
    if config.topk_method != "greedy":
        best = 2 if config.topk_method == "noaux_tc" else 1
        groups = [sorted(wanted[start : start + size])[-best:] for start in range(0, len(wanted), size)]
        kept = sorted(range(config.n_group), key=lambda group: sum(groups[group]))[-config.topk_group :]
        allowed = {group * size + place for group in kept for place in range(size)}
    chosen = sorted(allowed, key=lambda expert: wanted[expert])[-config.num_experts_per_tok :]
    normalise = config.norm_topk_prob and config.model_type == "deepseek_v3"
    total = sum(scores[expert] for expert in chosen) + 1e-20 if normalise else 1.0
    return {expert: scores[expert] / total * config.routed_scaling_factor for expert in chosen}


@pytest.mark.parametrize("name", GATES)
def test_gate_equals_the_obvious_loop(name: str) -> None:
    config = tiny_config(**GATES[name])
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(200, config.n_routed_experts, generator=generator) * 2
    noaux = config.topk_method == "noaux_tc"
    bias = torch.randn(config.n_routed_experts, generator=generator) if noaux else None
    scores, expert_ids, weights = select_experts(logits, bias, config)
    assert (expert_ids.dtype, weights.dtype, scores.dtype) == (torch.int64, torch.float32, torch.float32)
    for row in range(len(logits)):
        expected = obvious_gate(scores[row].tolist(), bias.tolist() if bias is not None else None, config)
        found = dict(zip(expert_ids[row].tolist(), weights[row].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-6)


def test_masked_groups_lose_even_to_very_negative_biases() -> None:
    """Two groups of two, the first is kept: 0.9 - 5 = -4.1 and 0.8 - 5 = -4.2 win although group two has -4.5 + 0.

    Masking with 0 instead of -inf would choose the experts of the masked group, whose 0 is above -4.1.
    """
    config = tiny_config(n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, routed_scaling_factor=1.0)
    scores = torch.tensor([[0.9, 0.8, 0.5, 0.5]])
    bias = torch.tensor([-5.0, -5.0, -6.0, -6.0])
    expert_ids, weights = choose_experts(scores, bias, config)
    assert expert_ids.tolist() == [[0, 1]]
    assert weights[0].tolist() == pytest.approx([0.9 / 1.7, 0.8 / 1.7])


def test_bias_chooses_but_does_not_weigh() -> None:
    config = tiny_config(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=1, routed_scaling_factor=1.0)
    expert_ids, weights = choose_experts(
        torch.tensor([[0.9, 0.1, 0.2, 0.3]]), torch.tensor([0.0, 2.0, 0.0, 0.0]), config
    )
    assert expert_ids.tolist() == [[1]]
    assert weights.tolist() == [[pytest.approx(1.0)]]  # 0.1 / 0.1


@pytest.mark.parametrize("name", GATES)
def test_rows_do_not_depend_on_other_rows(name: str) -> None:
    config = tiny_config(**GATES[name])
    scores = gate_scores(torch.randn(257, config.n_routed_experts, generator=torch.Generator().manual_seed(1)), config)
    bias = torch.linspace(-1, 1, config.n_routed_experts) if config.topk_method == "noaux_tc" else None
    ids, weights = choose_experts(scores, bias, config)
    for row in (0, 1, 100, 256):
        alone_ids, alone_weights = choose_experts(scores[row : row + 1], bias, config)
        assert torch.equal(alone_ids[0], ids[row])
        assert torch.equal(alone_weights[0], weights[row])


def test_no_tokens() -> None:
    ids, weights = choose_experts(torch.empty(0, 8), torch.zeros(8), tiny_config())
    assert ids.shape == weights.shape == (0, 2)


def test_gate_computes_in_float32_under_autocast_and_in_a_bf16_model() -> None:
    config = tiny_config()
    gate = Gate(config)
    torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(1))
    plain = gate(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(hidden).scores, plain.scores)
    assert gate.to(torch.bfloat16)(hidden.bfloat16()).scores.dtype == torch.float32


def test_gradient_reaches_the_gate_through_weights_and_scores() -> None:
    config = tiny_config()
    gate = Gate(config)
    torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(1))

    def gradient(pick: str) -> Tensor:
        gate.weight.grad = None
        (getattr(gate(hidden), pick) ** 2).sum().backward()
        assert gate.weight.grad is not None
        return gate.weight.grad

    assert gradient("weights").abs().sum() > 0
    assert gradient("scores").abs().sum() > 0
