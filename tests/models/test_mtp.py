"""Multi-token prediction: against transformers' own MTP layer, through checkpoints, and in a chain of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_config, write_random_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.decoder import DeepSeekForCausalLM
from deepseek_ray.models.load import load_model, save_model

IDS = torch.randint(0, 96, (2, 14), generator=torch.Generator().manual_seed(0))


def model_with_mtp(layers: int, **changes: Any) -> DeepSeekForCausalLM:
    """Random weights; embedding and head shared with the main model, as a trained model has them."""
    model = DeepSeekForCausalLM(tiny_config(num_nextn_predict_layers=layers, initializer_range=0.3, **changes))
    model.init_weights(torch.Generator().manual_seed(4))
    for layer in model.moe_modules:
        assert layer.correction_bias is not None
        layer.correction_bias.copy_(torch.linspace(-0.5, 0.5, 8))
    return model.eval()


def their_mtp(model: DeepSeekForCausalLM, directory: Path) -> MtpModel:
    """transformers' MTP layers, filled by hand: it reads such layers at the depth of the public model only."""
    save_model(model, directory)
    main = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs = MtpModel(main, len(model.mtp))
    for layer, own in zip(theirs.layers, model.mtp, strict=True):
        state = {}
        for name, tensor in own.state_dict().items():
            if name.endswith((".experts.gate_up", ".experts.down")):
                name += "_proj"
            if name.startswith(("embed_tokens", "shared_head.head")):
                continue
            if name.startswith(("enorm", "hnorm", "eh_proj")):
                state[name] = tensor
            elif name.startswith("shared_head.norm"):
                state[name.replace("shared_head.norm", "post_norm")] = tensor
            else:
                state["mtp_block." + name] = tensor
        layer.load_state_dict(state)
    return theirs.eval()


@pytest.mark.parametrize("layers", [1, 2])
def test_equals_transformers_mtp_layer(layers: int, tmp_path: Path) -> None:
    """Also what a second depth chains on: the first depth's hidden state after its own norm."""
    model = model_with_mtp(layers)
    theirs = their_mtp(model, tmp_path)
    with torch.no_grad():
        output = model(IDS, with_mtp=True)
        hidden = output.hidden
        for depth in range(layers):
            next_ids = IDS[:, depth + 1 :]
            places = torch.arange(depth + 1, 14).unsqueeze(0)
            hidden = theirs.forward_layer(depth, hidden[:, :-1], places, None, input_ids=next_ids)
            assert output.mtp[depth].logits.shape == (2, 13 - depth, 96)
            assert (output.mtp[depth].logits - theirs._project_to_logits(hidden)).abs().max() <= 1e-4
            assert (output.mtp[depth].hidden - hidden).abs().max() <= 1e-4


def test_equals_the_formula_written_out(tmp_path: Path) -> None:
    """concat(enorm(embedding of the next token), hnorm(hidden)) -> eh_proj -> decoder layer -> norm -> shared head."""
    model = model_with_mtp(1)
    layer: Any = model.mtp[0]

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    with torch.no_grad():
        hidden = model(IDS).hidden
        embedded = model.model.embed_tokens.weight[IDS[:, 1:]]
        both = torch.cat([normed(embedded, layer.enorm.weight), normed(hidden[:, :-1], layer.hnorm.weight)], dim=-1)
        rotation = model._rotation(IDS[:, 1:], None)
        after, _ = layer(both @ layer.eh_proj.weight.T, rotation, None)
        expected = normed(after, layer.shared_head.norm.weight) @ model.lm_head.weight.T
        torch.testing.assert_close(model.mtp_logits(hidden, IDS), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(IDS, with_mtp=True).mtp[0].logits, expected, rtol=1e-4, atol=1e-4)


def test_prediction_sees_no_further_than_the_next_token() -> None:
    model = model_with_mtp(1)
    changed = IDS.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 96
    with torch.no_grad():
        before, after = model(IDS, with_mtp=True).mtp[0].logits, model(changed, with_mtp=True).mtp[0].logits
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7] - after[:, 7]).abs().max() > 1e-2, "place 7 reads token 8"


@pytest.mark.parametrize("depth", [0, 1])
def test_packed_documents_equal_documents_alone(depth: int) -> None:
    """At every depth a document predicts what it would alone; the places that join two of them are seen by nobody."""
    model = model_with_mtp(2)
    documents = torch.tensor([[0] * 6 + [1] * 8] * 2)
    with torch.no_grad():
        packed = model(IDS, document_ids=documents, with_mtp=True).mtp[depth].logits
        for start, stop in ((0, 6), (6, 14)):
            alone = model(IDS[:, start:stop], with_mtp=True).mtp[depth].logits
            inside = slice(start, stop - 1 - depth)
            torch.testing.assert_close(packed[:, inside], alone, rtol=1e-3, atol=1e-3)


def test_round_trip_writes_the_shared_copies(tmp_path: Path) -> None:
    model = model_with_mtp(1)
    save_model(model, tmp_path / "one")
    reader = CheckpointReader(tmp_path / "one")
    reader.validate()
    assert torch.equal(reader.tensor("model.layers.3.embed_tokens.weight"), model.model.embed_tokens.weight)
    assert torch.equal(reader.tensor("model.layers.3.shared_head.head.weight"), model.lm_head.weight)
    again = load_model(tmp_path / "one").eval()
    assert again.mtp[0].embed_tokens is again.model.embed_tokens  # type: ignore[union-attr]
    assert again.mtp[0].shared_head.head is again.lm_head  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(again(IDS, with_mtp=True).mtp[0].logits, model(IDS, with_mtp=True).mtp[0].logits)


def test_copies_that_differ_are_kept_apart(tmp_path: Path) -> None:
    written = CheckpointReader(write_random_checkpoint(tmp_path / "one", tiny_config(num_nextn_predict_layers=1)))
    model = load_model(tmp_path / "one")
    assert model.mtp[0].embed_tokens is not model.model.embed_tokens  # type: ignore[union-attr]
    save_model(model, tmp_path / "two")
    again = CheckpointReader(tmp_path / "two")
    assert all(torch.equal(again.tensor(name), written.tensor(name)) for name in written.names)


def test_transformers_ignores_the_layer_and_drops_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_with_mtp(1)
    save_model(model, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (theirs(IDS).logits - model(IDS).logits).abs().max() <= 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs")
    assert "multi-token prediction is off" in caplog.text
    assert len(back.mtp) == back.config.num_nextn_predict_layers == 0


def test_gradients_reach_the_layer_and_the_main_model() -> None:
    model = model_with_mtp(1)
    model.train()
    model(IDS, with_mtp=True).mtp[0].logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.mtp.parameters())
    assert model.model.layers[0].self_attn.o_proj.weight.grad.abs().sum() > 0  # type: ignore[union-attr]
