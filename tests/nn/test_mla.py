"""Multi-head latent attention: naive equals absorbed, gradients too; masks hide what they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import tiny_config
from torch import Tensor

from deepseek_ray.nn.mla import MLA, document_mask
from deepseek_ray.nn.norm import RMSNorm
from deepseek_ray.nn.rope import rope_tables

SHAPES: dict[str, dict[str, Any]] = {
    "q_lora": {},
    "no_q_lora": {"q_lora_rank": None},
    "bias": {"attention_bias": True},
    "wide_values": {"v_head_dim": 40},
    "yarn": {"rope_scaling": {"factor": 4, "original_max_position_embeddings": 16, "mscale": 1, "mscale_all_dim": 1}},
    "halves": {"rope_interleave": False},
}


def random_attention(**changes: Any) -> MLA:
    attention = MLA(tiny_config(**changes))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
    return attention


def run(attention: MLA, hidden: Tensor, documents: Tensor | None = None) -> Tensor:
    return attention(hidden, rope_tables(attention.config, torch.arange(hidden.shape[1]).unsqueeze(0)), documents)


def random_hidden(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("name", SHAPES)
def test_naive_equals_absorbed_with_gradients(name: str, masked: bool) -> None:
    attention = random_attention(**SHAPES[name])
    documents = torch.tensor([[0] * 4 + [1] * 7, [2] * 11]) if masked else None
    results = []
    for absorbed in (False, True):
        attention.absorbed = absorbed
        attention.zero_grad()
        hidden = random_hidden().requires_grad_()
        output = run(attention, hidden, documents)
        output.square().sum().backward()
        gradients = {key: parameter.grad for key, parameter in attention.named_parameters()}
        results.append({"output": output.detach(), "hidden": hidden.grad, **gradients})
    for key, naive in results[0].items():
        scale = float(naive.abs().max()) + 1e-6
        assert float((naive - results[1][key]).abs().max()) / scale < 1e-4, key


def test_no_token_sees_a_later_one() -> None:
    attention = random_attention()
    hidden = random_hidden()
    changed = hidden.clone()
    changed[:, 6:] += 1.0
    before, after = run(attention, hidden), run(attention, changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 1e-2


def test_packed_documents_equal_documents_alone() -> None:
    """Rotary positions are relative, so a document in the middle of a pack gives what it gives on its own."""
    attention = random_attention()
    hidden = random_hidden(batch=1, length=12)
    packed = run(attention, hidden, torch.tensor([[0] * 5 + [1] * 4 + [2] * 3]))
    for start, stop in ((0, 5), (5, 9), (9, 12)):
        torch.testing.assert_close(packed[:, start:stop], run(attention, hidden[:, start:stop]), rtol=1e-4, atol=1e-5)


def test_document_mask_by_hand() -> None:
    mask = document_mask(torch.tensor([[0, 0, 1]]))
    assert mask.shape == (1, 1, 3, 3)
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_rms_norm_by_hand() -> None:
    """[3, 4] has mean square 12.5; 3 / sqrt(12.5) = 0.8485, 4 / sqrt(12.5) = 1.1314, times weights 1 and 2."""
    norm = RMSNorm(2, 0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    assert norm(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([0.848528, 2 * 1.131371], rel=1e-5)
    assert norm(torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.float32  # a float32 weight decides
