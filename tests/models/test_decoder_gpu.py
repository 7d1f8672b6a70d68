"""The trainable decoder on a CUDA device, against the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from deepseek_ray.models.decoder import DeepSeekForCausalLM
from tests.checkpoints import tiny_config

pytestmark = pytest.mark.gpu


def test_logits_and_gradients_equal_the_cpu() -> None:
    torch.manual_seed(0)
    original = DeepSeekForCausalLM(tiny_config())
    model = copy.deepcopy(original)
    tokens = torch.randint(96, (2, 40))
    expected = model(tokens).logits
    expected.square().mean().backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model = original.cuda()
    logits = model(tokens.cuda()).logits
    logits.square().mean().backward()
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-4)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad.cpu(), gradients[name], rtol=1e-2, atol=1e-5)
