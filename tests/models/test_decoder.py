"""The decoder module: documents, recomputation, initialisation, and its way to a checkpoint and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config, write_random_checkpoint
from torch import Tensor

from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.decoder import DeepSeekForCausalLM
from deepseek_ray.models.load import load_model, save_model, state_to_hf
from deepseek_ray.models.shapes import parameter_shapes


def random_ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(0))


def random_model(tmp_path: Path, **changes: object) -> DeepSeekForCausalLM:
    return load_model(write_random_checkpoint(tmp_path / "random", tiny_config(**changes)))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"model_type": "deepseek_v2", "n_group": 1}])
def test_round_trip_is_exact_and_complete(tmp_path: Path, changes: dict[str, object]) -> None:
    config = tiny_config(**changes)
    written = CheckpointReader(write_random_checkpoint(tmp_path / "one", config))
    model = load_model(tmp_path / "one")
    assert {name: tuple(tensor.shape) for name, tensor in state_to_hf(model)} == parameter_shapes(config)
    save_model(model, tmp_path / "two")
    again = CheckpointReader(tmp_path / "two")
    assert again.config == config
    assert set(again.names) == set(written.names)
    assert all(torch.equal(again.tensor(name), written.tensor(name)) for name in written.names)


def test_bf16_keeps_correction_biases_in_float32(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, tiny_config(num_nextn_predict_layers=1))
    model = load_model(tmp_path, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for layer in model.moe_modules:
        assert layer.correction_bias is not None
        assert layer.correction_bias.dtype == torch.float32
    bias = CheckpointReader(tmp_path).tensor("model.layers.1.mlp.gate.e_score_correction_bias")
    assert torch.equal(model.moe_modules[0].correction_bias, bias)
    assert model(random_ids()).logits.dtype == torch.bfloat16


def test_loaded_weights_do_not_live_in_the_file(tmp_path: Path) -> None:
    """Training writes into its weights; the checkpoint they came from must not notice."""
    model = random_model(tmp_path)
    before = (tmp_path / "random" / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "random" / "model.safetensors").read_bytes() == before


def test_packed_documents_equal_documents_alone(tmp_path: Path) -> None:
    model = random_model(tmp_path).eval()
    ids = random_ids(1, 12)
    packed = model(ids, document_ids=torch.tensor([[4] * 5 + [7] * 7])).logits
    for start, stop in ((0, 5), (5, 12)):
        torch.testing.assert_close(packed[:, start:stop], model(ids[:, start:stop]).logits, rtol=1e-3, atol=1e-4)
    assert (packed[:, 5:] - model(ids).logits[:, 5:]).abs().max() > 1e-2


def test_positions_shift_nothing_but_are_used(tmp_path: Path) -> None:
    """Only distances matter; unequal distances do."""
    model = random_model(tmp_path).eval()
    ids, places = random_ids(1, 8), torch.arange(8).unsqueeze(0)
    plain = model(ids).logits
    torch.testing.assert_close(model(ids, positions=places + 50).logits, plain, rtol=1e-3, atol=1e-3)
    assert (model(ids, positions=places * 9).logits - plain).abs().max() > 1e-2


def test_recomputation_changes_neither_loss_nor_gradient_nor_counts(tmp_path: Path) -> None:
    model = random_model(tmp_path, num_nextn_predict_layers=1)
    results = []
    for recompute in (False, True):
        model.recompute_activations = recompute
        model.zero_grad()
        output = model(random_ids(), document_ids=torch.tensor([[0] * 12, [1] * 6 + [2] * 6]), with_mtp=True)
        balance = sum(gate.scores.square().mean() for gate in output.gates)  # the balance loss reads the gates
        (output.logits.square().mean() + output.mtp[0].logits.square().mean() + balance).backward()
        counts = [layer.take_counts() for layer in model.moe_modules]
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient is not None for gradient in gradients)
        results.append((output.logits.detach(), *gradients, *counts))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_gates_come_in_layer_order_with_the_shape_of_the_batch(tmp_path: Path) -> None:
    model = random_model(tmp_path)
    gates = model(random_ids(3, 5)).gates
    assert len(gates) == len(model.config.moe_layers) == len(model.moe_modules) == 2
    for gate, layer in zip(gates, model.moe_modules, strict=True):
        assert gate.scores.shape == (3, 5, 8)
        assert gate.expert_ids.shape == (3, 5, 2)
        assert torch.equal(layer.take_counts(), gate.expert_ids.flatten().bincount(minlength=8))


def test_initialisation_follows_the_config_and_the_generator() -> None:
    model = DeepSeekForCausalLM(tiny_config(initializer_range=0.05, hidden_size=64, attention_bias=True))
    model.init_weights(torch.Generator().manual_seed(1))
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in first.items():
        if "norm" in name:
            assert tensor.eq(1).all(), name
        elif name.endswith("bias"):
            assert tensor.eq(0).all(), name
        else:
            assert 0.04 < tensor.std() < 0.06, name
    model.init_weights(torch.Generator().manual_seed(1))
    assert all(torch.equal(tensor, first[name]) for name, tensor in model.state_dict().items())


def test_tied_embeddings_are_one_parameter(tmp_path: Path) -> None:
    built = DeepSeekForCausalLM(tiny_config(tie_word_embeddings=True))
    for model in (built, random_model(tmp_path, tie_word_embeddings=True)):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        correction_biases = 2 * 8  # buffers
        trained = sum(parameter.numel() for parameter in model.parameters())
        assert trained + correction_biases == model.config.num_parameters


def test_every_routed_expert_matters(tmp_path: Path) -> None:
    """Zeroing any one of them changes the output: none is dead weight in the layer's arithmetic."""
    model = random_model(tmp_path, n_group=1, num_experts_per_tok=4).eval()
    ids = random_ids(4, 16)
    with torch.no_grad():
        for layer in model.moe_modules:
            layer.gate.e_score_correction_bias.zero_()  # type: ignore[union-attr,operator]
        before = model(ids).logits
        for layer in model.moe_modules:
            for expert in range(8):
                kept = layer.experts.down[expert].clone()
                layer.experts.down[expert].zero_()
                assert not torch.equal(model(ids).logits, before)
                layer.experts.down[expert].copy_(kept)
