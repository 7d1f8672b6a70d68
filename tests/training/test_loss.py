"""Losses against sums written out in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_ray.training.loss import (
    IGNORED_TARGET,
    cross_entropy_sum,
    next_tokens,
    sequence_balance_loss,
)


def test_targets_stay_inside_documents() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 9, 4]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]], dtype=torch.int32)
    no = IGNORED_TARGET
    assert next_tokens(tokens, documents).tolist() == [[6, 7, no, 9, 4]]
    assert next_tokens(tokens, documents, ahead=2).tolist() == [[7, no, no, 4, no]]
    assert next_tokens(tokens, documents, ahead=3).eq(no).all()


def test_cross_entropy_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 7, generator=generator)
    targets = torch.randint(0, 7, (2, 4), generator=generator)
    targets[0, 3] = IGNORED_TARGET
    expected = 0.0
    for row, target in zip(logits.reshape(-1, 7).tolist(), targets.flatten().tolist(), strict=True):
        if target != IGNORED_TARGET:
            expected += math.log(sum(math.exp(value) for value in row)) - row[target]
    assert cross_entropy_sum(logits, targets).item() == pytest.approx(expected, rel=1e-6)


def test_sequence_balance_by_hand() -> None:
    # One sequence, 2 tokens, 2 experts, top-1. Both tokens choose expert 0: f = 2/(1*2) * [2, 0] = [2, 0].
    # Normalised scores [.75, .25] and [.5, .5]: P = [.625, .375]. Loss = 2 * .625.
    scores = torch.tensor([[[0.6, 0.2], [0.4, 0.4]]])
    assert sequence_balance_loss(scores, torch.tensor([[[0], [0]]])).item() == pytest.approx(1.25)


def test_sequence_balance_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    num_sequences, length, num_experts, top_k = 3, 5, 4, 2
    scores = torch.rand(num_sequences, length, num_experts, generator=generator) + 0.01
    ids = scores.topk(top_k, dim=-1).indices
    total = 0.0
    for sequence in range(num_sequences):
        for expert in range(num_experts):
            chosen = sum(expert in ids[sequence, token].tolist() for token in range(length))
            fraction = num_experts / (top_k * length) * chosen
            shares = [scores[sequence, t, expert].item() / scores[sequence, t].sum().item() for t in range(length)]
            total += fraction * sum(shares) / length
    assert sequence_balance_loss(scores, ids).item() == pytest.approx(total / num_sequences, rel=1e-5)


def test_sequence_balance_is_one_when_even_and_pushes_the_busy_expert_down() -> None:
    even = torch.full((1, 4, 4), 0.5)
    ids = torch.tensor([[[0], [1], [2], [3]]])
    assert sequence_balance_loss(even, ids).item() == pytest.approx(1.0)
    scores = torch.full((1, 4, 4), 0.5, requires_grad=True)
    sequence_balance_loss(scores, torch.zeros(1, 4, 1, dtype=torch.long)).backward()
    assert scores.grad is not None
    assert (scores.grad[..., 0] > 0).all()
    assert (scores.grad[..., 1:] < 0).all()
